"""Spans without an SDK, and what is read of an event to link it."""

from consumer import tracing
from consumer.envelope import encode
from tests.unit.builders import NOW, TRACE, cause, work


def test_without_an_sdk_works_come_back_as_they_are() -> None:
    works = [work(hint=cause())]
    with tracing.recounting(works) as traced:
        assert traced is works
    with tracing.publishing([b"no event at all"]):
        pass


def test_only_an_events_own_traceparent_is_read() -> None:
    def event(name: str, traced: bool) -> bytes:
        data = {"campaign": {"name": name, "traceparent": "of the product"}}
        origin = cause(correlation_id=f'"traceparent":"{name}"', traceparent=TRACE if traced else None)
        return encode(type="t", id="i", time=NOW, subject="s", data=data, cause=origin)

    events = [
        event("a", True),
        event('","traceparent":"x', False),
        b"",
        encode(type="t", id="i", time=NOW, subject="s", data={}),
    ]
    assert tracing._inside(events) == [TRACE]
