"""`campaign-stats doctor`: what is wrong, what follows, and the command or SQL that mends it. Changes nothing."""

import asyncio
from collections.abc import Sequence

from pydantic import ValidationError
from rich.console import Console

from consumer import broker
from consumer.doctor.database import examine_database
from consumer.doctor.findings import Finding, Report, misspelt, not_checked, setting_finding
from consumer.doctor.kafka import examine_kafka
from consumer.errors import ConfigError
from consumer.guard import Limits
from consumer.service import kafka_connection
from consumer.settings import UNUSED, Settings, read_settings, unknown_settings


async def examine() -> Report:
    """Every check; what keeps one from being made never hides another's findings."""
    connection: broker.Connection | None = None
    try:
        problems = list(_settings_problems())
        kafka = _settings_of("kafka_", "topic_prefix", "cdc_topic")
        if kafka is not None:
            connection = kafka_connection(kafka)
    except ConfigError as error:
        problems += error.problems
    database, guard, api = _settings_of("database_url"), _settings_of("guard_"), _settings_of("api_")
    with Console(stderr=True).status("asking the servers"):
        about_database, about_kafka = await asyncio.gather(
            _unknown("database", "DATABASE_URL")
            if database is None
            else examine_database(
                database.database_url.get_secret_value(),
                guard.limits if guard else Limits(),
                bool(api and api.api_tokens),
            ),
            _unknown("kafka", "KAFKA_*") if kafka is None or connection is None else examine_kafka(connection, kafka),
        )
    settings = [setting_finding(problem) for problem in problems] + [misspelt(name) for name in unknown_settings()]
    return Report([("settings", settings), *about_database, *about_kafka])


def _settings_problems() -> Sequence[str]:
    try:
        read_settings()
    except ConfigError as error:
        return error.problems
    return ()


def _settings_of(*names: str) -> Settings | None:
    """Only the settings that begin so are read, all others are their defaults; None when one of these is wrong."""
    others = {
        name: UNUSED.get(name) or field.get_default(call_default_factory=True, validated_data={})
        for name, field in Settings.model_fields.items()
        if not name.startswith(names)
    }
    try:
        return Settings(**others)  # type: ignore[arg-type]  # pydantic checks them
    except (ValidationError, ConfigError):
        return None


async def _unknown(check: str, names: str) -> list[tuple[str, list[Finding]]]:
    return [(check, [not_checked(f"{names} cannot be used as it is")])]
