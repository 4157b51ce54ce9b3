-- The latest $1 bigint pauses of any replica, the newest first; index guard_decisions_paused.
SELECT campaign_id, decided_at AS paused_at, sent, bounced, threshold_bp
  FROM campaign_stats.guard_decisions
 WHERE paused
 ORDER BY decided_at DESC
 LIMIT $1
