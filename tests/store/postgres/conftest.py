"""A server of the test's own, and stores that are closed. The driver is an extra: it is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def server() -> Iterator[Any]:
    """A server of the test's own, to be ill-treated."""
    from tests.support import postgres  # noqa: PLC0415

    with postgres.running() as server:
        yield server


@pytest.fixture(autouse=True)
def _closed(_no_thread_is_left: None) -> Iterator[None]:
    from tests.support.postgres_stores import OPEN  # noqa: PLC0415

    yield
    while OPEN:
        OPEN.pop().close()
