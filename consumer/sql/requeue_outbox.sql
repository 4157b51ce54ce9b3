-- Let the relay try again: up to $3 int rows after id $2 bigint that were set aside, of the ids $1 bigint[] (null = any).
-- Their ids, one a row. Rows are locked in id order, so that two of these never deadlock; the second finds nothing to do.
UPDATE campaign_stats.outbox
   SET set_aside_at = NULL, error = NULL
 WHERE id IN (SELECT id FROM campaign_stats.outbox
               WHERE set_aside_at IS NOT NULL AND id > $2 AND ($1::bigint[] IS NULL OR id = ANY ($1))
               ORDER BY id LIMIT $3 FOR UPDATE)
RETURNING id
