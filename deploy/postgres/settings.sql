-- A choice, not a need: by its owner, on the product's largest table, after `campaign-stats migrate`.
--
-- `migrate` lets autovacuum visit campaign_prospects at 2 % dead rows (migration 0006). At 0.5 % a recount counts a campaign
-- from 8 blocks instead of 17 and takes a fifth less time, because the visibility map is fresher; for it that table is
-- vacuumed three times as often (tests/benchmarks/performance.md, "An hour of load"). It pays where recounts are many beside
-- the changes, and the server has I/O to spare: look at `vacuums` in pg_stat_user_tables before and after.
--
-- The cost limit lets such a vacuum of a large table end soon: at PostgreSQL's own (200, 2 ms) one of 100 GB takes hours, and
-- until it has ended the map is as stale as before. 2 000 is ten times that; not measured here.
--
-- Back: the same with RESET, then 0.02 / 0.02 as consumer/migrations/0006_storage.sql has it.
-- A partitioned table has no storage of its own, so each of its partitions gets them.
DO $$
DECLARE
    leaf regclass;
BEGIN
    FOR leaf IN SELECT relid FROM pg_partition_tree('public.campaign_prospects') WHERE isleaf
                UNION SELECT oid FROM pg_class WHERE oid = to_regclass('public.campaign_prospects') AND relkind = 'r' LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_vacuum_scale_factor = 0.005,'
                       ' autovacuum_vacuum_insert_scale_factor = 0.005, autovacuum_vacuum_cost_limit = 2000)', leaf);
    END LOOP;
END $$;
