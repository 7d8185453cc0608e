"""One engine and one server with default options for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_engine import AsyncEngine
from tests.server.live import ENGINE_OPTIONS, MODEL, LiveServer


@pytest.fixture(scope="session")
def engine() -> Iterator[AsyncEngine]:
    with AsyncEngine(MODEL, **ENGINE_OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="session")
def live(engine: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(engine) as server:
        yield server
