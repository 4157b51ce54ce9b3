-- Shards with something to publish that no other relay holds; smallint rows, locked until the transaction ends.
SELECT s.shard
  FROM campaign_stats.outbox_shards s
 WHERE EXISTS (SELECT 1 FROM campaign_stats.outbox o WHERE o.shard = s.shard AND o.set_aside_at IS NULL)
   FOR UPDATE SKIP LOCKED
