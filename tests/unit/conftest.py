"""What several files of these tests need around them."""

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from consumer import health as health_module
from consumer import pipeline as pipeline_module
from tests.unit.world import CHUNK


@pytest.fixture(scope="module")
def small_and_impatient() -> Iterator[None]:
    """For the pipeline: small chunks, and no waiting between tries."""
    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr(health_module, "FIRST_BACKOFF_S", 0.0)
        patch.setattr(pipeline_module, "CHUNK_CAMPAIGNS", CHUNK)
        patch.setattr(pipeline_module, "AHEAD_CAMPAIGNS", 2)
        patch.setattr(pipeline_module, "AHEAD_EVERY_S", 0.0)
        yield
