"""A controller that sends far more than a queue takes, against the real process: other agents do not wait for it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from shim.bridge.outbox import LOGGED_PER_MINUTE
from tests.support.processes import TOKEN, Shim

BASE = "/api/v1/clusters/agent"
FLOOD = 5000
MAX_QUEUED = 1000
DEADLINE_S = 60.0
FLOODED = "flooded"


class Flooder:
    """A controller that notes the order in which commands are answered and acknowledged."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self.codes: dict[str, str] = {}
        self._ws: asyncio.Future[web.WebSocketResponse] = asyncio.get_running_loop().create_future()
        self._grown = asyncio.Condition()

    async def connect(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(max_msg_size=0)
        await ws.prepare(request)
        if not self._ws.done():
            self._ws.set_result(ws)
        async for frame in ws:
            if frame.type is WSMsgType.TEXT:
                await self._take(ws, json.loads(frame.data))
        return ws

    async def _take(self, ws: web.WebSocketResponse, message: dict[str, Any]) -> None:
        payload, request_id = message["payload"], message.get("request_id", "")
        match message["type"]:
            case "register":
                reply = {"cluster_id": payload["name"]}
                await ws.send_json({"type": "register_success", "request_id": request_id, "payload": reply})
            case "heartbeat":
                await ws.send_json({"type": "heartbeat_ack", "request_id": request_id, "payload": {}})
            case "command_ack" | "command_result":
                self.codes[payload["command_id"]] = payload.get("code", "")
                async with self._grown:
                    self.answered.append(payload["command_id"])
                    self._grown.notify_all()

    async def send(self, **payload: Any) -> None:
        """Send one command."""
        ws = await self._ws
        await ws.send_json({"type": "command", "request_id": "r", "payload": payload})

    async def until(self, count: int) -> None:
        """Wait until so many commands have been acknowledged, refused or answered."""
        async with asyncio.timeout(DEADLINE_S), self._grown:
            await self._grown.wait_for(lambda: len(self.answered) >= count)


@asynccontextmanager
async def flooded(folder: Path, **sections: Any) -> AsyncIterator[tuple[Shim, Flooder, aiohttp.ClientSession]]:
    """A shim that serves the agents `flooded` and `other`, and their controller."""
    flooder = Flooder()
    app = web.Application()
    app.router.add_get("/{tail:.*}", flooder.connect)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    upstream = {"url": f"http://{host}:{port}", "token": TOKEN, "send_command_ack": True}
    config = {"upstream": upstream, "poll": {"hold": "off"}} | sections
    async with Shim(folder, config) as shim, aiohttp.ClientSession() as http:
        try:
            await shim.start()
            for name in (FLOODED, "other"):
                async with http.post(f"{shim.url}{BASE}/register", json={"agent_id": name, "name": name}) as reply:
                    assert reply.status == 200
            yield shim, flooder, http
        finally:
            await runner.cleanup()


async def result(http: aiohttp.ClientSession, shim: Shim, command_id: str) -> None:
    async with http.post(f"{shim.url}{BASE}/other/commands/{command_id}/result", json={"success": True}) as reply:
        assert reply.status < 300


async def test_another_agents_result_does_not_wait_for_a_flood(tmp_path: Path) -> None:
    async with flooded(tmp_path) as (shim, flooder, http):
        flood = asyncio.create_task(send(flooder, FLOOD))
        await flooder.until(MAX_QUEUED // 2)
        await result(http, shim, "in-the-flood")
        await flood
        await flooder.until(FLOOD + 1)
        assert flooder.answered.index("in-the-flood") < FLOOD - MAX_QUEUED
        refused = [name for name, code in flooder.codes.items() if code == "queue_full"]
        assert len(refused) == FLOOD - MAX_QUEUED
        assert set(refused) == {f"k{number}" for number in range(MAX_QUEUED, FLOOD)}
    with closing(sqlite3.connect(tmp_path / "agent-shim.db")) as connection:
        assert connection.execute("SELECT count(*) FROM commands").fetchone() == (MAX_QUEUED,)
        assert connection.execute("SELECT count(*) FROM outbox WHERE command_id <> 'in-the-flood'").fetchone() == (0,)


async def send(flooder: Flooder, count: int, **payload: Any) -> None:
    for number in range(count):
        await flooder.send(command_id=f"k{number}", cluster_id=FLOODED, **payload)


async def test_sigterm_during_a_flood_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    async with flooded(tmp_path) as (shim, flooder, _):
        flood = asyncio.create_task(send(flooder, FLOOD))
        await flooder.until(200)
        assert await shim.stop() == 0
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
        acked = {name for name, code in flooder.codes.items() if not code}
        assert len(acked) >= 200
    with closing(sqlite3.connect(tmp_path / "agent-shim.db")) as connection:
        stored = {name for (name,) in connection.execute("SELECT id FROM commands")}
    assert acked <= stored


async def test_huge_commands_that_have_expired_are_not_kept_in_memory(tmp_path: Path) -> None:
    async with flooded(tmp_path) as (shim, flooder, _):
        before_kib = rss_kib(shim.pid)
        for number in range(40):
            await flooder.send(
                command_id=f"k{number}", cluster_id=FLOODED, ttl_seconds=0, payload={"x": "x" * 5_000_000}
            )
        await flooder.until(40)
        assert set(flooder.codes.values()) == {"expired"}
        assert rss_kib(shim.pid) - before_kib < 60 * 1024
    assert (tmp_path / "agent-shim.db").stat().st_size < 1_000_000


def rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("field", ["command_id", "type"])
async def test_malformed_floods_fill_neither_disk_nor_log(tmp_path: Path, field: str) -> None:
    async with flooded(tmp_path) as (shim, flooder, _):
        long = {field: "x" * 10_000}
        for number in range(2000):
            await flooder.send(**({"command_id": f"k{number}", "cluster_id": FLOODED, "type": 5} | long))
        await flooder.until(2000)
        assert set(flooder.codes.values()) == {"malformed"}
        rejected = shim.events("command_rejected")
        first, last = (datetime.fromisoformat(rejected[at]["time"]) for at in (0, -1))
        minutes = 2 + (last - first).total_seconds() // 60  # a flood may begin at the end of one minute
        assert len(rejected) <= minutes * (LOGGED_PER_MINUTE + 1)
        assert sum(map(len, shim.lines)) < 200_000
    assert (tmp_path / "agent-shim.db").stat().st_size < 2_000_000
