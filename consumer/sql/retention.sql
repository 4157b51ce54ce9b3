-- Forget what is older than $1 int days: audit, set-aside events, redriven marks, state of campaigns that are gone.
-- One row: how many rows went.
WITH audit AS (
    DELETE FROM campaign_stats.guard_decisions WHERE decided_at < now() - make_interval(days => $1) RETURNING 1
), aside AS (
    DELETE FROM campaign_stats.outbox WHERE set_aside_at < now() - make_interval(days => $1) RETURNING 1
), redriven AS (
    DELETE FROM campaign_stats.redriven WHERE redriven_at < now() - make_interval(days => $1) RETURNING 1
), state AS (
    DELETE FROM campaign_stats.campaign_state s
     WHERE s.touched_at < now() - make_interval(days => $1)
       AND NOT EXISTS (SELECT 1 FROM public.campaigns c WHERE c.id = s.campaign_id)
    RETURNING 1
)
SELECT (SELECT count(*) FROM audit) + (SELECT count(*) FROM aside) + (SELECT count(*) FROM redriven)
       + (SELECT count(*) FROM state)
