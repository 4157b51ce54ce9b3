-- The latest pauses, which the status page shows: in mode `observe` nearly all decisions are none.
CREATE INDEX IF NOT EXISTS guard_decisions_paused ON campaign_stats.guard_decisions (decided_at) WHERE paused;
