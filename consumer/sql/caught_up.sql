-- For `run --until-caught-up`; one row: deferred rows first written until $1 timestamptz that are neither the sweep's nor of
-- failing campaigns, and outbox rows up to id $2 bigint that are still to be published.
SELECT (SELECT count(*) FROM campaign_stats.deferred d
         WHERE d.first_written <= $1 AND d.reason NOT IN ('sweep', 'failing')
           AND NOT EXISTS (SELECT 1 FROM campaign_stats.campaign_state s
                            WHERE s.campaign_id = d.campaign_id AND s.failures > 0)) AS deferred,
       (SELECT count(*) FROM campaign_stats.outbox o WHERE o.id <= $2 AND o.set_aside_at IS NULL) AS unpublished
