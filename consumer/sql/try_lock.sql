-- Take the lock of the command $1 text until the transaction ends; one row: whether it was free. Never waits: a session
-- that waits for an advisory lock holds up CREATE INDEX CONCURRENTLY.
SELECT pg_try_advisory_xact_lock(hashtextextended('campaign_stats ' || $1, 0))
