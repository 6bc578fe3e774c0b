"""One engine for all tests that need no other."""

from collections.abc import Iterator

import pytest

from mythos_jax.serving.engine import Engine
from mythos_jax.serving.options import EngineOptions
from tests.serving.engines import started
from tests.tiny import OURO


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    engine = started(OURO, EngineOptions(places=4, prefill_chunk=16, queue=300))
    yield engine
    engine.close(drain=False)
