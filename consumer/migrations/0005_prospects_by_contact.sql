-- concurrently: campaign_prospects_by_contact
-- The guard's window: the latest contacted prospects of a campaign. Partial, so pending prospects cost nothing.
CREATE INDEX CONCURRENTLY IF NOT EXISTS campaign_prospects_by_contact
    ON public.campaign_prospects (campaign_id, contacted_at DESC NULLS LAST, id DESC)
    WHERE status IN ('sent', 'replied', 'bounced', 'completed', 'timed_out')
       OR (status = 'cancelled' AND contacted_at IS NOT NULL);
