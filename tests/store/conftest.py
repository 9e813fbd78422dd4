"""Stores that are closed whatever becomes of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.natsd import NatsServer, running
from tests.support.stores import Stores


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name in {"store-writer", "store-nats"}] == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shim.db"


@pytest.fixture
def stores(_no_thread_is_left: None) -> Iterator[Stores]:
    stores = Stores()
    yield stores
    stores.close()


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS server for all tests that do nothing to it; needs nats-server."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    with running(server):
        yield server.url
