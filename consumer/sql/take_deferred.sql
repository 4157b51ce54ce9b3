-- Take all due rows of one campaign: the first that is due, those of the sweep last. Rows of deferred; none when nothing
-- is due or everything due is in other hands. Neither waits nor deadlocks; relies on index deferred_due. An array, not IN:
-- planned while the table was empty, IN would scan all of it for each row ever after.
DELETE FROM campaign_stats.deferred
 WHERE id = ANY (ARRAY(
       SELECT id FROM campaign_stats.deferred
        WHERE not_before <= now()
          AND campaign_id = (SELECT campaign_id FROM campaign_stats.deferred
                              WHERE not_before <= now()
                              ORDER BY (reason = 'sweep'), not_before, id LIMIT 1
                                FOR UPDATE SKIP LOCKED)
          FOR UPDATE SKIP LOCKED))
RETURNING id, campaign_id, reason, tries, first_written, trigger, hint, seen, requests
