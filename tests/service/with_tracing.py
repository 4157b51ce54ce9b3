"""The service with an OpenTelemetry SDK that keeps its spans in memory and writes them at the end; for a test only."""

import json
import os
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from consumer.__main__ import main

exporter = InMemorySpanExporter()


def told(span: ReadableSpan) -> dict[str, Any]:
    """What a test asks of a span."""
    context = span.get_span_context()
    assert context is not None
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": None if span.parent is None else f"{span.parent.span_id:016x}",
        "links": [f"{link.context.trace_id:032x}" for link in span.links],
        "attributes": dict(span.attributes or {}),
        "status": f"{span.status.status_code.name} {span.status.description or ''}",
        "events": [f"{event.name} {dict(event.attributes or {})}" for event in span.events],
    }


if __name__ == "__main__":
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        main()
    finally:
        spans = [told(span) for span in exporter.get_finished_spans()]
        Path(os.environ["SPANS"]).write_text(json.dumps(spans))
