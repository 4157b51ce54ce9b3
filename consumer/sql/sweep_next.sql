-- The campaign after $1 uuid (null = the first) in id order, uncompared; its id, no row where there is none. No locks.
-- Begins in the primary key where it begins, as sweep_page does.
SELECT id
  FROM public.campaigns
 WHERE id >= coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') AND id IS DISTINCT FROM $1::uuid
 ORDER BY id LIMIT 1
