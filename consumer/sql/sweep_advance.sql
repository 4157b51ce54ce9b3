-- The page is done: go on after $1 uuid, or, when it is null, begin the next lap in $2 float8 seconds.
UPDATE campaign_stats.sweep
   SET after_id = $1,
       due_at = CASE WHEN $1::uuid IS NULL THEN clock_timestamp() + make_interval(secs => $2) ELSE due_at END,
       lap_started = CASE WHEN after_id IS NULL THEN clock_timestamp() ELSE lap_started END,
       lap_finished = CASE WHEN $1::uuid IS NULL THEN clock_timestamp() ELSE lap_finished END
