-- The sweep's cursor when a page is due and nobody else sweeps; one row or none. Locked until the transaction ends.
SELECT after_id, lap_started FROM campaign_stats.sweep WHERE due_at <= clock_timestamp() FOR UPDATE SKIP LOCKED
