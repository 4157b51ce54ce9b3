-- $1 bigint[] were acknowledged: delete. $2 bigint[] can never be sent, for the reasons $3 text[]: set aside.
-- Whoever commits this does not wait for the disk: should the server lose it, the same events are sent once more.
WITH asynchronous AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
published AS (DELETE FROM campaign_stats.outbox o USING asynchronous WHERE o.id = ANY ($1::bigint[]))
UPDATE campaign_stats.outbox o
   SET set_aside_at = clock_timestamp(), error = refused.error
  FROM unnest($2::bigint[], $3::text[]) AS refused (id, error)
 WHERE o.id = refused.id
