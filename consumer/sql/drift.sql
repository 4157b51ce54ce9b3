-- Campaigns whose stored stats differ from the truth, in id order; changes and locks nothing.
SELECT c.id, c.name, c.type, c.status, c.last_synced_at, c.stats AS stored, t.stats AS truth,
       campaign_stats.drift(c.stats, t.stats) AS drift
  FROM public.campaigns c CROSS JOIN LATERAL campaign_stats.count_prospects(c.id) AS t
 WHERE c.stats <> t.stats AND campaign_stats.drift(c.stats, t.stats) <> '{}'
 ORDER BY c.id
