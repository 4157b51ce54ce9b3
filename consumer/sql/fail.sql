-- The recount of campaign $1 uuid failed once more. One row: failures in a row, owner (null when the campaign is gone),
-- the clock. The caller took its deferred rows in the same transaction.
INSERT INTO campaign_stats.campaign_state AS s (campaign_id, failures, retry_at)
VALUES ($1, 1, clock_timestamp() + interval '1 second')
ON CONFLICT (campaign_id) DO UPDATE
   SET failures = s.failures + 1,
       retry_at = clock_timestamp() + make_interval(secs => least(3600, 2.0 ^ least(s.failures, 12))),
       touched_at = clock_timestamp()
RETURNING failures, (SELECT user_id FROM public.campaigns WHERE id = $1) AS user_id, clock_timestamp() AS now
