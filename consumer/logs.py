"""Logs: one JSON object a line."""

import logging
import time
from types import TracebackType
from typing import Final, TextIO

import structlog

from consumer.errors import stacks_of

CLIENT_LINE_EVERY_S: Final = 60.0


class _Sparing(logging.Filter):
    """While brokers are away their client logs a hundred lines a second: each kind of line passes once a minute.

    Our own lines all pass: they are written once per change of state.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written."""
        if not record.name.startswith("aiokafka"):
            return True
        kind = f"{record.name}:{record.lineno}"
        if time.monotonic() - self._passed_at.get(kind, -CLIENT_LINE_EVERY_S) < CLIENT_LINE_EVERY_S:
            return False
        self._passed_at[kind] = time.monotonic()
        return True


def _exception(exc_info: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
    """What stands under `exception`, also for libraries' lines: without messages, which may quote what was read."""
    return stacks_of(exc_info[1])


def configure(stream: TextIO, level: str) -> None:
    """Write everything, also what libraries log, to `stream` from `level` on. Call once, before anything logs."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.ExceptionRenderer(_exception),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Sparing())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.getLogger("aiokafka").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
