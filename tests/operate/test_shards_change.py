"""The number of shards is changed as docs/operations.md says: two that differ do not run together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.support.natsd import NatsServer, running, streams
from tests.support.processes import Shim

pytestmark = pytest.mark.needs("nats-server")

NOWHERE = {"url": "http://127.0.0.1:9", "token": "t"}
CONFIG_FAULT = 2


def replica(folder: Path, name: str, server: NatsServer, count: int) -> Shim:
    own = folder / name
    own.mkdir()
    config: dict[str, Any] = {
        "store": {"url": server.url, "replicas": 1},
        "upstream": NOWHERE,
        "shards": {"count": count, "replica": name},
    }
    return Shim(own, config)


async def delete_all(url: str) -> list[str]:
    """What an operator does with `nats stream rm`."""
    found = sorted(await asyncio.to_thread(streams, url))
    connection = await nats.connect(url)
    try:
        for name in found:
            await connection.jetstream().delete_stream(name)
    finally:
        await connection.close()
    return found


async def test_another_number_of_shards_needs_the_old_ones_gone(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    with running(server):
        async with replica(tmp_path, "old", server, 2) as old, replica(tmp_path, "new", server, 3) as new:
            await old.start()
            await old.event("shard_taken", shard=1)
            await new.launch()
            assert await new.wait() == CONFIG_FAULT
            assert any("shards.count" in line and "2" in line for line in new.lines)
            assert await old.stop() == 0
            found = await delete_all(server.url)
            assert all(name.removeprefix("KV_").startswith("agent-shim-") for name in found)
            await new.start()
            await new.event("shard_taken", shard=2)
