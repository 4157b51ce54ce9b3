"""How to reach Kafka: addresses, TLS, login, why brokers refuse us, and how to let go of a client that hangs."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from aiokafka.abc import AbstractTokenProvider
from aiokafka.client import ConnectionGroup
from aiokafka.conn import CloseReason, collect_hosts, create_conn
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    RecordTooLargeError,
    RequestTimedOutError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.protocol.commit import OffsetFetchResponse_v2, OffsetFetchResponse_v3
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.structs import TopicPartition

from consumer.errors import MAY_NOT, ConfigError, ServiceError, Unavailable

POLL_RECORDS: Final = 500  # 4 000 costs 1.6x the CPU per record (measured)
POLL_MS: Final = 500
CALL_DEADLINE_S: Final = 10.0  # commits and look-ups hang while brokers are away; below the session's patience
START_DEADLINE_S: Final = 30.0
STOP_DEADLINE_S: Final = 2.0
CONNECT_DEADLINE_S: Final = 4.0  # with login
ANSWER_DEADLINE_S: Final = 5.0  # for what a broker answers at once, such as heartbeats
REQUEST_DEADLINE_S: Final = 15.0  # a full fetch over a slow line takes its time
KNOCK_DEADLINE_S: Final = 10.0  # to ask a broker why it does not take us
BROKEN_BYTES: Final = (
    CorruptRecordException, RecordTooLargeError, UnsupportedCodecError,
    ValueError, IndexError, TypeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the brokers. `security` are the keyword arguments aiokafka's clients share (TLS, SASL)."""

    bootstrap_servers: str
    security: Mapping[str, object]
    client_id: str = "campaign-stats"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for any client."""
        return {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "client_id": self.client_id,
            "metadata_max_age_ms": 60_000,
            **self.security,
        }


def tls_context(cafile: Path | None) -> ssl.SSLContext:
    """A client context that checks certificates and host names, against the system's authorities without `cafile`.

    Raises OSError or ValueError for a file that cannot be used.
    """
    return ssl.create_default_context(cafile=cafile)


def present(context: ssl.SSLContext, certfile: Path, keyfile: Path) -> None:
    """Present this certificate to brokers that ask. Raises OSError or ValueError for files that cannot be used."""
    context.load_cert_chain(certfile, keyfile, password="")  # without one, OpenSSL asks for it on the terminal


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no types
    """Gives aiokafka the tokens of OAUTHBEARER; failing to get one is for it a connection that failed."""

    def __init__(self, token: Callable[[], Awaitable[str]]) -> None:
        self._token = token

    async def token(self) -> str:
        """Called for every new connection."""
        try:
            return await self._token()
        except ServiceError as error:
            raise KafkaConnectionError(str(error)) from error


async def refusals(connection: Connection) -> list[str]:
    """What a person must put right, a sentence each, where brokers answer that TLS or login is wrong; none when one
    of them takes us or none answers. aiokafka itself says only that no broker could be had, so each is asked here.
    """
    addresses = [(host, port) for host, port, _ in collect_hosts(connection.bootstrap_servers, randomize=False)]
    errors = await asyncio.gather(*(_knock(connection, host, port) for host, port in addresses))
    if None in errors:
        return []
    found = [_refusal(f"{host}:{port}", error) for (host, port), error in zip(addresses, errors, strict=True)]
    return list(dict.fromkeys(problem for problems in found for problem in problems))


async def _knock(connection: Connection, host: str, port: int) -> BaseException | None:
    """Connect and log in; the error, or None when the broker took us."""
    try:
        async with asyncio.timeout(KNOCK_DEADLINE_S):
            visit = await create_conn(host, port, client_id=connection.client_id, **connection.security)
    except (KafkaError, OSError, TimeoutError) as error:
        return error
    await asyncio.wait([visit.close()], timeout=STOP_DEADLINE_S)
    return None


def _refusal(address: str, error: BaseException | None) -> Sequence[str]:
    """Sentences, if this error of connecting is an answer; none for one that may pass."""
    while error is not None:
        if isinstance(error, ConfigError):
            return error.problems
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"the certificate of {address} is not accepted ({error.verify_message.rstrip('.')})"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SSL_CAFILE and the names in KAFKA_BOOTSTRAP_SERVERS"]
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            why = f"{address} refuses our side of TLS ({error.reason})"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE"]
        if isinstance(error, SaslAuthenticationFailed):
            return [
                f"Kafka: {address} refuses the login; check CAMPAIGN_STATS_KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
            ]
        if isinstance(error, (UnsupportedSaslMechanismError, IllegalSaslStateError)):
            why = f"{address} does not offer this kind of login"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SASL_MECHANISM and KAFKA_SECURITY_PROTOCOL"]
        error = error.__cause__
    return ()


def be_impatient(client: Any) -> None:
    """Give up on a broker that falls silent (no reset, no answer) much sooner than on a rebalance.

    The client has one deadline for everything, and joining needs a long one, because it waits for all members. And it
    finds out of each dead connection by itself, one after the other: here one request that was never answered is enough
    to close all that have been as silent since.
    """
    patience_s = client._request_timeout_ms / 1000
    client._request_timeout_ms = int(CONNECT_DEADLINE_S * 1000)
    send = client.send
    joining: set[tuple[Any, Any]] = set()

    async def sent(node_id: Any, request: Any, *, group: Any = ConnectionGroup.DEFAULT) -> Any:
        begun, key = time.monotonic(), (node_id, group)
        is_join = isinstance(request, (JoinGroupRequest, SyncGroupRequest))
        is_bulky = isinstance(request, (FetchRequest, ProduceRequest))
        if await client.ready(node_id, group=group) and key in client._conns:
            deadline_s = patience_s if is_join else REQUEST_DEADLINE_S if is_bulky else ANSWER_DEADLINE_S
            client._conns[key]._request_timeout = min(deadline_s, patience_s)
        if is_join:
            joining.add(key)
        try:
            answer = await send(node_id, request, group=group)
        except RequestTimedOutError:
            for other in [other for other in client._conns if other not in joining]:
                if client._conns[other]._last_action < begun:  # when it was last heard of
                    client._conns[other].close(reason=CloseReason.CONNECTION_TIMEOUT)
            raise
        finally:
            if is_join:
                joining.discard(key)
        _heed_group_error(answer)
        return answer

    client.send = sent


def _heed_group_error(answer: Any) -> None:
    """Raise what the client overlooks: the error of a whole OffsetFetch, as of a coordinator that has just moved.

    It carries no partitions then, and the client would take every one of them for never committed and read from the
    beginning.
    """
    if isinstance(answer, (OffsetFetchResponse_v2, OffsetFetchResponse_v3)) and answer.error_code:
        raise for_code(answer.error_code)()


@asynccontextmanager
async def refused_is_an_error(connection: Connection) -> AsyncIterator[None]:
    """At start: Unavailable becomes ConfigError when the brokers are there but refuse us."""
    try:
        yield
    except Unavailable as error:
        if problems := await refusals(connection):
            raise ConfigError(problems) from error
        raise


def reading_refused(error: BaseException) -> str:
    """What the client met while it read, in the words of Right where it is a right that is lacking."""
    given: Any = error.args[0] if error.args else ""
    found = [given] if isinstance(given, (str, TopicPartition)) else list(given) if isinstance(given, set) else []
    names = ", ".join(sorted({one.topic if isinstance(one, TopicPartition) else str(one) for one in found}))
    if isinstance(error, TopicAuthorizationFailedError) and names:
        return f"{MAY_NOT} Read topic {names}"
    if isinstance(error, GroupAuthorizationFailedError) and names:
        return f"{MAY_NOT} Read group {names.removeprefix('Unable to get coordinator id for ')}"
    return type(error).__name__


@contextmanager
def said(doing: str) -> Iterator[None]:
    """Raise Unavailable for what the client raises while `doing` this; BROKEN_BYTES and refused commits go through."""
    try:
        yield
    except (CorruptRecordException, RecordTooLargeError, UnsupportedCodecError, CommitFailedError):
        raise
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable("kafka", f"{reading_refused(error)} while {doing}") from error


async def close(client: Any, deadline_s: float) -> bool:
    """Stop a consumer, producer or admin client: it may hang while brokers are away and raise CancelledError.

    Whether it stopped in time.
    """
    stop = getattr(client, "stop", None) or client.close
    task = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait([task], timeout=deadline_s)
    if done:
        if not task.cancelled() and task.exception() is not None:
            log.debug("client stopped with an error", error=type(task.exception()).__name__)
        return True
    task.cancel()
    inner = getattr(client, "_client", None) or getattr(client, "client", None)
    if inner is not None:
        closing = asyncio.ensure_future(inner.close())
        await asyncio.wait([closing, task], timeout=1)
    return False
