-- Whether anything of the type $1 text is still to be published. Asked now and then while its topic is closed.
SELECT EXISTS (SELECT FROM campaign_stats.outbox WHERE type = $1 AND set_aside_at IS NULL)
