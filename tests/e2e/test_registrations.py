"""What a registration tells about an agent is kept over a crash of the real process, and its token is not."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tests.support.processes import TOKEN, Shim

WAIT_S = 40.0
CLUSTER = "c-of-the-conflict"
SERVICE_TOKEN = "service-token-of-the-agent"

pytestmark = pytest.mark.timeout(120)

Answer = Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]


class Controller:
    """A controller that answers each message as `answer` says, and notes the registrations."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._registers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def connect(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for frame in ws:
            message = json.loads(frame.data) if frame.type is WSMsgType.TEXT else {}
            if message.get("type") in ("register", "heartbeat"):
                kind, payload = self.answer(message)
                await ws.send_json({"type": kind, "request_id": message["request_id"], "payload": payload})
            if message.get("type") == "register":
                self._registers.put_nowait(message["payload"])
        return ws

    def forget(self) -> None:
        """Forget the registrations so far."""
        while not self._registers.empty():
            self._registers.get_nowait()

    async def next_register(self) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            return await self._registers.get()


@asynccontextmanager
async def served(folder: Path, answer: Answer) -> AsyncIterator[tuple[Shim, Controller, aiohttp.ClientSession]]:
    controller, app = Controller(answer), web.Application()
    app.router.add_get("/api/v1/clusters/agent/ws", controller.connect)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream = {"url": f"http://127.0.0.1:{runner.addresses[0][1]}", "token": TOKEN, "heartbeat_interval_s": 0.1}
    async with Shim(folder, {"upstream": upstream}) as shim, aiohttp.ClientSession() as http:
        try:
            await shim.start()
            yield shim, controller, http
        finally:
            await runner.cleanup()


async def until_stored(folder: Path) -> None:
    """Wait until a session with its name is on disk: an agent is answered before, and a kill may come in between."""
    async with asyncio.timeout(WAIT_S):
        with closing(sqlite3.connect(folder / "agent-shim.db")) as database:
            found = "SELECT count(*) FROM sessions WHERE instr(CAST(registration AS TEXT), 'prod')"
            while not database.execute(found).fetchone()[0]:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def post(http: aiohttp.ClientSession, shim: Shim, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with http.post(shim.url + path, json=body) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None


async def test_what_a_conflict_tells_about_an_agent_survives_a_crash(tmp_path: Path) -> None:
    """Without its name the agent could not be registered later: it has a cluster id, and never registers again."""

    def conflict(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if message["type"] == "heartbeat":
            return "error", {"error": "cluster not found"}
        return "error", {"error": "the name is already taken", "code": 409, "cluster_id": CLUSTER}

    def success(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if message["type"] == "heartbeat":
            return "error", {"error": "cluster not found"}
        return "register_success", {"cluster_id": CLUSTER}

    register = {"agent_id": "pod-1", "name": "prod", "k8s_version": "1.31", "labels": {"zone": "a"}}
    beat = f"/api/v1/clusters/agent/{CLUSTER}/heartbeat"
    async with served(tmp_path, conflict) as (shim, controller, http):
        status, body = await post(http, shim, "/api/v1/clusters/agent/register", register)
        assert (status, body["cluster_id"]) == (409, CLUSTER)
        await controller.next_register()
        assert (await post(http, shim, beat, {"status": "healthy"}))[0] == 200
        await until_stored(tmp_path)
        await shim.kill()
        controller.answer = success
        controller.forget()
        await shim.start()
        assert (await post(http, shim, beat, {"status": "healthy"}))[0] == 200
        again = await controller.next_register()
    expected = {"name": "prod", "k8s_version": "1.31", "labels": {"zone": "a"}, "cluster_id": CLUSTER}
    assert {key: again.get(key) for key in expected} == expected
    assert not shim.events("name_unknown")


async def test_the_token_in_a_heartbeat_is_used_after_a_restart_and_never_stored(tmp_path: Path) -> None:
    """Agents of generation B3 send their service account's token with every heartbeat."""

    def success(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return ("heartbeat_ack", {}) if message["type"] == "heartbeat" else ("register_success", {"cluster_id": "c-1"})

    register = {"agent_id": "pod-1", "cluster_name": "prod", "k8s_service_token": SERVICE_TOKEN}
    beat = {"status": "healthy", "cluster_id": "c-1", "token": SERVICE_TOKEN}
    async with served(tmp_path, success) as (shim, controller, http):
        assert (await post(http, shim, "/clusters/pod-1", register))[0] == 200
        assert (await controller.next_register())["k8s_service_token"] == SERVICE_TOKEN
        assert (await post(http, shim, "/clusters/pod-1/heartbeat", beat))[0] == 200
        await until_stored(tmp_path)
        await shim.kill()
        await shim.start()
        assert (await post(http, shim, "/clusters/pod-1/heartbeat", beat))[0] == 200
        again = await controller.next_register()
        assert (again["name"], again["k8s_service_token"]) == ("prod", SERVICE_TOKEN)
        async with http.get(f"{shim.admin}/status.json") as status:
            assert SERVICE_TOKEN not in await status.text()
        stored = contents(tmp_path)
        assert "agent-shim.db" in stored
        assert [name for name, data in stored.items() if SERVICE_TOKEN.encode() in data] == []
    assert not [line for line in shim.lines if SERVICE_TOKEN in line]
