"""Floods of docs/concepts/threat-model.md#bounds against a process with the chart's memory limit.

The kernel kills nothing, and meanwhile another agent's heartbeats and the kubelet's probes are never refused.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import select
import signal
import socket
import sqlite3
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import yaml

from tests.security.raw_client import Line, Reply, ask, request
from tests.support.cgroup import memory_cgroup
from tests.support.processes import TOKEN, UNMEASURED, Controller, Shim, world

ROOT = Path(__file__).parents[2]
BASE = "/api/v1/clusters/agent"
UNITS = {"Mi": 2**20, "Gi": 2**30}
LINES = "".join(f"X-{number}: {'x' * 15_000}\r\n" for number in range(2)).encode()
SEND_S = 3.0
PUSHERS = 20
GONE_S = 60.0
ESTABLISHED = 1
NEW_CONNECTION = "heartbeat on a new connection"


def chart_limit_bytes() -> int:
    """Return the memory limit that the chart gives the container."""
    text: str = yaml.safe_load((ROOT / "helm/agent-shim/values.yaml").read_text())["resources"]["limits"]["memory"]
    return int(text[:-2]) * UNITS[text[-2:]]


def head(path: str, lines: bytes = b"") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + lines + b"\r\n"


class Flood:
    """An attacker with many connections to both ports, or with the controller in its hands."""

    def __init__(self, shim: Shim, controller: Controller, context: ssl.SSLContext | None = None) -> None:
        self.context = context
        self.shim = shim
        self.controller = controller
        self.lines: list[Line] = []
        self.mutes: list[socket.socket] = []

    def close(self) -> None:
        for one in (*self.lines, *self.mutes):
            one.close()

    async def opens(self, address: str, number: int) -> list[Line]:
        lines = [await Line.to(address) for _ in range(number)]
        self.lines += lines
        return lines

    async def sends(self, address: str, number: int, data: Callable[[int], bytes]) -> None:
        """Send on so many connections at once, as far as the peer takes it."""

        async def one(index: int, line: Line) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(SEND_S):
                    await line.send(data(index))

        lines = await self.opens(address, number)
        await asyncio.gather(*(one(index, line) for index, line in enumerate(lines)))

    async def sends_and_never_reads(self, address: str, number: int, data: bytes) -> list[socket.socket]:
        """Send on so many connections as far as the peer takes it, and read nothing of its answers."""
        loop = asyncio.get_running_loop()
        host, _, port = address.removeprefix("http://").rpartition(":")

        async def one() -> socket.socket:
            mute = socket.socket()
            self.mutes.append(mute)
            mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            mute.setblocking(False)
            await loop.sock_connect(mute, (host, int(port)))
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(SEND_S):
                    await loop.sock_sendall(mute, data)
            return mute

        return await asyncio.gather(*(one() for _ in range(number)))

    async def pushes(self, number: int, text: Callable[[int], str]) -> None:
        """Have the controller send so many frames."""
        await self.controller.until(type="heartbeat")

        async def some(first: int) -> None:
            for index in range(first, number, PUSHERS):
                await self.controller.control("POST", "/control/send", {"text": text(index)})

        await asyncio.gather(*(some(first) for first in range(PUSHERS)))

    async def asks(self, number: int, rounds: int, data: Callable[[int, int], bytes]) -> None:
        """Make requests one after the other on each of so many connections."""

        async def one(index: int, line: Line) -> None:
            for turn in range(rounds):
                await line.send(data(index, turn))
                if not (await line.reply()).status:
                    return

        lines = await self.opens(self.shim.url, number)
        await asyncio.gather(*(one(index, line) for index, line in enumerate(lines)))


async def requests_behind_held_polls(it: Flood) -> None:
    await it.sends(it.shim.url, 100, lambda n: head(f"{BASE}/p{n // 8}/poll") + head("/api/v1/health", LINES) * 200)


async def unfinished_heads(it: Flood) -> None:
    await it.sends(it.shim.url, 1900, lambda _: head("/", LINES)[:-2])


async def unfinished_bodies(it: Flood) -> None:
    await it.sends(it.shim.url, 1200, lambda n: request("POST", f"{BASE}/s{n}/heartbeat", body=b"x" * 900_000)[:-1])


async def large_bodies_at_once(it: Flood) -> None:
    await it.sends(it.shim.url, 1200, lambda _: request("POST", f"{BASE}/s/heartbeat", body=b'"' + b"x" * 200_000))


async def bodies_of_many_values(it: Flood) -> None:
    body = b'{"pods":[' + b"[]," * 1_300_000 + b"[]]}"
    await it.asks(20, 1, lambda n, _: request("POST", f"/api/v1/agents/v{n}/status", body=body))


async def agents_with_large_heartbeats(it: Flood) -> None:
    body = json.dumps({"metadata": {"a": "x" * 60_000}}).encode()
    await it.asks(50, 30, lambda n, turn: request("POST", f"{BASE}/a{n}-{turn}/heartbeat", body=body))


async def compressed_bodies(it: Flood) -> None:
    bomb = gzip.compress(b'{"a":"' + b"x" * 50_000_000 + b'"}', 9)
    await it.sends(
        it.shim.url, 200, lambda n: request("POST", f"{BASE}/b{n}/heartbeat", "Content-Encoding: gzip", body=bomb)
    )


async def the_admin_port(it: Flood) -> None:
    await it.sends(it.shim.admin, 64, lambda _: head("/healthz") + head("/metrics", LINES) * 200)
    await it.sends(it.shim.admin, 200, lambda _: head("/", LINES)[:-2])
    await it.sends(it.shim.admin, 60, lambda _: head("/uplot.js") * 1000)


async def connections_beyond_the_maximum(it: Flood) -> None:
    await it.sends(it.shim.url, 2600, lambda _: b"")


async def registrations_with_many_labels(it: Flood) -> None:
    labels = {f"label-{number}": "x" * 20 for number in range(1900)}
    bodies = {"name": "x" * 256, "labels": labels}

    def register(n: int, turn: int) -> bytes:
        return request("POST", f"{BASE}/register", body=json.dumps({"agent_id": f"l{n}-{turn}", **bodies}).encode())

    await it.asks(40, 10, register)


async def large_results(it: Flood) -> None:
    body = json.dumps({"success": True, "output": "x" * 500_000}).encode()
    await it.asks(20, 10, lambda n, turn: request("POST", f"{BASE}/r{n}/commands/k{turn}/result", body=body))


async def frames_that_are_no_messages(it: Flood) -> None:
    values = "[]," * 1_000_000
    frames = (
        "x" * 4_000_000,
        f"[{values}[]]",
        f'{{"type": "command", "payload": [{values}[]]}}',
        f'{{"type": "command", "payload": {{"command_id": "k", "payload": [{values}[]]}}}}',
        f'{{"type": "{"x" * 4_000_000}"}}',
    )
    await it.pushes(20, lambda n: frames[n % len(frames)])


async def commands_that_are_malformed(it: Flood) -> None:
    spec = {"type": "command", "payload": {"command_id": "x" * 100_000, "cluster_id": "y" * 100_000, "type": 7}}
    await it.pushes(1200, lambda _: json.dumps(spec))


async def silent_handshakes(it: Flood) -> None:
    await it.sends(it.shim.url, 1000, lambda n: b"\x16\x03\x01\x02" if n % 2 else b"")


async def completed_handshakes(it: Flood) -> None:
    async def one() -> None:
        it.lines.append(await Line.to(it.shim.url, it.context))

    for _ in range(18):
        await asyncio.gather(*(one() for _ in range(50)))


async def status_reports_that_wait(it: Flood) -> None:
    body = json.dumps({"pods": "x" * 900_000}).encode()
    await it.asks(30, 4, lambda n, _: request("POST", f"/api/v1/agents/s{n}/status", body=body))


async def chunked_bodies_of_empty_lines(it: Flood) -> None:
    start = request("POST", f"{BASE}/e/heartbeat", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    await it.sends(it.shim.url, 400, lambda _: start + b"\r\n" * 100_000)


async def requests_of_one_agent(it: Flood) -> None:
    await it.sends(it.shim.url, 1000, lambda _: head(f"{BASE}/one/poll"))


async def replies_that_nobody_reads(it: Flood) -> None:
    await it.sends_and_never_reads(it.shim.url, 100, head("/api/v1/health") * 2000)


async def numbers_that_are_slow_to_decode(it: Flood) -> None:
    body = b'{"success":true,"output":[' + b"1.5e300," * 100_000 + b"1]}"
    await it.asks(10, 4, lambda n, turn: request("POST", f"{BASE}/n{n}/commands/k{turn}/result", body=body))


async def events_that_nobody_reads(it: Flood) -> None:
    """More readers than connections are allowed; all of them are gone in the end, without an operator's help."""
    body = json.dumps({"version": "x" * 200, "status": "y" * 200}).encode()
    await it.asks(20, 10, lambda n, turn: request("POST", f"{BASE}/a{n}-{turn}/heartbeat", body=body))
    for reader in await it.sends_and_never_reads(it.shim.admin, 80, head("/events")):
        await is_gone(reader)


async def is_gone(reader: socket.socket) -> None:
    """Wait until the peer has closed a connection of which nothing is read."""
    ended = select.epoll()  # not the event loop's: that would report the bytes that wait all the time
    ended.register(reader, select.EPOLLRDHUP)
    try:
        await asyncio.to_thread(ended.poll, GONE_S)
    finally:
        ended.close()
    assert reader.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED


async def large_bodies_to_the_admin_port(it: Flood) -> None:
    await it.sends(it.shim.admin, 200, lambda _: request("POST", "/drain", body=b"x" * 900_000))


async def tunnel_states(it: Flood) -> None:
    """The largest states that are kept, in every form, for as many agents as there are."""
    await it.asks(20, 20, lambda n, turn: request("POST", f"{BASE}/t{n}-{turn}/heartbeat", body=b"{}"))
    forwards = ([{"name": "x" * 30_000, "remote_port": 1}], [[]] * 20_000, [{}] * 20_000, [1] * 30_000)

    def state(n: int) -> str:
        payload = {"cluster_id": f"t{n // 20 % 20}-{n % 20}", "status": "REQUIRED", "forwards": forwards[n % 4]}
        return json.dumps({"type": "tunnel_status", "payload": payload})

    await it.pushes(800, state)


async def unknown_types_and_long_request_ids(it: Flood) -> None:
    def message(n: int) -> str:
        kind = ("ping", f"unknown-{n}" + "x" * 50_000, "proxy_request", "register_success", "error")[n % 5]
        return json.dumps({"type": kind, "request_id": "y" * 100_000, "payload": {"error": "z" * 100_000}})

    await it.pushes(800, message)


async def commands_for_one_agent(it: Flood) -> None:
    def command(n: int) -> str:
        payload = {"command_id": f"c{n}", "cluster_id": "bystander", "type": "x", "payload": {"x": "y" * 100_000}}
        return json.dumps({"type": "command", "payload": payload})

    await it.pushes(1500, command)


async def commands_of_many_values(it: Flood) -> None:
    values = f"[{'[],' * 120_000}[]]"

    def command(n: int) -> str:
        payload = f'{{"command_id": "v{n}", "cluster_id": "bystander", "payload": {{"x": {values}}}}}'
        return f'{{"type": "command", "payload": {payload}}}'

    await it.pushes(60, command)


async def registers_of_websocket_agents(it: Flood) -> None:
    """Agents that speak WebSocket register again and again, and the controller does not answer."""
    register = {"type": "register", "payload": {"name": "n", "labels": [[]] * 20_000}}
    url, headers = f"{it.shim.url}{BASE}/ws", {"Authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession() as http:
        agents = [await http.ws_connect(url, headers=headers) for _ in range(10)]
        it.controller.send(signal.SIGSTOP)
        try:
            for agent in agents:
                for number in range(16):
                    await agent.send_str(json.dumps({**register, "request_id": f"r{number}"}))
        finally:
            it.controller.send(signal.SIGCONT)


async def a_controller_that_does_not_read(it: Flood) -> None:
    await it.controller.until(type="heartbeat")
    it.controller.send(signal.SIGSTOP)
    try:
        await large_results(it)
        await status_reports_that_wait(it)
    finally:
        it.controller.send(signal.SIGCONT)


FLOODS: tuple[Callable[[Flood], Awaitable[None]], ...] = (
    requests_behind_held_polls,
    unfinished_heads,
    unfinished_bodies,
    large_bodies_at_once,
    bodies_of_many_values,
    agents_with_large_heartbeats,
    compressed_bodies,
    the_admin_port,
    silent_handshakes,
    connections_beyond_the_maximum,
    registrations_with_many_labels,
    large_results,
    completed_handshakes,
    status_reports_that_wait,
    chunked_bodies_of_empty_lines,
    requests_of_one_agent,
    replies_that_nobody_reads,
    numbers_that_are_slow_to_decode,
    events_that_nobody_reads,
    large_bodies_to_the_admin_port,
    frames_that_are_no_messages,
    commands_that_are_malformed,
    tunnel_states,
    unknown_types_and_long_request_ids,
    commands_for_one_agent,
    commands_of_many_values,
    registers_of_websocket_agents,
    a_controller_that_does_not_read,
)

BY_TLS = (silent_handshakes, completed_handshakes)


def has_room(flood: Callable[[Flood], Awaitable[None]]) -> bool:
    """Return True if new connections are served during a flood."""
    return flood is not connections_beyond_the_maximum


def by_tls(folder: Path) -> tuple[dict[str, Any], ssl.SSLContext]:
    """Return a configuration whose agents' port speaks TLS, and an agent's context."""
    authority, context = trustme.CA(), ssl.create_default_context()
    pem = str(folder / "tls.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    authority.configure_trust(context)
    return {"listen": {"port": 0, "max_connections": 1024, "tls": {"cert_file": pem, "key_file": pem}}}, context


@asynccontextmanager
async def many_descriptors() -> AsyncIterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Bystanders:
    """Another agent, on a connection of its own and on new ones where there is room for them, and the kubelet."""

    def __init__(
        self,
        url: str,
        admin: str,
        context: ssl.SSLContext | None = None,
        *,
        room: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._url = url
        self._admin = admin
        self._context = context
        self._room = room
        self._beat = request("POST", f"{BASE}/bystander/heartbeat", body=b'{"status":"healthy"}')
        self.statuses: list[tuple[str, int]] = []
        self.took_s: list[tuple[str, float]] = []
        self.begun = asyncio.Event()
        self.over = asyncio.Event()

    async def watch(self) -> None:
        kept = await Line.to(self._url, self._context)
        while not self.over.is_set():
            await kept.send(self._beat)
            await self._note("heartbeat", kept.reply())
            if self._room:
                await self._note(NEW_CONNECTION, ask(self._url, self._beat, self._context))
            await self._note("/healthz", ask(self._admin, request("GET", "/healthz")))
            self.begun.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self.over.wait()
        kept.close()

    async def _note(self, what: str, asked: Awaitable[Reply]) -> None:
        began_s = self._clock()
        self.statuses.append((what, (await asked).status))
        self.took_s.append((what, self._clock() - began_s))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_fits_into_the_charts_memory_and_others_are_served(
    tmp_path: Path, flood: Callable[[Flood], Awaitable[None]]
) -> None:
    with memory_cgroup(chart_limit_bytes()) as cgroup:
        if cgroup is None:
            pytest.skip("no memory cgroup can be made here")
        config, context = by_tls(tmp_path) if flood in BY_TLS else ({}, None)
        async with many_descriptors(), world(tmp_path, config) as (shim, controller):
            shim.program = cgroup.entering(*shim.program)
            shim.environment = UNMEASURED  # the chart's limit leaves nothing for measuring
            await shim.start()
            it = Flood(shim, controller, context)
            others = Bystanders(shim.url, shim.admin, context, room=has_room(flood))
            async with asyncio.TaskGroup() as group:
                group.create_task(others.watch())
                await others.begun.wait()
                await flood(it)
                others.over.set()
            it.close()
            assert cgroup.kills == 0
            assert {status for _, status in others.statuses} == {200}, others.statuses
            assert await shim.stop() == 0


@pytest.mark.timeout(180)
async def test_a_store_of_rows_that_cannot_be_read_fits_into_the_charts_memory(tmp_path: Path) -> None:
    with memory_cgroup(chart_limit_bytes()) as cgroup:
        if cgroup is None:
            pytest.skip("no memory cgroup can be made here")
        async with world(tmp_path) as (shim, controller):
            await shim.start()
            assert (await ask(shim.url, request("POST", f"{BASE}/c/heartbeat", body=b"{}"))).status == 200
            it = Flood(shim, controller)
            command = {"cluster_id": "c", "type": "x"}
            await it.pushes(
                600, lambda n: json.dumps({"type": "command", "payload": {**command, "command_id": f"q{n}"}})
            )
            assert (await ask(shim.url, request("GET", f"{BASE}/c/poll"))).status == 200
            assert await shim.stop() == 0
            with closing(sqlite3.connect(tmp_path / "agent-shim.db")) as database:
                database.execute("UPDATE commands SET payload = '{' || hex(zeroblob(150000))")
                database.commit()
            shim.program = cgroup.entering(*shim.program)
            await shim.start()
            assert (await ask(shim.url, request("GET", f"{BASE}/c/poll"))).json["commands"] == []
            assert cgroup.kills == 0
            assert await shim.stop() == 0
    with closing(sqlite3.connect(tmp_path / "agent-shim.db")) as database:
        assert database.execute("SELECT count(*) > 200 FROM quarantine").fetchone() == (1,)
