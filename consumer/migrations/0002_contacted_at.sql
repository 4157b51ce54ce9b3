-- `contacted_at`: when a prospect was mailed first. The guard's window is ordered by it.
-- The trigger stands on the product's table but reads nothing of ours, and PostgreSQL checks the right to a trigger
-- function only when the trigger is made: the product's role needs no right in this schema.
-- A supplied time is kept, but never lies in the future; a contact that was made once stays made.

CREATE FUNCTION campaign_stats.stamp_contacted_at() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.contacted_at IS NULL THEN
        IF NEW.status IN ('sent', 'replied', 'bounced', 'completed', 'timed_out') THEN
            NEW.contacted_at := clock_timestamp();
        END IF;
    ELSIF NEW.contacted_at > clock_timestamp() THEN
        NEW.contacted_at := clock_timestamp();
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER campaign_stats_contacted_at_insert
    BEFORE INSERT ON public.campaign_prospects
    FOR EACH ROW EXECUTE FUNCTION campaign_stats.stamp_contacted_at();

CREATE TRIGGER campaign_stats_contacted_at_update
    BEFORE UPDATE OF status ON public.campaign_prospects
    FOR EACH ROW
    WHEN (OLD.status IS NULL OR OLD.status NOT IN ('sent', 'replied', 'bounced', 'completed', 'timed_out'))
    EXECUTE FUNCTION campaign_stats.stamp_contacted_at();
