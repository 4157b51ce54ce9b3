-- Shards with something to publish that no other relay holds; smallint rows, locked until the transaction ends.
-- A scalar subquery, not EXISTS: the planner would turn that into a join that reads the whole backlog; this is 32 probes of
-- index outbox_pending.
SELECT s.shard
  FROM campaign_stats.outbox_shards s
 WHERE (SELECT o.id FROM campaign_stats.outbox o
         WHERE o.shard = s.shard AND o.set_aside_at IS NULL ORDER BY o.id LIMIT 1) IS NOT NULL
   FOR UPDATE OF s SKIP LOCKED
