-- The guard's windows of the candidates $1 uuid[] with sizes $2 int[] (0 = all) and openings $3 timestamptz[] (null = since
-- the beginning). One row per candidate. No locks beyond those the caller holds; index campaign_prospects_by_contact.
-- Two branches, because `opened_at IS NULL OR ...` could not be an index condition.
SELECT candidate.id, count(w.status) AS sent, count(*) FILTER (WHERE w.status = 'bounced') AS bounced,
       min(w.contacted_at) AS oldest_contact, max(w.contacted_at) AS newest_contact, clock_timestamp() AS decided_at
  FROM unnest($1::uuid[], $2::int[], $3::timestamptz[]) AS candidate (id, size, opened_at)
  LEFT JOIN LATERAL (
      (SELECT p.status, p.contacted_at
         FROM public.campaign_prospects p
        WHERE candidate.opened_at IS NULL AND p.campaign_id = candidate.id
          AND (p.status IN ('sent', 'replied', 'bounced', 'completed', 'timed_out')
               OR (p.status = 'cancelled' AND p.contacted_at IS NOT NULL))
        ORDER BY p.contacted_at DESC NULLS LAST, p.id DESC
        LIMIT nullif(candidate.size, 0))
      UNION ALL
      (SELECT p.status, p.contacted_at
         FROM public.campaign_prospects p
        WHERE candidate.opened_at IS NOT NULL AND p.campaign_id = candidate.id
          AND (p.status IN ('sent', 'replied', 'bounced', 'completed', 'timed_out')
               OR (p.status = 'cancelled' AND p.contacted_at IS NOT NULL))
          AND p.contacted_at > candidate.opened_at
        ORDER BY p.contacted_at DESC NULLS LAST, p.id DESC
        LIMIT nullif(candidate.size, 0))
  ) AS w ON true
 GROUP BY candidate.id
