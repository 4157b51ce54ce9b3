-- Which of the originals $1 text[] topic, $2 int[] partition, $3 bigint[] offset were sent back before, and when last.
SELECT r.topic, r.partition, r."offset", r.redriven_at
  FROM unnest($1::text[], $2::int[], $3::bigint[]) AS asked (topic, partition, "offset")
  JOIN campaign_stats.redriven r USING (topic, partition, "offset")
