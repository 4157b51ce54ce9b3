-- Two queues that are empty most of the time keep their pages. Plans made for a table without a page read all of it, for as
-- long as a session keeps them: an idle turn of the relay looked at 866 blocks (median over an hour), with this at 129. And
-- giving pages back takes a lock that holds up everybody.
ALTER TABLE campaign_stats.outbox SET (vacuum_truncate = false);
ALTER TABLE campaign_stats.deferred SET (vacuum_truncate = false);
