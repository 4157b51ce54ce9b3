-- The truth about campaigns and how it is written down.

CREATE FUNCTION campaign_stats.count_prospects(campaign uuid)
RETURNS TABLE (counts jsonb, stats jsonb, total bigint)
-- Counts one campaign from its rows: status -> count without zeros, `stats` as stored, number of rows. Always one row.
-- Groups first and pivots the few groups afterwards; relies on index (campaign_id, status). The planner inlines it.
LANGUAGE sql STABLE AS $$
    SELECT coalesce(jsonb_object_agg(grouped.status, grouped.prospects), '{}'),
           jsonb_build_object(
               'total', coalesce(sum(grouped.prospects), 0)::bigint,
               'sent', coalesce(max(grouped.prospects) FILTER (WHERE grouped.status = 'sent'), 0),
               'replied', coalesce(max(grouped.prospects) FILTER (WHERE grouped.status = 'replied'), 0),
               'bounced', coalesce(max(grouped.prospects) FILTER (WHERE grouped.status = 'bounced'), 0))
           || coalesce(jsonb_object_agg(grouped.status, grouped.prospects) FILTER (WHERE grouped.status IN
               ('completed', 'timed_out', 'connection_sent', 'connected', 'message_sent')), '{}'),
           coalesce(sum(grouped.prospects), 0)::bigint
      FROM (SELECT coalesce(p.status, '(null)') AS status, count(*) AS prospects
              FROM public.campaign_prospects p
             WHERE p.campaign_id = campaign
             GROUP BY p.status) AS grouped
$$;

CREATE FUNCTION campaign_stats.stat(stats jsonb, key text) RETURNS bigint
-- The integer stored under `key`; 0 for anything else that may stand there after a manual edit.
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN jsonb_typeof(stats -> key) = 'number' THEN
               CASE WHEN (stats ->> key)::numeric BETWEEN -9007199254740991 AND 9007199254740991
                         AND (stats ->> key)::numeric = trunc((stats ->> key)::numeric)
                    THEN (stats ->> key)::numeric::bigint ELSE 0 END
           ELSE 0 END
$$;

CREATE FUNCTION campaign_stats.drift(stored jsonb, truth jsonb) RETURNS jsonb
-- Truth minus stored, only keys that differ: '{}' when the stored numbers are right. Absent and unusable count as 0.
-- Callers compare first: it cannot be inlined, and calling it for every campaign costs a recount 1.4x (measured).
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_object_agg(compared.key, compared.difference) FILTER (WHERE compared.difference <> 0), '{}')
      FROM (SELECT k.key, campaign_stats.stat(truth, k.key) - campaign_stats.stat(stored, k.key) AS difference
              FROM unnest(ARRAY['total', 'sent', 'replied', 'bounced', 'completed', 'timed_out',
                                'connection_sent', 'connected', 'message_sent']) AS k (key)) AS compared
$$;

CREATE FUNCTION campaign_stats.holdable(campaign_ids uuid[], caller text, huge_from bigint, chunk_budget bigint)
RETURNS TABLE (id uuid, held text, retry_at timestamptz, failures integer, user_id uuid)
-- The campaigns among `campaign_ids` that exist, and what the caller must leave them for (null: nothing).
LANGUAGE sql STABLE AS $$
    SELECT c.id,
           CASE WHEN caller = 'door' THEN NULL
                WHEN s.failures > 0 AND (caller = 'chunk' OR s.retry_at > clock_timestamp()) THEN 'failing'
                WHEN s.last_total > huge_from AND (caller = 'chunk' OR s.next_recount_at > clock_timestamp()) THEN 'huge'
                WHEN caller = 'chunk' AND chunk_budget <= coalesce(sum(s.last_total) FILTER (
                         WHERE s.failures = 0 AND s.last_total <= huge_from)
                         OVER (ORDER BY wanted.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) THEN 'later'
           END,
           CASE WHEN s.failures > 0 THEN s.retry_at ELSE s.next_recount_at END, s.failures, c.user_id
      FROM unnest(campaign_ids) WITH ORDINALITY AS wanted (id, place)
      JOIN public.campaigns c ON c.id = wanted.id
      LEFT JOIN campaign_stats.campaign_state s ON s.campaign_id = wanted.id
$$;

-- The recount (design, section 5). `caller` says how patient it is:
--   chunk   leaves out failing and huge campaigns and what is beyond the budget: nothing may hold up a chunk
--   worker  (one campaign) tries a failing or huge one once it is due
--   door    (one campaign) tries it at once: somebody waits on the line
-- One row per campaign that exists, in no order. `held` is null when it was recounted, else why it was not: locked
-- (somebody has its row), failing or huge (not before `retry_at`), later (the chunk is full); then only campaign_id,
-- retry_at, failures and user_id are set.
-- Never waits for a campaign's lock. The locks it takes (FOR NO KEY UPDATE) stay until the caller's transaction ends.
CREATE FUNCTION campaign_stats.recalculate_campaign_stats(campaign_ids uuid[], caller text DEFAULT 'chunk')
RETURNS TABLE (
    campaign_id uuid, held text, retry_at timestamptz, failures integer, user_id uuid,
    counts jsonb, drift jsonb, synced_before timestamptz, counted_at timestamptz,
    type text, name text, status text, daily_limit integer, stop_on_reply boolean, open_tracking boolean,
    skip_other_campaigns jsonb, stats jsonb, last_synced_at timestamptz, pause_reason text,
    created_at timestamptz, updated_at timestamptz,
    version bigint, published_counts jsonb, published_status text, guard_paused_at timestamptz,
    observed_trip boolean, last_total bigint, user_limits jsonb, campaign_limits jsonb)
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    huge_from    CONSTANT bigint := 20000;   -- prospects; about 10 ms of counting that its neighbours would wait for
    chunk_budget CONSTANT bigint := 300000;  -- prospects; about 0.1 s of counting under locks
    mine    uuid[];
    stamp   timestamptz;
BEGIN
    -- Statement 1: lock what can be had at once.
    mine := ARRAY(
        SELECT c.id
          FROM public.campaigns c
         WHERE c.id IN (SELECT h.id FROM campaign_stats.holdable(campaign_ids, caller, huge_from, chunk_budget) h
                         WHERE h.held IS NULL)
         ORDER BY c.id
           FOR NO KEY UPDATE OF c SKIP LOCKED);
    stamp := clock_timestamp();

    -- Statement 2: its snapshot is taken now, after the locks, so nothing committed before them is missed.
    RETURN QUERY
    WITH written AS (
        UPDATE public.campaigns c
           SET stats = n.stats,
               last_synced_at = greatest(c.last_synced_at, stamp),
               updated_at = CASE WHEN n.drift <> '{}' THEN stamp ELSE c.updated_at END
          FROM (SELECT b.id, b.last_synced_at AS synced_before, t.counts, t.stats,
                       CASE WHEN b.stats = t.stats THEN '{}' ELSE campaign_stats.drift(b.stats, t.stats) END AS drift
                  FROM public.campaigns b
                 CROSS JOIN LATERAL campaign_stats.count_prospects(b.id) AS t
                 WHERE b.id = ANY (mine)) AS n
         WHERE c.id = n.id
        RETURNING c.id, c.user_id, n.counts, n.drift, n.synced_before,
                  c.type, c.name, c.status, c.daily_limit, c.stop_on_reply, c.open_tracking,
                  c.skip_other_campaigns, c.stats, c.last_synced_at, c.pause_reason, c.created_at, c.updated_at
    )
    SELECT w.id, NULL::text, NULL::timestamptz, coalesce(s.failures, 0), w.user_id,
           w.counts, w.drift, w.synced_before, stamp,
           w.type, w.name, w.status, w.daily_limit, w.stop_on_reply, w.open_tracking,
           w.skip_other_campaigns, w.stats, w.last_synced_at, w.pause_reason, w.created_at, w.updated_at,
           coalesce(s.version, 0), s.published_counts, s.published_status, s.guard_paused_at,
           coalesce(s.observed_trip, false), s.last_total,
           (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'user' AND l.id = w.user_id),
           (SELECT to_jsonb(l) FROM campaign_stats.guard_limits l WHERE l.scope = 'campaign' AND l.id = w.id)
      FROM written w
      LEFT JOIN campaign_stats.campaign_state s ON s.campaign_id = w.id;

    IF cardinality(mine) < cardinality(campaign_ids) THEN
        RETURN QUERY
        SELECT h.id, coalesce(h.held, 'locked'), h.retry_at, coalesce(h.failures, 0), h.user_id,
               NULL::jsonb, NULL::jsonb, NULL::timestamptz, stamp,
               NULL::text, NULL::text, NULL::text, NULL::integer, NULL::boolean, NULL::boolean,
               NULL::jsonb, NULL::jsonb, NULL::timestamptz, NULL::text, NULL::timestamptz, NULL::timestamptz,
               NULL::bigint, NULL::jsonb, NULL::text, NULL::timestamptz,
               NULL::boolean, NULL::bigint, NULL::jsonb, NULL::jsonb
          FROM campaign_stats.holdable(campaign_ids, caller, huge_from, chunk_budget) h
         WHERE h.id <> ALL (mine);
    END IF;
END $$;
