"""Fakes for tests of the agent API: a scripted agent service, a running server, and agents on raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from shim.agent_api import AgentServer, Backends
from shim.config.settings import Listen
from shim.core.agent_calls import Accepted, AgentCall, Commands, Healthy, OfferedCommand, PollCall
from shim.core.agent_calls import HealthCall as HealthQuestion
from shim.core.command_queue import OpenUntil, unknown_open
from shim.metrics import Metrics
from shim.ports import Caller, CallResult, DeliveryReceipt
from shim.protocol import dialects

DEADLINE_S = 60
POLL = b"GET /api/v1/clusters/agent/c1/poll HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"

Script = Callable[[Caller, AgentCall], Awaitable[CallResult]]


class Board:
    """A `ports.AgentService` that notes everything and answers by a script: by default sensibly, without commands."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.arrivals_s: list[float] = []
        self.script: Script = plain_answer
        self.open_until: OpenUntil = unknown_open
        self._changed = asyncio.Event()

    def _note(self, *entry: Any) -> None:
        self.log.append(entry)
        self._changed.set()

    def call(
        self, caller: Caller, call: AgentCall, arrived_s: float, now_s: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        """Return the result of the plain script at once; every other script is a coroutine."""
        assert arrived_s <= now_s
        self.arrivals_s.append(arrived_s)
        self._note("call", caller, call)
        return sensible(call) if self.script is plain_answer else self._scripted(self.script, caller, call)

    async def _scripted(self, script: Script, caller: Caller, call: AgentCall) -> CallResult:
        try:
            return await script(caller, call)
        except asyncio.CancelledError:
            self._note("cancelled")
            raise

    def written(self, receipt: DeliveryReceipt, open_until: OpenUntil) -> None:
        self.open_until = open_until
        self._note("written", receipt)

    def unwritten(self, receipt: DeliveryReceipt) -> None:
        self._note("unwritten", receipt)

    def next_request(self, connection: int) -> None:
        self._note("next", connection)

    def connection_open(self, connection: int, until_s: float) -> bool:
        """Note the reports of other replicas; those of own connections would depend on how long a test takes."""
        if connection < 0:
            self._note("open", connection, until_s)
        return True

    def connection_closed(self, connection: int, clean: bool | None) -> None:
        self._note("closed", connection, clean)

    @property
    def steps(self) -> list[str]:
        """The kinds of what was noted; `clean` or `reset` for the end of a connection."""
        return [("clean" if entry[2] else "reset") if entry[0] == "closed" else entry[0] for entry in self.log]

    @property
    def calls(self) -> list[AgentCall]:
        return [entry[2] for entry in self.log if entry[0] == "call"]

    @property
    def callers(self) -> list[Caller]:
        return [entry[1] for entry in self.log if entry[0] == "call"]

    async def until(self, step: str, count: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.steps.count(step) < count:
                self._changed.clear()
                await self._changed.wait()


async def plain_answer(caller: Caller, call: AgentCall) -> CallResult:
    return sensible(call)


def sensible(call: AgentCall) -> CallResult:
    """The answer of a bridge that has nothing to say."""
    match call:
        case PollCall():
            return CallResult(Commands((), 5))
        case HealthQuestion():
            return CallResult(Healthy())
    return CallResult(Accepted())


def offering(size_bytes: int = 10) -> Script:
    """A script that answers every poll with one command of about this size; its receipt is the number of the offer."""
    offers = 0

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        nonlocal offers
        if not isinstance(call, PollCall):
            return await plain_answer(caller, call)
        offers += 1
        command = OfferedCommand(f"cmd-{offers}", "deploy", {"x": "y" * size_bytes}, "2026-01-01T00:00:00Z")
        return CallResult(Commands((command,), 5), receipt=offers)

    return script


class HeldCalls:
    """A script that holds calls of one kind until `go` is set, then offers a command; others are answered at once."""

    def __init__(self, board: Board, kind: type = object) -> None:
        self.go = asyncio.Event()
        self._kind = kind
        self._offer = offering()
        board.script = self._script

    async def _script(self, caller: Caller, call: AgentCall) -> CallResult:
        if not isinstance(call, self._kind):
            return await plain_answer(caller, call)
        await self.go.wait()
        return await self._offer(caller, call)


class House:
    """A running frontend."""

    def __init__(self, frontend: AgentServer, board: Board, metrics: Metrics) -> None:
        self.frontend, self.board, self.metrics = frontend, board, metrics
        self.host, self.port = "", 0
        self._agents: list[Agent] = []
        self._other: Agent | None = None

    async def agent(self, receive_buffer_bytes: int = 0) -> Agent:
        """A new connection."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        agent = Agent(sock)
        self._agents.append(agent)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        return agent

    async def ask(self, request: bytes) -> Reply:
        """One request on a connection of its own."""
        agent = await self.agent()
        await agent.send(request)
        reply = await agent.reply(head_only=request.startswith(b"HEAD"))
        agent.close()
        return reply

    async def turn(self) -> None:
        """Wait until the server has seen what was sent before: a request on another connection is answered later."""
        if self._other is None:
            self._other = await self.agent()
        await self._other.send(get("/nope"))
        await self._other.reply()

    async def loop_turn(self) -> None:
        """Let the event loop run once."""
        await asyncio.sleep(0)

    @property
    def handler_tasks(self) -> int:
        """The number of requests that needed a handler task."""
        served = self.frontend._web
        return 0 if served is None else served.requests_count

    def count(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(f"agent_shim_{name}", labels) or 0.0

    def close_agents(self) -> None:
        for agent in self._agents:
            agent.close()


@asynccontextmanager
async def running(listen: Listen | None = None, board: Board | None = None, **options: Any) -> AsyncIterator[House]:
    """A frontend on a free port; `token` defaults to an upstream token `t`."""
    board = board or Board()
    metrics = Metrics(CollectorRegistry())
    options.setdefault("token", lambda: "t")
    others = {name: options.pop(name) for name in tuple(options) if name in Backends.__struct_fields__}
    backends = Backends(board, board, **others)
    frontend = AgentServer(listen or Listen(port=0), backends, dialects.load(), metrics, **options)
    house = House(frontend, board, metrics)
    house.host, house.port = await frontend.start()
    try:
        yield house
    finally:
        house.close_agents()
        await frontend.stop()


class Reply:
    """A parsed response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Agent:
    """The agent's end of a connection, down to FIN and RST."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._unread = b""

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._loop.sock_sendall(self.sock, data)

    async def receive(self) -> bytes:
        """Some bytes; empty at the end, also after a reset."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self._loop.sock_recv(self.sock, 65536)
            except ConnectionResetError:
                return b""

    async def reply(self, *, head_only: bool = False) -> Reply:
        """The next response."""
        while b"\r\n\r\n" not in self._unread:
            await self._more()
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        size = 0 if head_only else int(headers.get("content-length", 0))
        while len(self._unread) < size:
            await self._more()
        body, self._unread = self._unread[:size], self._unread[size:]
        return Reply(int(lines[0].split()[1]), headers, body)

    def take(self) -> bytes:
        """Return the bytes that were received after the last response."""
        data, self._unread = self._unread, b""
        return data

    async def _more(self) -> None:
        data = await self.receive()
        if not data:
            raise EOFError(f"closed after {self._unread!r}")
        self._unread += data

    async def closed_by_peer(self) -> bytes:
        """Everything until the peer closes."""
        while data := await self.receive():
            self._unread += data
        return self._unread

    async def closed_or(self, replies: int) -> bytes:
        """Return everything until so many responses have begun or the peer closes."""
        while self._unread.count(b"HTTP/1.1 ") < replies and (data := await self.receive()):
            self._unread += data
        return self._unread

    def close(self) -> None:
        """An orderly end; a reset if something was not read."""
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)


def post(path: str, body: bytes = b"{}", *headers: str) -> bytes:
    """A POST with its body."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()
