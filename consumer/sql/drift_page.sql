-- The $2 campaigns after $1 uuid (null = from the start) in id order, each with its drift: truth minus stored, '{}' when
-- the stored stats are right. Changes and locks nothing.
WITH page AS (
    SELECT c.id, c.name, c.type, c.status, c.last_synced_at, c.stats
      FROM public.campaigns c
     WHERE c.id >= coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') AND c.id IS DISTINCT FROM $1::uuid
     ORDER BY c.id LIMIT $2
)
SELECT p.id, p.name, p.type, p.status, p.last_synced_at, p.stats::text AS stored, t.stats AS truth,
       CASE WHEN p.stats = t.stats THEN '{}' ELSE campaign_stats.drift(p.stats, t.stats) END AS drift
  FROM page p CROSS JOIN LATERAL campaign_stats.count_prospects(p.id) AS t
 ORDER BY p.id
