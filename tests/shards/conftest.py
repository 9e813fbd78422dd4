"""A NATS server of each test's own: replicas share everything that is on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.natsd import NatsServer, running


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats", "max_payload: 65536\n")
    (tmp_path / "nats").mkdir()
    with running(server):
        yield server
