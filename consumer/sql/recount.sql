-- Lock, recount and write the campaigns $1 uuid[]; $2 text: chunk, worker or door (how patient).
-- One row per campaign that exists, recounted or held. Locks (FOR NO KEY UPDATE) last until the transaction ends.
SELECT * FROM campaign_stats.recalculate_campaign_stats($1, $2)
