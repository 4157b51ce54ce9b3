-- What is to be published of the shards $1 smallint[] and of the types $4 text[], at most $2 rows and about $3 bytes (but
-- always one row), by presence and in id order, as in relay_read. Rows of other types, which are held back, are not even
-- looked at: index outbox_by_type, which is why it says `id + 0`.
SELECT id, campaign_id, type, event, since, fact
  FROM (SELECT o.id, o.campaign_id, o.type, o.event, o.since, o.fact,
               sum(octet_length(o.event)) OVER (ORDER BY o.id) - octet_length(o.event) AS bytes_before
          FROM unnest($1::smallint[]) AS mine (shard)
         CROSS JOIN unnest($4::text[]) AS wanted (type)
         CROSS JOIN LATERAL (
               SELECT id, campaign_id, type, event, since, fact FROM campaign_stats.outbox
                WHERE shard = mine.shard AND type = wanted.type AND set_aside_at IS NULL
                ORDER BY id + 0 LIMIT greatest(1, $2::int / cardinality($1::smallint[]))) AS o) AS turn
 WHERE bytes_before < $3
 ORDER BY id
 LIMIT $2::int
