"""Settings: one frozen model, the only reader of the environment. All problems are listed at once."""

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from consumer.errors import ConfigError
from consumer.guard import Limits, Mode
from schemas.events import ANY_ID_PATTERN
from schemas.topics import Topics

PREFIX: Final = "CAMPAIGN_STATS_"
UNUSED: Final = {  # each stands for a server that a command does not talk to
    "database_url": "postgresql://unused",
    "kafka_bootstrap_servers": "unused",
}
TLS_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
NO_URL: Final = (
    "is no URL: write postgresql://user:password@host:5432/database, a / in user or password as %2F, a # as %23"
)
TOKENS: Final = 'must be a JSON object: {"SHA-256 hex of a token": "user id or *"}'
ANY_ID: Final = re.compile(ANY_ID_PATTERN)
MAX_PORT: Final = 65_535
NO_PORT: Final = f"has a port above {MAX_PORT}"
HOST: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]*)(?::[0-9]{1,5})?")
NO_ENDPOINT: Final = "is no URL: write https://host/path, without user and password"
SENT_AS_IS: Final = {"PLAIN": "password", "OAUTHBEARER": "token"}
SESSION_ATTRS: Final = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _whole(value: object) -> object:
    """The guard compares integers: 500.0 and 5_00 are refused as well as 0.05."""
    if isinstance(value, float) or (isinstance(value, str) and not re.fullmatch(r"-?[0-9]+", value)):
        raise ValueError("must be a whole number, written in digits")
    return value


def _database_url(value: object) -> object:
    """Refused here with a sentence, because a driver's error would quote it, password included."""
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        options = parse_qs(parts.query)
    except ValueError:
        raise ValueError(NO_URL) from None
    login, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme not in ("postgresql", "postgres") or ("@" in parts.path and not login) or parts.fragment:
        raise ValueError(NO_URL)
    if not all(HOST.fullmatch(host) and _is_name(host) for host in hosts.split(",")):
        raise ValueError(NO_URL)
    if any(int(port) > MAX_PORT for port in re.findall(r":([0-9]{1,5})(?:,|\Z)", hosts)):
        raise ValueError(NO_PORT)
    if options.get("target_session_attrs", ["any"])[-1] not in SESSION_ATTRS:
        raise ValueError(f"target_session_attrs is none of {', '.join(SESSION_ATTRS)}")
    if options.get("sslmode", ["prefer"])[-1] not in SSL_MODES:
        raise ValueError(f"sslmode is none of {', '.join(SSL_MODES)}")
    for name in TLS_FILES:
        if name in options and not (Path(options[name][-1]).is_file() and os.access(options[name][-1], os.R_OK)):
            raise ValueError(f"{name} names no file that can be read: give its path")
    return value


def _addresses(value: str) -> str:
    addresses = [address.strip() for address in value.split(",")]
    if not all(address and HOST.fullmatch(address) and _is_name(address) for address in addresses):
        raise ValueError("must be host:port, several separated by commas")
    if any(int(port) > MAX_PORT for port in re.findall(r":([0-9]{1,5})\s*(?:,|\Z)", value)):
        raise ValueError(NO_PORT)
    return value


def _text(value: object) -> object:
    """A login that cannot be encoded would fail deep inside the client."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8") from None
    return value


def _token_url(value: str) -> str:
    """The client secret goes there: encrypted, or to this machine. It may not hold a secret itself."""
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(NO_ENDPOINT) from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.username is not None:
        raise ValueError(NO_ENDPOINT)
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("would send the client secret unencrypted: use https")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_name(address: str) -> bool:
    """Whether the host of host:port can be looked up at all: a..b and labels of more than 63 characters cannot."""
    try:
        unquote(address.rpartition(":")[0] or address).strip("[]").encode("idna")
    except UnicodeError:
        return address.startswith(("/", "%2F", "%2f", "["))
    return True


def _listens_on(value: str) -> str:
    if not value or not _is_name(value):
        raise ValueError("is no host: write a name or an address of this machine")
    return value


def _tokens(value: object) -> object:
    """SHA-256 hex of a token (lower case) -> user id, None for `*`. Messages never quote what was set."""
    if not isinstance(value, str):
        return value
    try:
        given = json.loads(value, object_pairs_hook=_distinct)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(TOKENS) from None
    if not isinstance(given, dict):
        raise ValueError(TOKENS)
    tokens: dict[str, UUID | None] = {}
    for place, (digest, user) in enumerate(given.items(), 1):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(f"entry {place}: the key is no SHA-256 in hex; make it with: printf %s TOKEN | sha256sum")
        if not isinstance(user, str) or not (user == "*" or ANY_ID.fullmatch(user)):
            raise ValueError(f"entry {place}: expected the user id (8-4-4-4-12 hex) the token speaks for, or *")
        if digest.lower() in tokens:
            raise ValueError(f"entry {place}: the same token stands there twice; keep one")
        tokens[digest.lower()] = None if user == "*" else UUID(user)
    return tokens


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same token stands there twice; keep one")
    return found


WholeNumber = Annotated[int, BeforeValidator(_whole)]
Host = Annotated[str, AfterValidator(_listens_on)]
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Seconds = Annotated[float, Field(ge=0, le=365 * 86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """What an operator can set. Secrets are masked wherever the model is printed; `_s` values are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: Annotated[SecretStr, BeforeValidator(_database_url)] = Field(
        validation_alias=AliasChoices("DATABASE_URL", "database_url")
    )
    kafka_bootstrap_servers: Annotated[str, AfterValidator(_addresses)] = Field(
        min_length=1, validation_alias=AliasChoices("KAFKA_BOOTSTRAP_SERVERS", "kafka_bootstrap_servers")
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    kafka_sasl_username: Annotated[str | None, BeforeValidator(_text)] = None  # with OAUTHBEARER the client id,
    kafka_sasl_password: Annotated[SecretStr | None, BeforeValidator(_text)] = None  # and the client secret
    kafka_sasl_token_url: Annotated[str, AfterValidator(_token_url)] | None = None
    kafka_sasl_scope: Annotated[str | None, BeforeValidator(_text)] = None
    kafka_ssl_cafile: Path | None = None
    kafka_ssl_certfile: Path | None = None
    kafka_ssl_keyfile: Path | None = None
    topic_prefix: str = Field(default="", pattern=r"\A[A-Za-z0-9._-]{0,100}\z")
    group_id: str | None = None
    http_host: Host = "127.0.0.1"
    http_port: Port = 8080
    api_host: Host = "127.0.0.1"
    api_port: Port = 8081
    api_tokens: Annotated[Mapping[str, UUID | None], NoDecode, BeforeValidator(_tokens)] = Field(
        default_factory=dict, repr=False
    )
    api_rate_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] = 60
    guard_mode: Mode = Mode.ENFORCE
    guard_threshold_bp: WholeNumber = 500
    guard_min_sent: WholeNumber = 100
    guard_window: WholeNumber = 500
    sweep_interval_s: Seconds = 300
    drift_grace_s: Seconds = 60
    shutdown_deadline_s: Annotated[float, Field(gt=0, le=600)] = 8
    retention_days: Annotated[int, Field(ge=1, le=36_500)] = 90
    fetch_max_wait_ms: Annotated[int, Field(ge=1, le=10_000)] = 100
    producer_idempotence: bool = True
    cdc_topic: str | None = Field(default=None, pattern=r"\A[A-Za-z0-9._-]{1,249}\z")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        """The environment may hold any bytes; what is not UTF-8 would fail much later, and far from here."""
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("is not UTF-8") from None
        return value

    @property
    def group(self) -> str:
        """The consumer group: as set, or the default behind the topic prefix."""
        return self.group_id or f"{self.topic_prefix}campaign-stats"

    @property
    def limits(self) -> Limits:
        """The guard's default limits."""
        return Limits(self.guard_mode, self.guard_threshold_bp, self.guard_min_sent, self.guard_window)

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problems = [f"{PREFIX}GUARD_*: {problem}" for problem in self.limits.problems()]
        uses_sasl = self.kafka_security_protocol.startswith("SASL")
        if uses_sasl and self.kafka_sasl_mechanism is None:
            problems.append("CAMPAIGN_STATS_KAFKA_SASL_MECHANISM is required with a SASL protocol")
        if self.kafka_sasl_mechanism is not None and not uses_sasl:
            problems.append(
                "CAMPAIGN_STATS_KAFKA_SASL_MECHANISM is set, but KAFKA_SECURITY_PROTOCOL uses no SASL: use SASL_SSL"
            )
        if self.kafka_sasl_mechanism is not None and not (self.kafka_sasl_username and self.kafka_sasl_password):
            problems.append(
                "CAMPAIGN_STATS_KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD are required with this mechanism"
            )
        if self.kafka_sasl_mechanism in SENT_AS_IS and self.kafka_security_protocol == "SASL_PLAINTEXT":
            problems.append(
                f"CAMPAIGN_STATS_KAFKA_SASL_MECHANISM {self.kafka_sasl_mechanism} would send the"
                f" {SENT_AS_IS[self.kafka_sasl_mechanism]} unencrypted: use SASL_SSL"
            )
        if self.kafka_sasl_mechanism == "OAUTHBEARER" and self.kafka_sasl_token_url is None:
            problems.append("CAMPAIGN_STATS_KAFKA_SASL_TOKEN_URL is required with OAUTHBEARER")
        if self.kafka_sasl_mechanism != "OAUTHBEARER":
            problems += [
                f"CAMPAIGN_STATS_{name.upper()} is set, but only KAFKA_SASL_MECHANISM OAUTHBEARER uses it"
                for name in ("kafka_sasl_token_url", "kafka_sasl_scope")
                if getattr(self, name) is not None
            ]
        if not self.kafka_security_protocol.endswith("SSL"):
            problems += [
                f"CAMPAIGN_STATS_{name.upper()} is set, but KAFKA_SECURITY_PROTOCOL uses no TLS: use SSL or SASL_SSL"
                for name in ("kafka_ssl_cafile", "kafka_ssl_certfile", "kafka_ssl_keyfile")
                if getattr(self, name) is not None
            ]
        if (self.kafka_ssl_certfile is None) != (self.kafka_ssl_keyfile is None):
            problems.append("CAMPAIGN_STATS_KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE belong together: set both or none")
        if self.cdc_topic in Topics(self.topic_prefix).all:
            problems.append("CAMPAIGN_STATS_CDC_TOPIC is a topic of this service: name the one of the change records")
        if problems:
            raise ConfigError(problems) from None
        return self


def unknown_settings() -> list[str]:
    """Names in the environment that look like settings and are none; a misspelt one is ignored."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)


def read_settings(*without: str) -> Settings:
    """The settings from the environment, but `without` those two that the caller has no use for.

    Raises ConfigError, every problem listed with its fix.
    """
    given = {name: UNUSED[name] for name in without}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False, include_context=False)
    problems: list[str] = []
    usable: dict[str, object] = {}
    for problem in wrong:
        name = str(problem["loc"][0])
        field = name.lower()
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "is required: set it in the environment"
        problems.append(f"{name if name.isupper() else PREFIX + name.upper()}: {message}")
        default = Settings.model_fields[field]
        usable[field] = UNUSED.get(field) or default.get_default()
    try:
        Settings(**{**given, **usable})  # type: ignore[arg-type]  # wrong combinations too
    except ConfigError as error:
        problems.extend(error.problems)
    raise ConfigError(problems) from None
