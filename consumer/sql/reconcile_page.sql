-- The $2 campaigns from $1 uuid on, in id order; one id a row. No locks. A plain comparison, so that every plan of it
-- begins in the index where the page begins.
SELECT id FROM public.campaigns WHERE id >= $1 ORDER BY id LIMIT $2
