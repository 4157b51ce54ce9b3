-- What the sync-stats door tells about campaign $1 uuid besides its counts; one row, none when it is gone.
-- The caller's recount holds the campaign's row. `sender_accounts`: jsonb array in id order.
-- jsonb of the product comes as text: it holds what no parser of ours takes.
SELECT c.id AS campaign_id, c.user_id, c.type, c.name, c.status, c.daily_limit, c.stop_on_reply, c.open_tracking,
       c.signature, c.skip_other_campaigns::text, c.operating_hours::text, c.stats, c.last_synced_at, c.pause_reason,
       c.created_at, c.updated_at,
       (SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'id', a.id, 'type', a.type, 'email_address', a.email_address, 'display_name', a.display_name,
                   'status', a.status, 'daily_limit', a.daily_limit) ORDER BY a.id), '[]')
          FROM public.campaign_sender_accounts s JOIN public.accounts a ON a.id = s.account_id
         WHERE s.campaign_id = c.id) AS sender_accounts
  FROM public.campaigns c
 WHERE c.id = $1
