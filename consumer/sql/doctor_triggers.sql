-- Row triggers that run before a write of the product's table $1 text: one row each, by name. No locks.
-- `assigns`: which of contacted_at and updated_at its function sets, as far as its text (or that of contrib's moddatetime)
-- shows. `fires`: not disabled. `fires_on_recount`: on an update of what a recount writes, unless its condition looks at
-- last_synced_at, as `doctor` advises.
SELECT t.tgname AS name, quote_ident(t.tgname) AS quoted, quote_ident(t.tgname || '_update') AS quoted_for_update,
       p.oid::regprocedure::text AS function, pg_get_triggerdef(t.oid) AS definition,
       t.tgenabled IN ('O', 'A') AS fires,
       t.tgtype & 16 > 0
           AND (cardinality(t.tgattr::smallint[]) = 0
                OR EXISTS (SELECT FROM pg_attribute a
                            WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (t.tgattr::smallint[])
                              AND a.attname IN ('stats', 'last_synced_at', 'updated_at')))
           AND NOT coalesce(pg_get_triggerdef(t.oid) ~ ' WHEN \(.*last_synced_at', false) AS fires_on_recount,
       ARRAY(SELECT c FROM unnest(ARRAY['contacted_at', 'updated_at']) AS c
              WHERE p.prosrc ~* ('new\."?' || c || '"?\s*:?=') OR encode(t.tgargs, 'escape') ~ c) AS assigns
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_class r ON r.oid = t.tgrelid
 WHERE r.relnamespace = 'public'::regnamespace AND r.relname = $1 AND NOT t.tgisinternal
   AND t.tgtype & 3 = 3 -- 1: for each row, 2: before
 ORDER BY t.tgname
