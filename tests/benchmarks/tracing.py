"""What spans cost a chunk of 1 000 campaigns and a relay turn of 2 000 events: without an SDK, and with one."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final
from uuid import uuid4

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from consumer import tracing
from consumer.envelope import Cause
from consumer.generation import CHUNK_CAMPAIGNS, Work
from consumer.relay import TURN_ROWS
from schemas.events import Trigger
from tests.benchmarks.report import Figure, Report
from tests.benchmarks.stage import Stage

ROUNDS: Final = 7
TIMES: Final = {"nothing": 20_000, "no SDK": 20_000, "SDK, nothing sampled": 20, "SDK, every trace sampled": 20}


def _works(flags: str) -> list[Work]:
    return [
        Work(uuid4(), Trigger.STATUS_CHANGED, Cause(str(number), "", f"00-{number + 1:032x}-{1:016x}-{flags}"))
        for number in range(CHUNK_CAMPAIGNS)
    ]


def _events(flags: str) -> list[bytes]:
    padding = b"x" * 500
    return [
        b'{"id":"%d","traceparent":"00-%032x-%016x-%s","data":{"%s"}}'
        % (number, number + 1, 1, flags.encode(), padding)
        for number in range(TURN_ROWS)
    ]


def _us(times: int, around: Callable[[], Any]) -> float:
    begun = time.process_time()
    for _ in range(times):
        with around():
            pass
    return (time.process_time() - begun) / times * 1e6


async def measure(_: Stage) -> Report:
    """In turn; the provider is put in and taken out between them, in this process alone."""
    taken: dict[str, list[float]] = {}
    without, provider = trace.get_tracer_provider(), TracerProvider()
    original = trace.get_tracer_provider
    for number in range(ROUNDS):
        for name in list(TIMES)[:: 1 if number % 2 else -1]:
            flags = "01" if "every" in name else "00"
            works: Sequence[Work] = _works(flags)
            events = _events(flags)
            chosen = provider if name.startswith("SDK") else without
            trace.get_tracer_provider = lambda chosen=chosen: chosen  # type: ignore[misc]
            try:
                arounds: dict[str, Callable[[], Any]] = {
                    "chunk": lambda works=works: tracing.recounting(works),  # type: ignore[misc]
                    "turn": lambda events=events: tracing.publishing(events),  # type: ignore[misc]
                }
                for what, around in arounds.items():
                    us = _us(TIMES[name], nullcontext if name == "nothing" else around)
                    taken.setdefault(f"CPU us per {what}: {name}", []).append(us)
            finally:
                trace.get_tracer_provider = original
    return Report("tracing", [Figure(name, us, ",.2f") for name, us in taken.items()])
