-- Compare the $2 campaigns after $1 uuid (null = from the start) with their rows, without locks: one row per campaign, in
-- id order. `drift`: truth minus stored; `differs`: from the truth or from what was published; `waiting`: deferred already.
-- The page begins in the index where it begins: with OR, a kept plan reads all that is before it.
WITH page AS (
    SELECT c.id, c.user_id, c.type, c.status, c.stats, c.last_synced_at
      FROM public.campaigns c
     WHERE c.id >= coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') AND c.id IS DISTINCT FROM $1::uuid
     ORDER BY c.id LIMIT $2
), compared AS (
    SELECT p.*, t.counts,
           CASE WHEN p.stats = t.stats THEN '{}' ELSE campaign_stats.drift(p.stats, t.stats) END AS drift
      FROM page p CROSS JOIN LATERAL campaign_stats.count_prospects(p.id) AS t
)
SELECT c.id, c.type, c.status, c.last_synced_at, c.counts, c.drift,
       (c.drift <> '{}' OR s.published_counts IS DISTINCT FROM c.counts
                        OR s.published_status IS DISTINCT FROM c.status) AS differs,
       EXISTS (SELECT 1 FROM campaign_stats.deferred d WHERE d.campaign_id = c.id) AS waiting,
       s.guard_paused_at,
       (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'user' AND l.id = c.user_id) AS user_limits,
       (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'campaign' AND l.id = c.id) AS campaign_limits
  FROM compared c
  LEFT JOIN campaign_stats.campaign_state s ON s.campaign_id = c.id
 ORDER BY c.id
