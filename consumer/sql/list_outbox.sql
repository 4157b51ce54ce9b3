-- Up to $2 bigint rows of the outbox in id order, with $1 bool only those set aside, without their events.
-- `total`: how many there are without the limit. No locks.
SELECT id, campaign_id, type, octet_length(event) AS bytes, written_at, set_aside_at, error, count(*) OVER () AS total
  FROM campaign_stats.outbox
 WHERE NOT $1::bool OR set_aside_at IS NOT NULL
 ORDER BY id
 LIMIT $2
