"""campaign-stats: keeps campaigns.stats true and stops campaigns whose mail bounces."""
