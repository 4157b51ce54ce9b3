-- The originals $1 text[] topic, $2 int[] partition, $3 bigint[] offset (each once) were sent back now.
INSERT INTO campaign_stats.redriven (topic, partition, "offset")
SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[])
ON CONFLICT (topic, partition, "offset") DO UPDATE SET redriven_at = excluded.redriven_at
