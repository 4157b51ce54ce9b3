-- What is to be published of the shards $1 smallint[], at most about $2 rows and $3 bytes (but always one row), by
-- presence and in id order: never `id > last`, because ids are handed out before they are committed. Index outbox_pending.
SELECT id, campaign_id, type, event, since, fact
  FROM (SELECT o.id, o.campaign_id, o.type, o.event, o.since, o.fact,
               sum(octet_length(o.event)) OVER (ORDER BY o.id) - octet_length(o.event) AS bytes_before
          FROM unnest($1::smallint[]) AS mine (shard)
         CROSS JOIN LATERAL (
               SELECT id, campaign_id, type, event, since, fact FROM campaign_stats.outbox
                WHERE shard = mine.shard AND set_aside_at IS NULL
                ORDER BY id LIMIT greatest(1, $2::int / cardinality($1::smallint[]))) AS o) AS turn
 WHERE bytes_before < $3
 ORDER BY id
