-- What the guard knows of campaign $1 uuid: one row, or none when there is no such campaign. No locks.
SELECT c.id, c.type, c.status, t.counts, s.guard_paused_at,
       (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'user' AND l.id = c.user_id) AS user_limits,
       (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'campaign' AND l.id = c.id) AS campaign_limits,
       (SELECT jsonb_build_object('paused_at', d.decided_at, 'version', d.version, 'sent', d.sent, 'bounced', d.bounced)
          FROM campaign_stats.guard_decisions d
         WHERE d.campaign_id = c.id AND d.paused ORDER BY d.id DESC LIMIT 1) AS last_pause
  FROM public.campaigns c CROSS JOIN LATERAL campaign_stats.count_prospects(c.id) AS t
  LEFT JOIN campaign_stats.campaign_state s ON s.campaign_id = c.id
 WHERE c.id = $1
