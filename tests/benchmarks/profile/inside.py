"""`python -m tests.benchmarks.profile.inside run`: the service with clocks inside.

What its steps take, what it asks the broker, and when campaigns pass its stages.
"""

import asyncio
import gc
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from aiokafka.conn import AIOKafkaConnection
from asyncpg.pool import PoolAcquireContext
from asyncpg.transaction import Transaction as Driver

from consumer import broker, database, pipeline, recount, service
from consumer.__main__ import main as serve

CLOCKS: Final = "PROFILE_CLOCKS"  # environment: the file for what they show


class Clocks:
    """In the service's own process: what its steps took, what it asked the broker, when campaigns passed its stages."""

    def __init__(self) -> None:
        self.calls: list[str] = []  # in the order in which they are listed
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.steps: defaultdict[str, list[float]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.marks: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.garbage = {"collections": 0, "seconds": 0.0}
        self.chunk: Sequence[UUID] = ()
        self.turn = self.free = 0.0  # when the last turn, the last chunk asked for a session
        self.begun_at = 0.0

    def mark(self, stage: str, campaigns: Sequence[object], at: float | None = None) -> None:
        """These campaigns have passed this stage."""
        if len(campaigns) < 50:  # a drain's would be as many as its hints
            for campaign in campaigns:
                self.marks[str(campaign)].setdefault(stage, at or time.time())

    def time(self, owner: Any, name: str, step: str, then: Callable[..., None] | None = None) -> None:
        """Put a clock around a coroutine function; `then` gets when it began, its result and its arguments."""
        inner: Callable[..., Awaitable[Any]] = getattr(owner, name)
        self.calls.append(step)

        @wraps(inner)
        async def outer(*arguments: Any, **named: Any) -> Any:
            at, begun = time.time(), time.perf_counter()
            result = await inner(*arguments, **named)
            self._took(step, time.perf_counter() - begun)
            if then is not None:
                then(at, result, *arguments)
            return result

        setattr(owner, name, outer)

    def time_plain(self, owner: Any, name: str, step: str) -> None:
        """Put a clock around a function that waits for nothing."""
        inner = getattr(owner, name)
        self.calls.append(step)

        @wraps(inner)
        def outer(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            result = inner(*arguments, **named)
            self._took(step, time.perf_counter() - begun)
            return result

        setattr(owner, name, outer)

    def _took(self, step: str, seconds: float) -> None:
        self.steps[f"{_task()}: {step}"].append(seconds)

    def collected(self, phase: str, _: Mapping[str, int]) -> None:
        """For gc.callbacks."""
        if phase == "start":
            self.begun_at = time.perf_counter()
        else:
            self.garbage["collections"] += 1
            self.garbage["seconds"] += time.perf_counter() - self.begun_at

    def write(self, path: Path) -> None:
        """All they show, in one piece."""
        tasks, calls = ["fetch", "flush", "relay"], self.calls
        steps = sorted(
            self.steps, key=lambda step: [_place(*pair) for pair in zip((tasks, calls), step.split(": "), strict=False)]
        )
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(
            json.dumps(
                {
                    "steps": {step: self.steps[step] for step in steps},
                    "requests": self.requests,
                    "marks": self.marks,
                    "garbage": self.garbage,
                }
            )
        )
        unfinished.rename(path)
        self.reset()


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _task() -> str:
    task = asyncio.current_task()
    return task.get_name() if task is not None else ""


def main() -> None:
    """Serve as ever, with clocks; SIGUSR1 writes what they show and sets them back."""
    clocks = Clocks()

    def polled(_: float, result: Any, *__: object) -> None:
        batches, _passed = result
        clocks.mark("polled", [record.key.decode() for batch in batches for record in batch.records if record.key])

    def session_had(at: float, *_: object) -> None:
        if _task() == "relay":
            clocks.turn = at
        elif _task() == "flush":
            clocks.free = at

    def recounted(at: float, _: object, __: object, campaigns: Sequence[UUID], *___: object) -> None:
        clocks.chunk = campaigns
        if _task() == "flush":
            clocks.mark("free", campaigns, clocks.free)
        clocks.mark("begun", campaigns, at)
        clocks.mark("recounted", campaigns)

    def committed(_: float, __: object, transaction: Any) -> None:
        if _task() == "flush" and not transaction._nested:
            clocks.mark("committed", clocks.chunk)

    def read(_: float, rows: Any, *__: object) -> None:
        campaigns = [row.campaign_id for row in rows]
        clocks.mark("turn", campaigns, clocks.turn)
        clocks.mark("read", campaigns)

    def published(_: float, __: object, ___: object, rows: Any) -> None:
        clocks.mark("acknowledged", [row.key.decode() for row in rows if row.key])

    clocks.time(broker.Source, "poll", "poll", polled)
    clocks.time_plain(pipeline.Pipeline, "_collect", "decode, validate, collect")
    clocks.time(PoolAcquireContext, "__aenter__", "session", session_had)
    clocks.time(Driver, "start", "BEGIN")
    clocks.time(database.Transaction, "recount", "recount", recounted)
    clocks.time(recount, "_guard", "guard")
    clocks.time_plain(recount, "decide", "decide, encode")
    clocks.time(database.Transaction, "save", "save", lambda *_: clocks.mark("saved", clocks.chunk))
    clocks.time(Driver, "commit", "COMMIT", committed)
    clocks.time(broker.Source, "commit", "commit offsets")
    clocks.time(database.Transaction, "lock_shards", "lock shards")
    clocks.time(database.Transaction, "read_outbox", "read outbox", read)
    clocks.time(broker.Publisher, "publish", "publish", published)
    clocks.time(database.Transaction, "finish_outbox", "finish outbox")
    send, run = AIOKafkaConnection.send, service.Service.run

    def counted(connection: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        clocks.requests[type(request).__name__.removesuffix("Request")] += 1
        return send(connection, request, *arguments, **named)

    async def running(self: service.Service, **named: Any) -> int:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, clocks.write, Path(os.environ[CLOCKS]))
        return await run(self, **named)

    AIOKafkaConnection.send = counted
    service.Service.run = running  # type: ignore[method-assign]
    gc.callbacks.append(clocks.collected)
    serve()


if __name__ == "__main__":
    main()
