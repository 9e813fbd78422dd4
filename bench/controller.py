"""A controller that does nothing but its part, so that it is not what is measured: accepts, acknowledges, sends.

It takes one job per line on stdin, as JSON, and answers each with a line on stdout when it is over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from aiohttp import WSMsgType, web

ACKED_S = 60.0


class Send(msgspec.Struct):
    """Send `count` commands in turn to `clusters`, `rate_hz` a second (0: all at once).

    The answer is `{"sent": {id: monotonic seconds}, "acked_s": …}`: `acked_s` from the first send to the last
    `command_ack`, or `command_result` of a refused one, 0 if not `acked`.
    """

    clusters: list[str]
    count: int
    rate_hz: float
    stem: str
    acked: bool = False


class Controller:
    """All connections, and what is known of them."""

    def __init__(self) -> None:
        self._sockets: list[web.WebSocketResponse] = []
        self._carries: dict[str, web.WebSocketResponse] = {}  # by cluster
        self._acks: set[str] = set()
        self._acked = asyncio.Event()
        self._connected = asyncio.Event()

    async def connect(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(max_msg_size=0)
        await ws.prepare(request)
        self._sockets.append(ws)
        self._connected.set()
        async for frame in ws:
            if frame.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await self._take(ws, msgspec.json.decode(frame.data))
        self._sockets.remove(ws)
        return ws

    async def _take(self, ws: web.WebSocketResponse, message: dict[str, Any]) -> None:
        if cluster_id := (message.get("payload") or {}).get("cluster_id"):
            self._carries[cluster_id] = ws
        match message["type"]:
            case "register":
                payload = message["payload"]
                found = {"cluster_id": payload.get("cluster_id") or payload["name"], "status": "registered"}
                await self._say(ws, "register_success", message.get("request_id", ""), found)
            case "heartbeat":
                await self._say(ws, "heartbeat_ack", message.get("request_id", ""), {})
            case "command_ack" | "command_result":
                self._acks.add(message["payload"]["command_id"])
                self._acked.set()

    async def _say(self, ws: web.WebSocketResponse, kind: str, request_id: str, payload: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        message = {"type": kind, "request_id": request_id, "payload": payload, "timestamp": now}
        await ws.send_str(msgspec.json.encode(message).decode())

    async def send(self, job: Send) -> dict[str, Any]:
        await self._connected.wait()
        sent, start_s = {}, time.monotonic()
        self._acks.clear()
        for number in range(job.count):
            if job.rate_hz:
                await asyncio.sleep(start_s + number / job.rate_hz - time.monotonic())
            command_id = f"{job.stem}-{number}"
            cluster_id = job.clusters[number % len(job.clusters)]
            payload = {"command_id": command_id, "type": "scale", "payload": {"n": number}, "cluster_id": cluster_id}
            sent[command_id] = time.monotonic()
            ws = self._carries.get(cluster_id, self._sockets[-1])
            await self._say(ws, "command", command_id, payload)
        async with asyncio.timeout(ACKED_S):
            while job.acked and len(self._acks) < job.count:
                self._acked.clear()
                await self._acked.wait()
        return {"sent": sent, "acked_s": time.monotonic() - start_s if job.acked else 0.0}

    async def work(self) -> None:
        """Do the jobs of stdin until it ends."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            try:
                answer = await self.send(msgspec.json.decode(line, type=Send))
            except Exception as error:  # noqa: BLE001 - it is told
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)


async def serve(ready_file: Path) -> None:
    controller = Controller()
    app = web.Application()
    app.router.add_get("/{tail:.*}", controller.connect)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    temporary = ready_file.with_suffix(".new")
    temporary.write_text(json.dumps({"listen": f"{host}:{port}"}))
    temporary.replace(ready_file)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    work = asyncio.create_task(controller.work())
    await stop.wait()
    work.cancel()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-file", type=Path, required=True)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(given.ready_file))


if __name__ == "__main__":
    main()
