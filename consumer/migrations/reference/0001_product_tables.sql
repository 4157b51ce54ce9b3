-- The product's tables and functions as this service expects to find them.
-- For demos, tests and benchmarks (`migrate --reference-schema`); in production the product owns them.

CREATE TABLE IF NOT EXISTS public.campaigns (
    id                   uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id              uuid NOT NULL,
    type                 text NOT NULL CHECK (type IN ('email', 'linkedin')),
    name                 text NOT NULL,
    status               text NOT NULL DEFAULT 'draft'
                         CHECK (status IN ('draft', 'launching', 'active', 'paused', 'completed')),
    daily_limit          integer,
    stop_on_reply        boolean NOT NULL DEFAULT true,
    open_tracking        boolean NOT NULL DEFAULT false,
    signature            text,
    skip_other_campaigns jsonb,
    operating_hours      jsonb,
    stats                jsonb NOT NULL DEFAULT '{}',
    last_synced_at       timestamptz,
    pause_reason         text,
    created_at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at           timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE IF NOT EXISTS public.campaign_prospects (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    campaign_id   uuid NOT NULL REFERENCES public.campaigns (id) ON DELETE CASCADE,
    user_id       uuid NOT NULL,
    status        text NOT NULL DEFAULT 'pending',   -- open list: a status nobody knows yet is no error
    email         text,
    linkedin_url  text,
    first_name    text,
    last_name     text,
    name          text,
    company       text,
    position      text,
    headline      text,
    custom_fields jsonb,
    source        text,
    source_ref    text,
    contacted_at  timestamptz,
    bounced_at    timestamptz,
    replied_at    timestamptz,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE IF NOT EXISTS public.accounts (
    id                  uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id             uuid NOT NULL,
    type                text NOT NULL,
    email_address       text,
    provider_account_id text,
    display_name        text,
    first_name          text,
    last_name           text,
    status              text NOT NULL DEFAULT 'active',
    daily_limit         integer
);

CREATE TABLE IF NOT EXISTS public.campaign_sender_accounts (
    campaign_id uuid NOT NULL REFERENCES public.campaigns (id) ON DELETE CASCADE,
    account_id  uuid NOT NULL REFERENCES public.accounts (id) ON DELETE CASCADE,
    PRIMARY KEY (campaign_id, account_id)
);

-- The product's engine moves every prospect with this: status and counter in one transaction,
-- the counter incremented under the campaign's row lock. `total` is counted as the sum of all rows.
DO $do$ BEGIN
IF to_regprocedure('public.update_prospect_with_stat(uuid, text)') IS NULL THEN
CREATE FUNCTION public.update_prospect_with_stat(prospect uuid, new_status text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    moved      public.campaign_prospects;
    old_status text;
    counted    constant text[] := ARRAY['sent', 'replied', 'bounced', 'completed', 'timed_out',
                                        'connection_sent', 'connected', 'message_sent'];
    stored     jsonb;
BEGIN
    SELECT * INTO moved FROM public.campaign_prospects WHERE id = prospect FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'prospect % does not exist', prospect USING ERRCODE = 'no_data_found';
    END IF;
    old_status := moved.status;
    IF old_status = new_status THEN
        RETURN;
    END IF;
    UPDATE public.campaign_prospects
       SET status = new_status,
           bounced_at = CASE WHEN new_status = 'bounced' THEN clock_timestamp() ELSE bounced_at END,
           replied_at = CASE WHEN new_status = 'replied' THEN clock_timestamp() ELSE replied_at END,
           updated_at = clock_timestamp()
     WHERE id = prospect;
    SELECT stats INTO stored FROM public.campaigns WHERE id = moved.campaign_id FOR NO KEY UPDATE;
    IF jsonb_typeof(stored) IS DISTINCT FROM 'object' THEN
        stored := '{}';
    END IF;
    IF old_status = ANY (counted) AND jsonb_typeof(stored -> old_status) = 'number' THEN
        stored := jsonb_set(stored, ARRAY[old_status],
                            to_jsonb(greatest((stored ->> old_status)::numeric - 1, 0)));
    END IF;
    IF new_status = ANY (counted) THEN
        stored := jsonb_set(stored, ARRAY[new_status], to_jsonb(
            CASE WHEN jsonb_typeof(stored -> new_status) = 'number'
                 THEN (stored ->> new_status)::numeric + 1 ELSE 1 END));
    END IF;
    UPDATE public.campaigns SET stats = stored, updated_at = clock_timestamp() WHERE id = moved.campaign_id;
END $$;
END IF;
END $do$;

-- The product's own recount of one campaign, in the product's own schema (ours lives in campaign_stats).
DO $do$ BEGIN
IF to_regprocedure('public.recalculate_campaign_stats(uuid)') IS NULL THEN
CREATE FUNCTION public.recalculate_campaign_stats(campaign uuid) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    counts jsonb;
BEGIN
    PERFORM 1 FROM public.campaigns WHERE id = campaign FOR NO KEY UPDATE;
    SELECT jsonb_build_object(
               'total', count(*),
               'sent', count(*) FILTER (WHERE status = 'sent'),
               'replied', count(*) FILTER (WHERE status = 'replied'),
               'bounced', count(*) FILTER (WHERE status = 'bounced'),
               'completed', count(*) FILTER (WHERE status = 'completed'),
               'timed_out', count(*) FILTER (WHERE status = 'timed_out'),
               'connection_sent', count(*) FILTER (WHERE status = 'connection_sent'),
               'connected', count(*) FILTER (WHERE status = 'connected'),
               'message_sent', count(*) FILTER (WHERE status = 'message_sent'))
      INTO counts
      FROM public.campaign_prospects WHERE campaign_id = campaign;
    UPDATE public.campaigns SET stats = counts, last_synced_at = clock_timestamp() WHERE id = campaign;
    RETURN counts;
END $$;
END IF;
END $do$;
