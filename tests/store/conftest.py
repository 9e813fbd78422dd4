"""Stores that are closed whatever becomes of the test."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.config import settings
from shim.store import CommitProbe, open_store
from shim.store.sqlite import SqliteStore
from tests.support.databases import TestedDatabase, database_at
from tests.support.stores import TIMEOUT_S, StoreClient, Stores, put


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name == "store-writer"] == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shim.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.needs("postgresql"))])
def database(request: pytest.FixtureRequest, tmp_path: Path, _no_thread_is_left: None) -> Iterator[TestedDatabase]:
    """An empty database of each engine."""
    place = str(tmp_path / "shim.db") if request.param == "sqlite" else str(request.getfixturevalue("pg_url"))
    database = database_at(place)
    yield database
    database.close()


@pytest.fixture
def stores(_no_thread_is_left: None) -> Iterator[Stores]:
    stores = Stores()
    yield stores
    stores.close()


@pytest.fixture
def client(path: Path) -> Iterator[StoreClient]:
    client = StoreClient(lambda post: SqliteStore(path, post, busy_timeout_s=0.05))
    client.open()
    yield client
    client.close()


class Gate:
    """A clock that holds the writer when it begins a batch, and keeps what it observes of the commits."""

    def __init__(self) -> None:
        self.commits: list[tuple[float, int]] = []
        self.switch_intervals_s: list[float] = []
        self._now = 0.0
        self._entered = threading.Event()
        self._open = threading.Event()
        self.probe = CommitProbe(
            self._monotonic, lambda commit_s, operations: self.commits.append((commit_s, operations))
        )

    def _monotonic(self) -> float:
        self._entered.set()
        assert self._open.wait(TIMEOUT_S)
        self.switch_intervals_s.append(sys.getswitchinterval())
        self._now += 1.5
        return self._now

    def wait_until_busy(self) -> None:
        assert self._entered.wait(TIMEOUT_S)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(path: Path, gate: Gate) -> Iterator[StoreClient]:
    """A store whose writer has taken one submission (id `first`) and waits at the gate."""
    client = StoreClient(lambda post: open_store(settings.Store(path=str(path)), post, gate.probe))
    client.open()
    client.submit(put("first"))
    gate.wait_until_busy()
    yield client
    gate.open()
    client.close()
