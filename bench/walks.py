"""Count the calls, files and depth of the seven walks through shim/: `make walks`.

A real shim, a development controller and one agent run in this process; every call of a function in shim/ is counted
while one event is carried through. Nothing is timed, so the figures do not depend on the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import shim
from devtools.controller.server import DevController
from shim import app
from shim.config import loader
from shim.log import setup

IDLE_S = 6.0  # longer than the interval of the periodic tasks that look after links and sessions
ROOT = str(Path(shim.__file__).parent) + os.sep
TOKEN = "walks-token"  # noqa: S105 - for the controller of this process
BASE = "/api/v1/clusters/agent"
BODY = {"cluster_id": "c-1", "agent_id": "a-1", "status": "healthy", "tunnel_status": "disconnected"}


@dataclass
class Walk:
    """Calls into shim/ of one event: their number, the files entered, changes from file to file, the deepest stack.

    `turns` are the callbacks of the event loop, each with its calls as (file, function, depth).
    """

    name: str
    turns: list[list[tuple[str, str, int]]] = field(default_factory=list)
    calls: int = 0
    files: set[str] = field(default_factory=set)
    changes: int = 0
    depth: int = 0

    def enter(self, frame: FrameType) -> None:
        """Record one call."""
        depth = 0
        above: FrameType | None = frame
        while above is not None:
            depth += above.f_code.co_filename.startswith(ROOT)
            above = above.f_back
        if depth == 1:
            self.turns.append([])
        self.turns[-1].append((frame.f_code.co_filename, frame.f_code.co_qualname, depth))

    def kinds(self) -> set[tuple[str, ...]]:
        """Return the kinds of turns: the names of their first functions."""
        return {_kind(turn) for turn in self.turns}

    def count(self, periodic: set[tuple[str, ...]]) -> None:
        """Count the calls, without turns of these kinds."""
        last = ""
        for name, _, depth in chain.from_iterable(turn for turn in self.turns if _kind(turn) not in periodic):
            self.calls += 1
            self.files.add(name)
            self.changes += name != last
            self.depth = max(self.depth, depth)
            last = name


def _kind(turn: list[tuple[str, str, int]]) -> tuple[str, ...]:
    return tuple(name for _, name, _ in turn[:4])


class Tracer:
    """Counts the calls of the event loop's thread while a walk is under way.

    Timers of the shim also fire while nothing happens. `idle` learns which, and no walk counts them.
    """

    def __init__(self) -> None:
        self.walk: Walk | None = None
        self._periodic: set[tuple[str, ...]] = set()
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if self.walk is None or event != "call" or code.co_name.startswith("<"):
            return
        if code.co_filename.startswith(ROOT):
            self.walk.enter(frame)

    async def idle(self) -> None:
        """Learn the turns of the event loop that no event causes."""
        walk = await self.follow("idle", lambda: asyncio.sleep(IDLE_S))
        # Callbacks of the store all begin alike, so those of a periodic write cannot be told from those of an event.
        self._periodic = {kind for kind in walk.kinds() if not kind[0].startswith("CallbackQueue.")}

    async def follow(self, name: str, event: Callable[[], Awaitable[Any]]) -> Walk:
        """Count the calls until `event` has been carried through and the loop has nothing left of it."""
        await asyncio.sleep(0.2)
        walk = self.walk = Walk(name)
        await event()
        await asyncio.sleep(0.1)
        self.walk = None
        walk.count(self._periodic)
        return walk


class Agent:
    """One legacy agent on one connection."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, method: str, path: str, body: dict[str, Any] | None = None, *, pieces: int = 1) -> None:
        """Write a request in so many segments."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Length: {len(data)}\r\n"
        whole = head.encode() + b"User-Agent: Go-http-client/1.1\r\n\r\n" + data
        for at in range(pieces):
            self._streams[1].write(whole[len(whole) * at // pieces : len(whole) * (at + 1) // pieces])
            await self._streams[1].drain()
            await asyncio.sleep(0.02 * (pieces > 1))

    async def reply(self) -> dict[str, Any]:
        """Read a reply and return its JSON."""
        assert self._streams is not None
        head = (await self._streams[0].readuntil(b"\r\n\r\n")).decode().lower()
        size = next(
            (int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length")), 0
        )
        body = await self._streams[0].readexactly(size)
        found: dict[str, Any] = json.loads(body) if body else {}
        return found

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, pieces: int = 1
    ) -> dict[str, Any]:
        """Send a request and read its reply."""
        await self.send(method, path, body, pieces=pieces)
        return await self.reply()


async def start(folder: Path, controller: DevController) -> tuple[app.App, asyncio.Future[int]]:
    """Run a shim in this event loop."""
    sets = [
        *(f"upstream.url={controller.url}", f"upstream.token={TOKEN}", "listen.port=0", "admin.port=0"),
        *(f"store.path={folder / 'walks.db'}", "log.level=error", "poll.hold=10"),
    ]
    settings = loader.load(None, {}, sets)
    running = app.App(settings, lambda: settings, setup("error", "json"))
    task = asyncio.ensure_future(running.run())
    await running.ready.wait()
    return running, task


async def follow_agent(tracer: Tracer, agent: Agent, controller: DevController) -> list[Walk]:
    """Follow registration, heartbeats, a held poll, a command with its result, and a reconnect."""
    register = {"agent_id": "a-1", "name": "walks", "k8s_version": "v1.28.0"}
    found = [await tracer.follow("registration", lambda: agent.call("POST", f"{BASE}/register", register))]
    cluster = (await agent.call("POST", f"{BASE}/register", register))["cluster_id"]
    path, beat = f"{BASE}/{cluster}", {**BODY, "cluster_id": cluster}

    def heartbeat(pieces: int = 1) -> Awaitable[Any]:
        return agent.call("POST", f"{path}/heartbeat", beat, pieces=pieces)

    await heartbeat()
    await heartbeat()
    await tracer.idle()
    found.append(await tracer.follow("heartbeat, coalesced, whole", heartbeat))
    found.append(await tracer.follow("heartbeat, in two segments", lambda: heartbeat(2)))
    found.append(await tracer.follow("poll arrives, is held", lambda: agent.send("GET", f"{path}/poll")))
    replies: list[dict[str, Any]] = []

    async def command() -> None:
        await controller.push_command(cluster_id=cluster)
        replies.append(await agent.reply())

    async def reconnect() -> None:
        seen = controller.history.last_n
        controller.drop()
        await controller.received("register", after=seen, timeout_s=20)
        await asyncio.sleep(0.5)

    found.append(await tracer.follow("command: frame to written", command))
    result = f"{path}/commands/{replies[0]['commands'][0]['id']}/result"
    answer = {"success": True, "output": "done"}
    found.append(await tracer.follow("evidence and result to closed", lambda: agent.call("POST", result, answer)))
    await heartbeat()
    found.append(await tracer.follow("reconnect: loss to online", reconnect))
    return found


async def walks(folder: Path) -> list[Walk]:
    """Follow the seven events on a shim of this process."""
    async with DevController([TOKEN]) as controller:
        tracer = Tracer()
        running, task = await start(folder, controller)
        host, _, port = running.addresses["listen"].rpartition(":")
        try:
            return await follow_agent(tracer, Agent(host, int(port)), controller)
        finally:
            sys.setprofile(None)
            running.stop_requested.set()
            await task


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(walks(Path(folder)))
    print("| walk | calls | files | changes of file | depth |\n|---|--:|--:|--:|--:|")
    for walk in found:
        print(f"| {walk.name} | {walk.calls} | {len(walk.files)} | {walk.changes} | {walk.depth} |")


if __name__ == "__main__":
    main()
