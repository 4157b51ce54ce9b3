-- Every row of guard_limits, users first: `own` = the row, `owner` = for a campaign the limits of its user, if there are any,
-- `without` = the statement that deletes it. No locks.
SELECT l.scope, l.id, to_jsonb(l) AS own, to_jsonb(o) AS owner,
       format('DELETE FROM campaign_stats.guard_limits WHERE scope = %L AND id = %L', l.scope, l.id) AS without
  FROM campaign_stats.guard_limits l
  LEFT JOIN public.campaigns c ON l.scope = 'campaign' AND c.id = l.id
  LEFT JOIN campaign_stats.guard_limits o ON o.scope = 'user' AND o.id = c.user_id
 ORDER BY l.scope DESC, l.id
