"""Stores that are closed whatever becomes of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stores import Stores


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name == "store-writer"] == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shim.db"


@pytest.fixture
def stores(_no_thread_is_left: None) -> Iterator[Stores]:
    stores = Stores()
    yield stores
    stores.close()
