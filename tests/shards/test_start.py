"""What a replica needs before it starts, and what it says where that is missing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.natsd import NatsServer, publish, streams
from tests.support.processes import Shim
from tests.support.replicas import gateway

ONE_BRIDGE = """
import sys
from shim import app, config
import shim.compose
assert not [name for name in sys.modules if name.startswith(("nats", "shim.shards"))]
"""
NO_EXTRA = """
import sys
sys.modules["nats"] = None
from types import SimpleNamespace
from shim import config
from shim.compose import compose
from shim.errors import StoreError
settings = config.load(None, {}, ("store.url=nats://a", "shards.count=2"))
try:
    compose(SimpleNamespace(settings=settings), None)
except StoreError as error:
    print(error)
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_nothing_of_shards_is_imported_without_them() -> None:
    python(ONE_BRIDGE)


def test_the_missing_extra_is_named() -> None:
    assert "shards.count needs the extra agent-shim[nats]" in python(NO_EXTRA)


@pytest.mark.needs("nats-server")
async def test_an_agreement_that_cannot_be_read_ends_the_start(tmp_path: Path, nats: NatsServer) -> None:
    async with gateway(tmp_path, nats.url, count=2) as gate:
        (first,) = await gate.add("a")
        await gate.settled(first)
        names = set(await asyncio.to_thread(streams, nats.url))
    assert {"KV_agent-shim-leases", "KV_agent-shim-cluster", "agent-shim-s1-journal"} <= names
    await asyncio.to_thread(publish, nats.url, "$KV.agent-shim-cluster.config", b"nonsense")
    folder = tmp_path / "other"
    folder.mkdir()
    config = {"store": {"url": nats.url, "replicas": 1}, "shards": {"count": 2, "lease_s": 4}}
    async with Shim(folder, config) as shim:
        await shim.launch()
        assert await shim.wait() == 70
        (stopped,) = shim.events("stopped_by_fault")
        assert "cannot be read" in stopped["error"]
