-- How long the world waited for what is published: two columns that an older version leaves empty and does not read.
ALTER TABLE campaign_stats.outbox
    ADD COLUMN IF NOT EXISTS since timestamptz, -- when the oldest hint or request that led to it was written to Kafka; null: the sweep
    ADD COLUMN IF NOT EXISTS fact text;         -- news, answer or pause
