-- Campaigns whose version lies more than $1 float8 seconds in the future of the database's clock, and how far at most.
-- One row. No locks; reads campaign_state once.
SELECT count(*) AS campaigns, max(s.version) / 1e6 - extract(epoch FROM clock.now) AS ahead_s
  FROM (SELECT clock_timestamp() AS now) AS clock
  JOIN campaign_stats.campaign_state s ON s.version / 1e6 > extract(epoch FROM clock.now) + $1::float8
 GROUP BY clock.now
