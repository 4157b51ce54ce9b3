-- Lock, recount and write the campaigns $1 uuid[]; $2 text: chunk, worker or door (how patient).
-- One row per campaign that exists, recounted or held. Locks (FOR NO KEY UPDATE) last until the transaction ends.
-- `skip_other_campaigns` as text: jsonb holds what no parser of ours takes.
SELECT campaign_id, held, retry_at, failures, user_id, counts, drift, synced_before, counted_at, type, name, status,
       daily_limit, stop_on_reply, open_tracking, skip_other_campaigns::text, stats, last_synced_at, pause_reason,
       created_at, updated_at, version, published_counts, published_status, guard_paused_at, observed_trip, last_total,
       user_limits, campaign_limits
  FROM campaign_stats.recalculate_campaign_stats($1, $2)
