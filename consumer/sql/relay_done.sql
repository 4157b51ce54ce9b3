-- $1 bigint[] were acknowledged: delete. $2 bigint[] can never be sent, for the reasons $3 text[]: set aside.
WITH published AS (DELETE FROM campaign_stats.outbox WHERE id = ANY ($1::bigint[]))
UPDATE campaign_stats.outbox o
   SET set_aside_at = clock_timestamp(), error = refused.error
  FROM unnest($2::bigint[], $3::text[]) AS refused (id, error)
 WHERE o.id = refused.id
