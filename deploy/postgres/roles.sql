-- Two roles and their rights, for the database this is run in. An administrator runs it before the first `migrate`, with
-- psql -f or anything else; it may run again at any time, and should when the product's tables got another owner.
--
-- campaign_stats_migrate  acts for the owner of the product's tables; used by `campaign-stats migrate` alone.
-- campaign_stats_run      what the service runs as. It sees no address and no name of a prospect, and writes five columns
--                         of `campaigns` (consumer/migrations/__init__.py, RUN_RIGHTS; `campaign-stats doctor` asks for
--                         the same).
--
-- They can log in once they have a password (psql: \password campaign_stats_run) or another way in pg_hba.conf.
-- With row security on those tables the service needs a policy, or: ALTER ROLE campaign_stats_run BYPASSRLS.
-- The last two statements are for the sync-stats door; where it stays closed leave them out, `doctor` then warns.
BEGIN;

DO $$
DECLARE
    maker name;
BEGIN
    IF to_regrole('campaign_stats_migrate') IS NULL THEN
        CREATE ROLE campaign_stats_migrate LOGIN;
    END IF;
    IF to_regrole('campaign_stats_run') IS NULL THEN
        CREATE ROLE campaign_stats_run LOGIN;
    END IF;

    -- Indexes and triggers on the product's tables are their owner's to make.
    FOR maker IN SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class
                  WHERE oid IN (to_regclass('public.campaigns'), to_regclass('public.campaign_prospects')) LOOP
        IF NOT pg_has_role('campaign_stats_migrate', maker, 'USAGE') THEN
            EXECUTE format('GRANT %I TO campaign_stats_migrate', maker);
        END IF;
    END LOOP;
    EXECUTE format('GRANT CONNECT, CREATE ON DATABASE %I TO campaign_stats_migrate', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO campaign_stats_run', current_database());

    -- Whoever makes our tables, now or in a later version: they are open to the service from the start.
    IF to_regnamespace('campaign_stats') IS NULL THEN
        CREATE SCHEMA campaign_stats AUTHORIZATION campaign_stats_migrate;
    END IF;
    FOR maker IN SELECT 'campaign_stats_migrate'
                 UNION SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'campaign_stats' LOOP
        EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA campaign_stats'
                       ' GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO campaign_stats_run', maker);
        EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA campaign_stats'
                       ' GRANT EXECUTE ON FUNCTIONS TO campaign_stats_run', maker);
    END LOOP;
END $$;

GRANT CREATE, USAGE ON SCHEMA public TO campaign_stats_migrate;  -- for two indexes
GRANT USAGE ON SCHEMA public TO campaign_stats_run;

GRANT SELECT (id, user_id, type, name, status, daily_limit, stop_on_reply, open_tracking, signature,
              skip_other_campaigns, operating_hours, stats, last_synced_at, pause_reason, created_at, updated_at)
    ON public.campaigns TO campaign_stats_run;
GRANT UPDATE (stats, last_synced_at, updated_at, status, pause_reason) ON public.campaigns TO campaign_stats_run;
GRANT SELECT (id, campaign_id, status, contacted_at) ON public.campaign_prospects TO campaign_stats_run;

GRANT USAGE ON SCHEMA campaign_stats TO campaign_stats_run;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA campaign_stats TO campaign_stats_run;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA campaign_stats TO campaign_stats_run;

-- Of our own tables only what some statement uses (OWN_RIGHTS): it reads what was migrated and who has other limits, and
-- writes neither. They exist after the first `migrate`: run this file again then. A table that a later version brings is open
-- at once, as said above, and down to its least with the next run of that version's file.
DO $$
DECLARE
    least record;
BEGIN
    FOR least IN SELECT * FROM (VALUES
        ('campaign_state', 'SELECT, INSERT, UPDATE, DELETE'),
        ('deferred', 'SELECT, INSERT, UPDATE, DELETE'),
        ('guard_decisions', 'SELECT, INSERT, DELETE'),
        ('guard_limits', 'SELECT'),
        ('migrations', 'SELECT'),
        ('outbox', 'SELECT, INSERT, UPDATE, DELETE'),
        ('outbox_shards', 'SELECT, UPDATE'),
        ('redriven', 'SELECT, INSERT, UPDATE, DELETE'),
        ('sweep', 'SELECT, UPDATE')) AS least (own, rights) LOOP
        IF to_regclass('campaign_stats.' || least.own) IS NOT NULL THEN
            EXECUTE format('REVOKE ALL ON campaign_stats.%I FROM campaign_stats_run', least.own);
            EXECUTE format('GRANT %s ON campaign_stats.%I TO campaign_stats_run', least.rights, least.own);
        END IF;
    END LOOP;
END $$;

-- Door: a campaign's senders (API_RIGHTS), where CAMPAIGN_STATS_API_TOKENS opens it.
GRANT SELECT (id, type, email_address, display_name, status, daily_limit) ON public.accounts TO campaign_stats_run;
GRANT SELECT (campaign_id, account_id) ON public.campaign_sender_accounts TO campaign_stats_run;

COMMIT;
