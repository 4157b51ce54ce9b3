-- Save what followed from a recount, in one round trip. The caller holds the locks of the recounted campaigns.
-- State of $1 uuid[]: $2 bigint[] version, $3 jsonb[] and $4 text[] published counts and status (null = as before),
--   $5 timestamptz[] guard_paused_at, $6 boolean[] observed_trip, $7 bigint[] prospects, $8 float8[] cool-down in seconds
-- Outbox: $9 smallint[] shard, $10 uuid[] campaign, $11 text[] type, $12 bytea[] event, $15 timestamptz[] since, $16 text[] fact;
--   ids rise in this order
-- $13 jsonb guard decisions, $14 jsonb deferrals (arrays of objects)
WITH state AS (
    INSERT INTO campaign_stats.campaign_state AS s
           (campaign_id, version, published_counts, published_status, guard_paused_at, observed_trip, last_total,
            next_recount_at)
    SELECT n.campaign_id, n.version, n.counts, n.status, n.guard_paused_at, n.observed_trip, n.total,
           clock_timestamp() + make_interval(secs => n.cooldown_s)
      FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[], $4::text[], $5::timestamptz[], $6::boolean[], $7::bigint[],
                  $8::float8[])
           AS n (campaign_id, version, counts, status, guard_paused_at, observed_trip, total, cooldown_s)
     ORDER BY n.campaign_id  -- as everybody who locks several of these rows, else two could wait for each other
    ON CONFLICT (campaign_id) DO UPDATE
       SET version = excluded.version,
           published_counts = coalesce(excluded.published_counts, s.published_counts),
           published_status = coalesce(excluded.published_status, s.published_status),
           guard_paused_at = excluded.guard_paused_at,
           observed_trip = excluded.observed_trip,
           last_total = excluded.last_total,
           next_recount_at = excluded.next_recount_at,
           failures = 0,
           retry_at = NULL,
           touched_at = clock_timestamp()
), decisions AS (
    INSERT INTO campaign_stats.guard_decisions
           (campaign_id, decided_at, mode, verdict, paused, version, sent, bounced, rate_bp, threshold_bp, min_sent,
            window_size, limits_from, opened_at, oldest_contact, newest_contact)
    SELECT d.campaign_id, d.decided_at, d.mode, d.verdict, d.paused, d.version, d.sent, d.bounced, d.rate_bp,
           d.threshold_bp, d.min_sent, d.window_size, d.limits_from, d.opened_at, d.oldest_contact, d.newest_contact
      FROM jsonb_to_recordset($13::jsonb) AS d (
           campaign_id uuid, decided_at timestamptz, mode text, verdict text, paused boolean, version bigint, sent integer,
           bounced integer, rate_bp integer, threshold_bp integer, min_sent integer, window_size integer,
           limits_from jsonb, opened_at timestamptz, oldest_contact timestamptz, newest_contact timestamptz)
), outbox AS (
    INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event, since, fact)
    SELECT o.shard, o.campaign_id, o.type, o.event, o.since, o.fact
      FROM unnest($9::smallint[], $10::uuid[], $11::text[], $12::bytea[], $15::timestamptz[], $16::text[])
           WITH ORDINALITY AS o (shard, campaign_id, type, event, since, fact, place)
     ORDER BY o.place
)
INSERT INTO campaign_stats.deferred
       (campaign_id, reason, not_before, tries, first_written, trigger, hint, seen, requests)
SELECT d.campaign_id, d.reason, clock_timestamp() + make_interval(secs => d.delay_s), d.tries,
       coalesce(d.first_written, clock_timestamp()), d.trigger, d.hint, d.seen, d.requests
  FROM jsonb_to_recordset($14::jsonb) AS d (
       campaign_id uuid, reason text, delay_s float8, tries integer, first_written timestamptz, trigger text,
       hint jsonb, seen jsonb, requests jsonb)
