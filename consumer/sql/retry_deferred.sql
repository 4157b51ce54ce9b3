-- Make deferred rows due now: a page of $4 int rows after id $3 bigint, of the campaigns $1 uuid[] and the reason $2 text
-- (null = any). A failing campaign's wait and a huge one's cool-down end too, or its rows would only go back.
-- One row per deferred row of the page, in id order. Waits for nobody: what a worker holds is being tried now.
WITH page AS (
    SELECT d.id, d.campaign_id
      FROM campaign_stats.deferred d
     WHERE d.id > $3 AND ($1::uuid[] IS NULL OR d.campaign_id = ANY ($1)) AND ($2::text IS NULL OR d.reason = $2)
     ORDER BY d.id LIMIT $4
), state AS (
    UPDATE campaign_stats.campaign_state
       SET retry_at = least(retry_at, clock_timestamp()), next_recount_at = least(next_recount_at, clock_timestamp())
     WHERE campaign_id IN (SELECT s.campaign_id FROM campaign_stats.campaign_state s
                            WHERE s.campaign_id IN (SELECT campaign_id FROM page)
                              AND greatest(s.retry_at, s.next_recount_at) > clock_timestamp()
                              FOR UPDATE SKIP LOCKED)
), due AS (
    UPDATE campaign_stats.deferred
       SET not_before = clock_timestamp()
     WHERE id IN (SELECT d.id FROM campaign_stats.deferred d
                   WHERE d.id IN (SELECT id FROM page) AND d.not_before > clock_timestamp()
                     FOR UPDATE SKIP LOCKED)
)
SELECT id, campaign_id FROM page ORDER BY id
