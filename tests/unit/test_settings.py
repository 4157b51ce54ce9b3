"""Settings: the documented defaults, every problem at once, no secret ever shown, nothing unsafe taken."""

import pytest

from consumer.errors import ConfigError
from consumer.guard import Limits, Mode
from consumer.settings import Settings, read_settings, unknown_settings

DATABASE_URL = "postgresql://service:hunter2-database@db.example/product"
PASSWORD = "hunter2-kafka"
OAUTH = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_MECHANISM": "OAUTHBEARER",
    "KAFKA_SASL_USERNAME": "client",
    "KAFKA_SASL_PASSWORD": PASSWORD,
    "KAFKA_SASL_TOKEN_URL": "https://login.example/token",
}
SASL = {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-512", "KAFKA_SASL_USERNAME": "service", "KAFKA_SASL_PASSWORD": PASSWORD}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Only the two required settings."""
    import os

    for name in list(os.environ):
        if name.upper().startswith("CAMPAIGN_STATS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", DATABASE_URL)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka.example:9092")
    return monkeypatch


def problems(monkeypatch: pytest.MonkeyPatch, **settings: str) -> tuple[str, ...]:
    for name, value in settings.items():
        monkeypatch.setenv(f"CAMPAIGN_STATS_{name}", value)
    with pytest.raises(ConfigError) as raised:
        read_settings()
    return raised.value.problems


DEFAULTS = {  # interface.md, section Settings
    "kafka_security_protocol": "PLAINTEXT",
    "kafka_sasl_mechanism": None,
    "kafka_sasl_username": None,
    "kafka_sasl_password": None,
    "kafka_sasl_token_url": None,
    "kafka_sasl_scope": None,
    "kafka_ssl_cafile": None,
    "kafka_ssl_certfile": None,
    "kafka_ssl_keyfile": None,
    "topic_prefix": "",
    "group": "campaign-stats",
    "http_host": "127.0.0.1",
    "http_port": 8080,
    "guard_mode": Mode.ENFORCE,
    "guard_threshold_bp": 500,
    "guard_min_sent": 100,
    "guard_window": 500,
    "sweep_interval_s": 300,
    "drift_grace_s": 60,
    "shutdown_deadline_s": 8,
    "retention_days": 90,
    "fetch_max_wait_ms": 100,
    "producer_idempotence": True,
    "log_level": "INFO",
}


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_defaults_are_the_documented_ones(name: str, default: object) -> None:
    assert getattr(read_settings(), name) == default


def test_the_default_limits_are_the_rule_of_the_guard() -> None:
    assert read_settings().limits == Limits() == Limits(Mode.ENFORCE, 500, 100, 500)


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("GUARD_MODE", "observe", "guard_mode", Mode.OBSERVE),
        ("GUARD_THRESHOLD_BP", "10000", "guard_threshold_bp", 10_000),
        ("GUARD_WINDOW", "0", "guard_window", 0),
        ("SWEEP_INTERVAL_S", "0", "sweep_interval_s", 0.0),
        ("SWEEP_INTERVAL_S", "0.05", "sweep_interval_s", 0.05),
        ("DRIFT_GRACE_S", "1.5", "drift_grace_s", 1.5),
        ("SHUTDOWN_DEADLINE_S", "0.5", "shutdown_deadline_s", 0.5),
        ("HTTP_PORT", "0", "http_port", 0),
        ("HTTP_PORT", "65535", "http_port", 65_535),
        ("PRODUCER_IDEMPOTENCE", "false", "producer_idempotence", False),
        ("LOG_LEVEL", "DEBUG", "log_level", "DEBUG"),
        ("LOG_LEVEL", "", "log_level", "INFO"),  # empty is absent
        ("TOPIC_PREFIX", "eu.", "group", "eu.campaign-stats"),
        ("GROUP_ID", "mine", "group", "mine"),
    ],
)
def test_the_environment_sets_it(
    environment: pytest.MonkeyPatch, variable: str, value: str, name: str, expected: object
) -> None:
    environment.setenv(f"CAMPAIGN_STATS_{variable}", value)
    assert getattr(read_settings(), name) == expected


def test_an_own_group_is_not_prefixed(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CAMPAIGN_STATS_TOPIC_PREFIX", "eu.")
    environment.setenv("CAMPAIGN_STATS_GROUP_ID", "mine")
    assert read_settings().group == "mine"


def test_the_two_customary_names_have_no_prefix(environment: pytest.MonkeyPatch) -> None:
    settings = read_settings()
    assert settings.database_url.get_secret_value() == DATABASE_URL
    assert settings.kafka_bootstrap_servers == "kafka.example:9092"
    environment.delenv("DATABASE_URL")
    environment.delenv("KAFKA_BOOTSTRAP_SERVERS")
    environment.setenv("CAMPAIGN_STATS_DATABASE_URL", DATABASE_URL)
    missing = problems(environment, KAFKA_BOOTSTRAP_SERVERS="kafka.example:9092")
    assert [problem.partition(":")[0] for problem in missing] == ["DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"]


def test_settings_cannot_be_changed() -> None:
    settings = read_settings()
    with pytest.raises(ValueError, match="frozen"):
        setattr(settings, "http_port", 1)  # noqa: B010  # mypy knows as well that it cannot be set


def test_all_wrong_values_are_listed_at_once_each_by_its_name(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("DATABASE_URL")
    wrong = {
        "KAFKA_SECURITY_PROTOCOL": "TLS",
        "TOPIC_PREFIX": "eu/",
        "HTTP_PORT": "65536",
        "GUARD_MODE": "loud",
        "GUARD_MIN_SENT": "many",
        "SWEEP_INTERVAL_S": "-1",
        "DRIFT_GRACE_S": "inf",
        "SHUTDOWN_DEADLINE_S": "0",
        "RETENTION_DAYS": "0",
        "FETCH_MAX_WAIT_MS": "1.5",
        "PRODUCER_IDEMPOTENCE": "perhaps",
        "LOG_LEVEL": "LOUD",
    }
    named = {problem.partition(":")[0] for problem in problems(environment, **wrong)}
    assert named == {"DATABASE_URL", *(f"CAMPAIGN_STATS_{name}" for name in wrong)}


@pytest.mark.parametrize("name", ["GUARD_THRESHOLD_BP", "GUARD_MIN_SENT", "GUARD_WINDOW"])
@pytest.mark.parametrize("value", ["500.5", "5e2", "5%", "five", "nan"])
def test_the_guard_takes_no_fractions(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    [problem] = problems(environment, **{name: value})
    assert problem.startswith(f"CAMPAIGN_STATS_{name}:")


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"GUARD_THRESHOLD_BP": "0"}, "threshold_bp"),
        ({"GUARD_THRESHOLD_BP": "10001"}, "threshold_bp"),
        ({"GUARD_MIN_SENT": "0"}, "min_sent"),
        ({"GUARD_WINDOW": "99"}, "window"),
        ({"GUARD_WINDOW": "-1"}, "window"),
        ({"GUARD_MIN_SENT": "501"}, "window"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "KAFKA_SASL_MECHANISM"),
        ({**SASL, "KAFKA_SECURITY_PROTOCOL": "SSL"}, "KAFKA_SASL_MECHANISM"),
        (SASL, "KAFKA_SASL_MECHANISM"),
        ({**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_PASSWORD": ""}, "KAFKA_SASL_PASSWORD"),
        ({**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": ""}, "KAFKA_SASL_USERNAME"),
        ({**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "PLAIN"}, "unencrypted"),
        ({"KAFKA_SSL_CERTFILE": "/c.pem", "KAFKA_SECURITY_PROTOCOL": "SSL"}, "KAFKA_SSL_KEYFILE"),
        ({"KAFKA_SSL_KEYFILE": "/k.pem", "KAFKA_SECURITY_PROTOCOL": "SSL"}, "KAFKA_SSL_CERTFILE"),
        ({"KAFKA_SSL_CAFILE": "/ca.pem"}, "KAFKA_SSL_CAFILE is set, but KAFKA_SECURITY_PROTOCOL uses no TLS"),
        ({**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SSL_CAFILE": "/ca.pem"}, "uses no TLS"),
        ({**OAUTH, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, "OAUTHBEARER would send the token unencrypted"),
        ({**OAUTH, "KAFKA_SASL_TOKEN_URL": ""}, "KAFKA_SASL_TOKEN_URL is required"),
        ({**OAUTH, "KAFKA_SASL_PASSWORD": ""}, "KAFKA_SASL_PASSWORD"),
        ({**OAUTH, "KAFKA_SASL_MECHANISM": "PLAIN"}, "KAFKA_SASL_TOKEN_URL is set, but only"),
        ({"KAFKA_SASL_SCOPE": "kafka"}, "KAFKA_SASL_SCOPE is set, but only"),
    ],
)
def test_unsafe_combinations_are_refused(environment: pytest.MonkeyPatch, settings: dict[str, str], about: str) -> None:
    assert about in " ".join(problems(environment, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"GUARD_WINDOW": "0", "GUARD_MIN_SENT": "100000"},
        {**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL"},
        {**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_MECHANISM": "PLAIN"},
        {"KAFKA_SSL_CERTFILE": "/c.pem", "KAFKA_SSL_KEYFILE": "/k.pem", "KAFKA_SECURITY_PROTOCOL": "SSL"},
        {"KAFKA_SSL_CAFILE": "/etc/ca.pem", "KAFKA_SECURITY_PROTOCOL": "SSL"},
        {**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"},
        OAUTH,
        {**OAUTH, "KAFKA_SASL_SCOPE": "kafka", "KAFKA_SASL_TOKEN_URL": "http://127.0.0.1:8090/token"},
        {**OAUTH, "KAFKA_SASL_TOKEN_URL": "http://[::1]/token"},
        {**OAUTH, "KAFKA_SASL_TOKEN_URL": "http://localhost/token"},
    ],
)
def test_safe_combinations_are_taken(environment: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        environment.setenv(f"CAMPAIGN_STATS_{name}", value)
    taken = read_settings()
    assert all(str(getattr(taken, name.lower())) == value for name, value in settings.items() if "PASSWORD" not in name)


def test_secrets_are_masked_wherever_settings_are_shown(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**SASL, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}.items():
        environment.setenv(f"CAMPAIGN_STATS_{name}", value)
    settings = read_settings()
    assert settings.kafka_sasl_password is not None
    assert settings.kafka_sasl_password.get_secret_value() == PASSWORD
    shown = (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json(), f"{settings!r}")
    assert not [text for text in shown if "hunter2" in text]


def test_no_value_is_shown_in_a_problem(environment: pytest.MonkeyPatch) -> None:
    free = {"topic_prefix", "group_id", "http_host"}  # take any word
    wrong = {name.upper(): "hunter2-misplaced/" for name in Settings.model_fields if name not in free}
    shown = problems(environment, **wrong)
    assert len(shown) > 10
    assert "hunter2" not in " ".join(shown)


def test_the_error_itself_carries_no_cause_that_would_show_values(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CAMPAIGN_STATS_HTTP_PORT", "hunter2")
    with pytest.raises(ConfigError) as raised:
        read_settings()
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_wrong_values_and_wrong_combinations_are_listed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://x/y")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "k:9092")
    monkeypatch.setenv("CAMPAIGN_STATS_LOG_LEVEL", "LOUD")
    monkeypatch.setenv("CAMPAIGN_STATS_GUARD_THRESHOLD_BP", "0")
    monkeypatch.setenv("CAMPAIGN_STATS_GUARD_MIN_SENT", "0")
    monkeypatch.setenv("CAMPAIGN_STATS_KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    with pytest.raises(ConfigError) as raised:
        read_settings()
    assert len(raised.value.problems) == 4


@pytest.mark.parametrize("value", ["500.0", "5_00"])
@pytest.mark.parametrize("name", ["GUARD_THRESHOLD_BP", "GUARD_MIN_SENT", "GUARD_WINDOW"])
def test_whole_floats_are_refused_too(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://x/y")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "k:9092")
    monkeypatch.setenv(f"CAMPAIGN_STATS_{name}", value)
    with pytest.raises(ConfigError, match=name):
        read_settings()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/db",
        "postgres://u:p%2Fw@h:5432/db?sslmode=verify-full&sslrootcert=/etc/passwd",
        "postgresql://postgres@/db?host=/tmp/x&port=5432",
        "postgresql://u:p@h1:5432,h2:5433/db?target_session_attrs=read-write",
        "postgresql://u:p@ss@[::1]:5432/db",
        "postgresql://%2Ftmp%2Fx/db",
        "postgresql:///db",
    ],
)
def test_every_kind_of_database_url_is_taken(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("DATABASE_URL", url)
    environment.setenv("KAFKA_BOOTSTRAP_SERVERS", "a:9092, b:9093,[::1]:9094,c")
    assert read_settings().database_url.get_secret_value() == url


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://h/db", "postgresql://u:s3cr3t/w@h/db", "postgresql://u:123/w@h/db", "postgresql://h:x/db",
            "postgresql://h/db?sslmode=s3cr3t", "postgresql://h:65536/db", "postgresql://h/db?sslrootcert=/s3cr3t",
            "postgresql://u:s3cr3t@db..example/x", "postgresql://u:s3cr3t@" + "l" * 64 + "/x",
            "postgresql://h/db?target_session_attrs=s3cr3t", "postgresql://\udcff/s3cr3t"],
)  # fmt: skip
def test_a_wrong_database_url_is_refused_without_being_shown(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("DATABASE_URL", url)
    with pytest.raises(ConfigError, match="DATABASE_URL") as raised:
        read_settings()
    assert "s3cr3t" not in str(raised.value)


@pytest.mark.parametrize(("window", "min_sent"), [("3000000000", "100"), ("0", "3000000000")])
def test_limits_that_no_column_holds_are_refused(environment: pytest.MonkeyPatch, window: str, min_sent: str) -> None:
    assert "2147483647" in problems(environment, GUARD_WINDOW=window, GUARD_MIN_SENT=min_sent)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTP_HOST", "a..b"), ("API_HOST", "\udcff"), ("GROUP_ID", "\udcff"), ("API_TOKENS", "[" * 60_000),
     ("CDC_TOPIC", "campaign.paused")],
)  # fmt: skip
def test_what_would_fail_only_later_is_refused_at_once(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    [problem] = problems(environment, **{name: value})
    assert problem.startswith(f"CAMPAIGN_STATS_{name}")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1", "localhost", "a.example"])
def test_usual_hosts_are_taken(environment: pytest.MonkeyPatch, host: str) -> None:
    environment.setenv("CAMPAIGN_STATS_HTTP_HOST", host)
    assert read_settings().http_host == host


def test_misspelt_settings_are_found(environment: pytest.MonkeyPatch) -> None:
    assert unknown_settings() == []
    environment.setenv("CAMPAIGN_STATS_GUARD_TRESHOLD_BP", "1")
    assert unknown_settings() == ["CAMPAIGN_STATS_GUARD_TRESHOLD_BP"]


@pytest.mark.parametrize("servers", ["h:abc", "h:65536", "a:9092,b:99999", "a:9092,,b:9092", "", "kafka..x:9092"])
def test_wrong_broker_addresses_are_refused(environment: pytest.MonkeyPatch, servers: str) -> None:
    environment.setenv("KAFKA_BOOTSTRAP_SERVERS", servers)
    with pytest.raises(ConfigError, match="KAFKA_BOOTSTRAP_SERVERS"):
        read_settings()


@pytest.mark.parametrize(
    ("url", "about"),
    [
        ("http://login.example/token", "use https"),
        ("http://127.0.0.1.example/token", "use https"),
        ("https://client:s3cr3t@login.example/token", "is no URL"),
        ("https://h:65536/token", "is no URL"),
        ("https:///token", "is no URL"),
        ("ftp://login.example/s3cr3t", "is no URL"),
        ("s3cr3t", "is no URL"),
    ],
)
def test_a_wrong_token_url_is_refused_without_being_shown(
    environment: pytest.MonkeyPatch, url: str, about: str
) -> None:
    shown = problems(environment, **{**OAUTH, "KAFKA_SASL_TOKEN_URL": url})
    assert shown[0].startswith("CAMPAIGN_STATS_KAFKA_SASL_TOKEN_URL: ")
    assert about in shown[0]
    assert "s3cr3t" not in " ".join(shown)


@pytest.mark.parametrize("name", ["KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD", "KAFKA_SASL_SCOPE"])
def test_a_login_that_is_not_utf8_is_refused(environment: pytest.MonkeyPatch, name: str) -> None:
    shown = problems(environment, **{**OAUTH, name: "s3cr3t\udcff"})
    assert f"CAMPAIGN_STATS_{name}: is not UTF-8" in shown
    assert "s3cr3t" not in " ".join(shown)
