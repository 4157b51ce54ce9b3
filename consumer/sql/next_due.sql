-- Seconds until the next deferred row is due, those of the sweep last: one row, or none when nothing is deferred.
SELECT extract(epoch FROM not_before - clock_timestamp())::float8
  FROM campaign_stats.deferred ORDER BY (reason = 'sweep'), not_before, id LIMIT 1
