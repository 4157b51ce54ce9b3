-- Retry the failing campaigns $1 uuid[] within a minute. Takes what is free: the caller may hold locks already, and whoever
-- has one of these rows is about to try it.
UPDATE campaign_stats.campaign_state
   SET retry_at = least(retry_at, clock_timestamp() + interval '60 seconds')
 WHERE campaign_id IN (SELECT campaign_id FROM campaign_stats.campaign_state
                        WHERE campaign_id = ANY ($1::uuid[]) AND failures > 0 FOR UPDATE SKIP LOCKED)
