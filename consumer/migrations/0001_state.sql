-- Everything this service keeps for itself. No foreign keys to the product's tables: audit outlives a campaign,
-- and an insert of ours never locks a row of theirs.

CREATE TABLE campaign_stats.campaign_state (
    campaign_id      uuid PRIMARY KEY,
    version          bigint NOT NULL DEFAULT 0,      -- microseconds since 1970 or previous + 1, whichever is greater
    published_counts jsonb,                          -- status -> count as last published; null = never published
    published_status text,
    guard_paused_at  timestamptz,                    -- the guard's window holds only prospects contacted later
    observed_trip    boolean NOT NULL DEFAULT false, -- mode `observe`: the last verdict written was `trip`
    last_total       bigint,                         -- prospects at the last recount; sizes chunks
    next_recount_at  timestamptz,                    -- cool-down of a huge campaign
    failures         integer NOT NULL DEFAULT 0,     -- > 0: a failing campaign; only the deferred worker tries it
    retry_at         timestamptz,
    touched_at       timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

-- Events that must be published. A row is there until its event was acknowledged.
CREATE TABLE campaign_stats.outbox (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    shard        smallint NOT NULL,                  -- crc32(campaign id bytes) % 32, fixed for ever
    campaign_id  uuid NOT NULL,                      -- Kafka key
    type         text NOT NULL,                      -- event type; the topic follows from it and the prefix
    event        bytea NOT NULL,                     -- structured-mode CloudEvent as it goes out
    written_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    set_aside_at timestamptz,                        -- can never be sent (too large, invalid)
    error        text
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);
CREATE INDEX outbox_pending ON campaign_stats.outbox (shard, id) WHERE set_aside_at IS NULL;
CREATE INDEX outbox_set_aside ON campaign_stats.outbox (set_aside_at) WHERE set_aside_at IS NOT NULL;

CREATE TABLE campaign_stats.outbox_shards (shard smallint PRIMARY KEY);
INSERT INTO campaign_stats.outbox_shards SELECT generate_series(0, 31);

-- Recounts that could not be done at once. Append-only: a hint that comes meanwhile is a new row.
CREATE TABLE campaign_stats.deferred (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    campaign_id   uuid NOT NULL,
    reason        text NOT NULL,                     -- locked, huge, alone, failing, guard, sweep
    not_before    timestamptz NOT NULL,
    tries         integer NOT NULL DEFAULT 0,
    first_written timestamptz NOT NULL DEFAULT clock_timestamp(),
    trigger       text NOT NULL,                     -- sync_requested, status_changed, reconciliation
    hint          jsonb,                             -- ids of the last status hint
    seen          jsonb,                             -- what the sweep saw: {"last_synced_at": text|null, "drift": bool}
    requests      jsonb NOT NULL DEFAULT '[]'        -- sync requests waiting for an answer
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);
CREATE INDEX deferred_due ON campaign_stats.deferred ((reason = 'sweep'), not_before, id);
CREATE INDEX deferred_campaign ON campaign_stats.deferred (campaign_id);

-- Why the guard paused (or, in mode `observe`, would have paused): the integers it compared and where limits came from.
CREATE TABLE campaign_stats.guard_decisions (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    campaign_id    uuid NOT NULL,
    decided_at     timestamptz NOT NULL,
    mode           text NOT NULL,
    verdict        text NOT NULL,
    paused         boolean NOT NULL,
    version        bigint,                           -- of the pause; null when nothing was paused
    sent           integer NOT NULL,
    bounced        integer NOT NULL,
    rate_bp        integer NOT NULL,
    threshold_bp   integer NOT NULL,
    min_sent       integer NOT NULL,
    window_size    integer NOT NULL,
    limits_from    jsonb NOT NULL,                   -- field -> default | user | campaign
    opened_at      timestamptz,                      -- the pause that closed the window before; null = since the beginning
    oldest_contact timestamptz,
    newest_contact timestamptz
);
CREATE INDEX guard_decisions_campaign ON campaign_stats.guard_decisions (campaign_id, id DESC);
CREATE INDEX guard_decisions_time ON campaign_stats.guard_decisions (decided_at);

-- For operators: limits of one campaign or of one user; null = the next level (campaign > user > default).
CREATE TABLE campaign_stats.guard_limits (
    scope        text NOT NULL CHECK (scope IN ('campaign', 'user')),
    id           uuid NOT NULL,
    mode         text,
    threshold_bp integer,
    min_sent     integer,
    window_size  integer,
    PRIMARY KEY (scope, id)
);

-- Where the sweep is; its row lock lets one replica sweep at a time.
CREATE TABLE campaign_stats.sweep (
    only_row     boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    after_id     uuid,                               -- the last campaign looked at; null = a lap begins
    due_at       timestamptz NOT NULL DEFAULT '-infinity',
    lap_started  timestamptz,
    lap_finished timestamptz
);
INSERT INTO campaign_stats.sweep DEFAULT VALUES;

-- Dead letters that were sent back to their topic.
CREATE TABLE campaign_stats.redriven (
    topic       text NOT NULL,
    partition   integer NOT NULL,
    "offset"    bigint NOT NULL,
    redriven_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (topic, partition, "offset")
);
