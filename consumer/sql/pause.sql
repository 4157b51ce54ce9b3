-- Pause the campaigns $1 uuid[] that the guard judged; the caller holds their locks. One row per campaign paused.
-- The moment of the pause closes its window: prospects contacted later belong to the next one.
UPDATE public.campaigns c
   SET status = 'paused', pause_reason = 'bounce_rate', updated_at = moment.at
  FROM (SELECT clock_timestamp() AS at) AS moment
 WHERE c.id = ANY ($1::uuid[]) AND c.status = 'active'
RETURNING c.id AS campaign_id, moment.at AS paused_at, c.user_id, c.type, c.name, c.status, c.daily_limit, c.stop_on_reply,
          c.open_tracking, c.skip_other_campaigns::text, c.stats, c.last_synced_at, c.pause_reason, c.created_at,
          c.updated_at
