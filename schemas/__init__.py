"""The contracts of campaign-stats: events, topics and their promises, for anyone who publishes or subscribes.

Depends on pydantic only. `schemas.events` has the models, `schemas.topics` the names.
"""
