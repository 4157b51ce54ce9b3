-- Up to $3 bigint deferred rows of reason $1 text and campaign $2 uuid (null = any), in the order in which they are taken.
-- `total`: how many there are without the limit. No locks.
SELECT d.id, d.campaign_id, d.reason, d.not_before, d.tries, d.first_written, d.trigger,
       jsonb_array_length(d.requests) AS requests, coalesce(s.failures, 0) AS failures, s.retry_at,
       count(*) OVER () AS total
  FROM campaign_stats.deferred d
  LEFT JOIN campaign_stats.campaign_state s ON s.campaign_id = d.campaign_id
 WHERE ($1::text IS NULL OR d.reason = $1) AND ($2::uuid IS NULL OR d.campaign_id = $2)
 ORDER BY (d.reason = 'sweep'), d.not_before, d.id
 LIMIT $3
