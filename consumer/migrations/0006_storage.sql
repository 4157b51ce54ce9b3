-- Room for updates in place, and a visibility map that is never far behind: a stale one costs a recount 2-7x (design,
-- section 5), more than any tweak of the query. Each statement takes a SHARE UPDATE EXCLUSIVE lock for an instant.
ALTER TABLE public.campaigns SET (fillfactor = 70);
ALTER TABLE public.campaign_prospects SET (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);
