"""Spans of our work, for whoever runs the service with an OpenTelemetry SDK. Without one nothing here is done.

One span for a batch: `recount` for a chunk or a deferred campaign, `publish` for a turn of the relay. It is linked to
every sampled trace that its events belong to. Where that is a single one it is its next span, and what follows carries
it on.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from msgspec.structs import replace as msgspec_replace
from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceFlags

from consumer.envelope import TRACEPARENT, Cause
from consumer.generation import Work

LINKS_AT_MOST: Final = 128  # as the SDK keeps by default
NO_SDK: Final = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
LENGTH: Final = 55  # of a traceparent of version 00


@contextmanager
def recounting(works: Sequence[Work]) -> Iterator[Sequence[Work]]:
    """Around the recount of `works`; gives them back, those of the batch's only trace going on from its span."""
    if not is_on():
        yield works
        return
    with _span("recount", SpanKind.CONSUMER, _behind(works), len(works)) as goes_on:
        yield works if goes_on is None else [_carried_on(work, goes_on) for work in works]


@contextmanager
def publishing(events: Sequence[bytes]) -> Iterator[None]:
    """Around the sending of `events`, as `envelope.encode` wrote them."""
    if not is_on():
        yield
        return
    with _span("publish", SpanKind.PRODUCER, _inside(events), len(events)):
        yield


def exemplar(event: bytes) -> dict[str, str] | None:
    """The label that leads from a measurement to the trace of `event`, None without a sampled one; while `is_on`."""
    contexts = _sampled(_inside([event]))
    return {"trace_id": f"{contexts[0].trace_id:032x}"} if contexts else None


def is_on() -> bool:
    """Whether an SDK is there."""
    return not isinstance(trace.get_tracer_provider(), NO_SDK)


def _behind(works: Iterable[Work]) -> list[str]:
    """The traceparents of the hints and requests that led to them."""
    causes = (cause for work in works for cause in (work.hint, *(request.cause for request in work.requests)))
    return [cause.traceparent for cause in causes if cause is not None and cause.traceparent is not None]


def _inside(events: Iterable[bytes]) -> list[str]:
    """The traceparents of the events that have one; it stands before their data, where others may call something so."""
    heads = (event.partition(b',"data":')[0].partition(b'"traceparent":"') for event in events)
    found = [rest[:LENGTH].decode("ascii", "replace") for _, mark, rest in heads if mark]
    return [one for one in found if TRACEPARENT.fullmatch(one)]


@contextmanager
def _span(name: str, kind: SpanKind, traceparents: Iterable[str], count: int) -> Iterator[str | None]:
    """Gives the traceparent with which the only trace of the batch goes on, None when there are several or none."""
    contexts = _sampled(traceparents)
    is_one = len({context.trace_id for context in contexts}) == 1
    parent = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0])) if is_one else None
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.name": name,
        "messaging.batch.message_count": count,
    }
    links = [Link(context) for context in contexts[:LINKS_AT_MOST]]
    tracer = trace.get_tracer("campaign-stats")
    with tracer.start_as_current_span(
        name, parent, kind, attributes, links, record_exception=False, set_status_on_exception=False
    ) as span:
        own = span.get_span_context()
        try:
            yield f"00-{own.trace_id:032x}-{own.span_id:016x}-01" if is_one and span.is_recording() else None
        except BaseException as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)  # never its message, which may quote a row
            raise


def _sampled(traceparents: Iterable[str]) -> list[SpanContext]:
    """Each once, in order, of those whose trace is sampled."""
    different = dict.fromkeys(one for one in traceparents if int(one[53:LENGTH], 16) & TraceFlags.SAMPLED)
    return [
        SpanContext(int(one[3:35], 16), int(one[36:52], 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        for one in different
    ]


def _carried_on(work: Work, traceparent: str) -> Work:
    """What belongs to the trace of `traceparent` goes on from there."""

    def on(cause: Cause) -> Cause:
        belongs = cause.traceparent is not None and cause.traceparent[3:35] == traceparent[3:35]
        return msgspec_replace(cause, traceparent=traceparent) if belongs else cause

    requests = tuple(replace(request, cause=on(request.cause)) for request in work.requests)
    return msgspec_replace(work, hint=work.hint and on(work.hint), requests=requests)
