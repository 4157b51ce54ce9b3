-- Only where CAMPAIGN_STATS_API_TOKENS opens the sync-stats door, which shows a campaign's senders
-- (consumer/migrations/__init__.py, API_RIGHTS). After roles.sql.
GRANT SELECT (id, type, email_address, display_name, status, daily_limit) ON public.accounts TO campaign_stats_run;
GRANT SELECT (campaign_id, account_id) ON public.campaign_sender_accounts TO campaign_stats_run;
