-- A type of event whose topic is missing or closed to us is held back: the relay reads past its rows, however many.
-- `id + 0`, in the query too: else the planner, which cannot know where in a queue the held rows are, may walk through
-- all of them by outbox_pending or the primary key.
CREATE INDEX outbox_by_type ON campaign_stats.outbox (type, shard, (id + 0)) WHERE set_aside_at IS NULL;
