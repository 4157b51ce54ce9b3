-- Defer the campaigns $1 uuid[] (those that exist) for $2 float8 seconds and count them as never published; one row: how
-- many. Locks their state rows, in id order: few at a time, because recounts wait for them.
WITH chosen AS (
    SELECT id FROM public.campaigns WHERE id = ANY ($1::uuid[])
), forgotten AS (
    UPDATE campaign_stats.campaign_state s SET published_counts = NULL, published_status = NULL
      FROM (SELECT s.campaign_id FROM campaign_stats.campaign_state s JOIN chosen ON chosen.id = s.campaign_id
             ORDER BY s.campaign_id FOR UPDATE OF s) AS known
     WHERE s.campaign_id = known.campaign_id
), deferred AS (
    INSERT INTO campaign_stats.deferred (campaign_id, reason, not_before, trigger)
    SELECT id, 'sweep', clock_timestamp() + make_interval(secs => $2), 'reconciliation' FROM chosen
    RETURNING 1
)
SELECT count(*) FROM deferred
