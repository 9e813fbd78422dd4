"""Stores that are closed whatever becomes of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import TestedDatabase, database_at
from tests.support.stores import Stores


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
