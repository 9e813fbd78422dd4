"""The baseline: aiohttp on the same loop, with the shim's libraries imported, answering with the shim's bytes.

`server` is aiohttp's low-level server, `app` a `web.Application` with routes. Neither reads a request's body, knows a
token or counts anything. A GET of `/hang` is answered after an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sqlite3
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec
import prometheus_client
import uvloop
import yaml
from aiohttp import web

SAME_LIBRARIES = (aiohttp, click, msgspec, prometheus_client, sqlite3, ssl, yaml)
HANG_S = 3600.0
ACCEPTED = b'{"success":true}'
EMPTY = b'{"success":true,"commands":[],"status":"IDLE","poll_frequency":5}'
HEADERS = {"Content-Type": "application/json", "X-Request-Id": "8b1c3f52-1f"}


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    """The replies of a heartbeat and of an empty poll, byte for byte but for `Server`, which aiohttp adds."""
    if request.method == "POST":
        if request.headers.get("User-Agent", "").startswith("Go-http-client"):
            return web.Response(status=204, headers={"X-Request-Id": HEADERS["X-Request-Id"]})
        return web.Response(body=ACCEPTED, headers=HEADERS)
    if request.path.endswith("/hang"):
        await asyncio.sleep(HANG_S)
    return web.Response(body=EMPTY, headers=HEADERS)


async def serve(kind: str, ready_file: Path) -> None:
    options: dict[str, Any] = {"access_log": None, "keepalive_timeout": 120.0}
    if kind == "app":
        app = web.Application()
        app.router.add_post("/api/v1/clusters/agent/{cluster_id}/heartbeat", answer)
        app.router.add_get("/api/v1/clusters/agent/{cluster_id}/poll", answer)
        runner: web.AppRunner | web.ServerRunner = web.AppRunner(app, **options)
    else:
        runner = web.ServerRunner(web.Server(answer, **options))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1, backlog=1024)
    await site.start()
    host, port = runner.addresses[0][:2]
    temporary = ready_file.with_suffix(".new")
    temporary.write_text(json.dumps({"listen": f"{host}:{port}"}))
    temporary.replace(ready_file)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("server", "app"))
    parser.add_argument("--ready-file", type=Path, required=True)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(given.kind, given.ready_file))


if __name__ == "__main__":
    main()
