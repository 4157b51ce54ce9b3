-- What waits in tables, for metrics; one row. Ages in seconds, 0 when nothing waits. `deferred`: reason -> rows.
SELECT (SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NULL) AS outbox_rows,
       (SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NOT NULL) AS set_aside_rows,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(written_at)) FROM campaign_stats.outbox
                  WHERE set_aside_at IS NULL), 0)::float8 AS outbox_age_s,
       coalesce((SELECT jsonb_object_agg(reason, rows) FROM (
                   SELECT reason, count(*) AS rows FROM campaign_stats.deferred GROUP BY reason) AS r), '{}') AS deferred,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(first_written)) FROM campaign_stats.deferred), 0)::float8
           AS deferred_age_s,
       (SELECT count(*) FROM campaign_stats.campaign_state s WHERE failures > 0
           AND EXISTS (SELECT 1 FROM public.campaigns c WHERE c.id = s.campaign_id)) AS failing_campaigns
