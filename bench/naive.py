"""A naive shim as a baseline: each legacy call becomes a message, commands wait in a dict, nothing is held.

It works as long as nothing goes wrong. It keeps no command over a restart, takes a poll's reply for delivered when it
was made, knows nothing of tokens, duplicates, expiry, gateways or agents that died, and sends a heartbeat up for each
that comes in. It is here so that the price of all that can be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import uuid
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

PATH = "/api/v1/clusters/agent"
REGISTER_S = 25.0
RECONNECT_S = 1.0


class Bridge:
    """One WebSocket, and what came over it."""

    def __init__(self, upstream: str, token: str) -> None:
        self._url = f"{upstream}{PATH}/ws"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._commands: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._pending: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Connect, read, connect again."""
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.ws_connect(self._url, headers=self._headers, heartbeat=25) as ws:
                        self._ws = ws
                        self.connected.set()
                        async for frame in ws:
                            await self._take(json.loads(frame.data))
                self._ws = None
                await asyncio.sleep(RECONNECT_S)

    async def _take(self, message: dict[str, Any]) -> None:
        payload = message.get("payload") or {}
        match message.get("type"):
            case "command":
                command_id = payload.get("command_id") or message.get("request_id")
                command = {"id": command_id, "type": payload.get("type"), "payload": payload.get("payload", {})}
                command["created_at"] = message.get("timestamp")
                self._commands[payload.get("cluster_id", "")].append(command)
            case "register_success" | "error":
                waiting = self._pending.pop(message.get("request_id", ""), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
            case "ping":
                await self._send("pong", {}, message.get("request_id", ""))

    async def _send(self, kind: str, payload: dict[str, Any], request_id: str = "") -> None:
        if self._ws is None:
            raise web.HTTPServiceUnavailable
        now = datetime.now(UTC).isoformat()
        await self._ws.send_json({"type": kind, "request_id": request_id, "payload": payload, "timestamp": now})

    async def register(self, request: web.Request) -> web.Response:
        request_id = uuid.uuid4().hex
        answer = self._pending[request_id] = asyncio.get_running_loop().create_future()
        await self._send("register", await request.json(), request_id)
        async with asyncio.timeout(REGISTER_S):
            message = await answer
        if message["type"] == "error":
            return web.json_response({"success": False, "error": message["payload"].get("error")}, status=502)
        found = message["payload"]
        return web.json_response({"success": True, **found, "cluster": {"id": found["cluster_id"]}})

    async def heartbeat(self, request: web.Request) -> web.Response:
        await self._send("heartbeat", await request.json(), uuid.uuid4().hex)
        return web.json_response({"success": True})

    async def poll(self, request: web.Request) -> web.Response:
        commands = self._commands.pop(request.match_info["cluster_id"], [])
        return web.json_response({"success": True, "commands": commands, "status": "IDLE", "poll_frequency": 5})

    async def result(self, request: web.Request) -> web.Response:
        ids = {"cluster_id": request.match_info["cluster_id"], "command_id": request.match_info["command_id"]}
        await self._send("command_result", ids | await request.json())
        return web.json_response({"success": True})


async def serve(upstream: str, token: str, ready_file: Path) -> None:
    """Serve until SIGTERM."""
    bridge = Bridge(upstream, token)
    app = web.Application()
    app.router.add_post(f"{PATH}/register", bridge.register)
    app.router.add_post(f"{PATH}/{{cluster_id}}/heartbeat", bridge.heartbeat)
    app.router.add_get(f"{PATH}/{{cluster_id}}/poll", bridge.poll)
    app.router.add_post(f"{PATH}/{{cluster_id}}/commands/{{command_id}}/result", bridge.result)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=120.0, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    host, port = runner.addresses[0][:2]
    reading = asyncio.create_task(bridge.run())
    await bridge.connected.wait()
    temporary = ready_file.with_suffix(".new")
    temporary.write_text(json.dumps({"listen": f"{host}:{port}"}))
    temporary.replace(ready_file)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    reading.cancel()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(given.upstream, given.token, given.ready_file))


if __name__ == "__main__":
    main()
