"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from serve_app.engine.checkpoint import Checkpoint, resolve


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """The bundled demo model."""
    return resolve("demo")
