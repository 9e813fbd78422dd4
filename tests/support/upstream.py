"""Upstream by hand: a `ports.UpstreamPort` whose dials and sockets a test answers, and a controller in memory.

Everything happens in later turns of the loop, in order, as it does on a network.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from shim.ports import DialFailure, DialRequest, WebSocket, WebSocketListener
from shim.protocol import upstream_message
from shim.protocol.upstream_message import Message

REFUSED = DialFailure("status", 401)
GONE = DialFailure("tcp")


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that the shim sent: when, on which socket."""

    at_s: float
    socket: FakeSocket
    message: Message


class FakeSocket:
    """One end of a WebSocket: `ports.WebSocket` for the shim, and the peer's side for the test."""

    def __init__(self, spec: DialRequest, events: WebSocketListener) -> None:
        self.spec = spec
        self.sent: list[Sent] = []
        self.pings: list[bytes] = []
        self.closed_by_us: int | None = None  # 0: aborted
        self.swallows = False  # what is sent from now on never arrives
        self.on_sent: Callable[[Message], None] = lambda message: None
        self.on_pinged: Callable[[bytes], None] = lambda payload: None
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._over = False

    @property
    def open(self) -> bool:
        return not self._over and self.closed_by_us is None

    # --- ports.Socket ---

    def send(self, message: Message) -> None:
        if self.open:
            as_read = upstream_message.decode(upstream_message.encode(message))
            self.sent.append(Sent(self._loop.time(), self, as_read))
            if not self.swallows:
                self._loop.call_soon(self.on_sent, as_read)

    def ping(self, payload: bytes) -> None:
        if self.open:
            self.pings.append(payload)
            if not self.swallows:
                self._loop.call_soon(self.on_pinged, payload)

    def close(self, code: int) -> None:
        if self.open:
            self.closed_by_us = code
            self._loop.call_soon(self._end, False, 0)

    def abort(self) -> None:
        self.close(0)

    # --- the peer ---

    def says(self, kind: str, payload: dict[str, Any] | None = None, request_id: str = "", timestamp: str = "") -> None:
        """A message from the controller arrives."""
        self._in(self._message, Message(kind, payload or {}, request_id, timestamp))

    def says_bytes(self, frame: bytes) -> None:
        """A data frame of the controller arrives, whatever is in it."""
        for found in upstream_message.decode_frame(frame):
            if isinstance(found, Message):
                self._in(self._message, found)
            else:
                self.bad_frame(found.kind)

    def frame(self) -> None:
        """A frame without meaning arrives: a ping of the peer's."""
        self._in(self._events.on_frame)

    def bad_frame(self, kind: str = "not_json") -> None:
        self._in(self._events.on_frame)
        self._in(self._events.on_bad_frame, kind)

    def pong(self, payload: bytes) -> None:
        self._in(self._events.on_frame)
        self._in(self._events.on_pong, payload)

    def lose(self, *, by_close_frame: bool = False, code: int = 0, reason: str = "") -> None:
        """The connection ends without our doing."""
        self._loop.call_soon(self._end, by_close_frame, code, reason)

    def _in(self, handler: Callable[..., None], *values: Any) -> None:
        self._loop.call_soon(lambda: None if self._over else handler(*values))

    def _message(self, message: Message) -> None:
        self._events.on_frame()
        self._events.on_message(message)

    def _end(self, by_close_frame: bool, code: int, reason: str = "") -> None:
        if not self._over:
            self._over = True
            self._events.on_closed(by_close_frame, code, reason)


@dataclass(slots=True)
class FakeDial:
    """A dial that waits for its outcome."""

    at_s: float
    spec: DialRequest
    events: WebSocketListener
    done: Callable[[WebSocket | DialFailure], None]
    over: bool = False

    def accept(self) -> FakeSocket:
        """The handshake succeeds."""
        socket = FakeSocket(self.spec, self.events)
        self._end(socket)
        return socket

    def fail(self, failure: DialFailure = GONE) -> None:
        self._end(failure)

    def _end(self, outcome: FakeSocket | DialFailure) -> None:
        assert not self.over
        self.over = True
        asyncio.get_running_loop().call_soon(self.done, outcome)


class FakeUpstream:
    """Records dials; `on_dial` is called for each in the loop's next turn, unless the test answers them itself."""

    def __init__(self) -> None:
        self.dials: list[FakeDial] = []
        self.on_dial: Callable[[FakeDial], None] = lambda dial: None

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        dial = FakeDial(loop.time(), spec, events, done)
        self.dials.append(dial)
        loop.call_soon(self.on_dial, dial)


@dataclass(slots=True)
class Manners:
    """The behaviour of the controller; a test changes the fields that it needs."""

    dial: DialFailure | None = None  # how dials fail
    refuse: Callable[[DialRequest], DialFailure | None] = lambda spec: None
    hangs: bool = False  # dials are never answered
    registers: bool = True  # answers registers
    closes: tuple[int, str] | None = None  # answers the first message with a close frame
    acks: bool = True  # acknowledges heartbeats
    pongs: bool = True  # answers ping frames
    success: dict[str, Any] = field(default_factory=dict)  # more fields of register_success
    cluster_id: Callable[[dict[str, Any]], str] | None = None


class Controller:
    """A controller in memory that answers like the real one.

    Rules: docs/reference/legacy-agents.md#3-websocket-api, the vendor's guide.
    """

    def __init__(self) -> None:
        self.upstream = FakeUpstream()
        self.upstream.on_dial = self._dialled
        self.manners = Manners()
        self.sockets: list[FakeSocket] = []
        self.log: list[Sent] = []
        self.held_registers: deque[tuple[FakeSocket, Message]] = deque()
        self._clusters: dict[str, str] = {}
        self._changed = asyncio.Event()

    # --- what a test asks ---

    @property
    def socket(self) -> FakeSocket:
        """The newest socket, which must be open."""
        assert self.sockets, "nobody dialled"
        assert self.sockets[-1].open, "the newest socket is closed"
        return self.sockets[-1]

    @property
    def dials(self) -> list[FakeDial]:
        return self.upstream.dials

    def got(self, kind: str, since: int = 0) -> list[Message]:
        """All messages of a type that arrived, in order, from the `since`-th of all messages on."""
        return [sent.message for sent in self.log[since:] if sent.message.type == kind]

    def times(self, kind: str) -> list[float]:
        return [sent.at_s for sent in self.log if sent.message.type == kind]

    def results(self, command_id: str) -> list[dict[str, Any]]:
        """The payloads of all results for a command."""
        return [m.payload for m in self.got("command_result") if m.payload["command_id"] == command_id]

    async def until(self, kind: str, count: int = 1, within_s: float = 120.0) -> Message:
        """Wait for the `count`-th message of a type; returns it."""
        async with asyncio.timeout(within_s):
            while len(found := self.got(kind)) < count:
                self._changed.clear()
                await self._changed.wait()
        return found[count - 1]

    # --- what a test does ---

    def push(self, command_id: str, **payload: Any) -> None:
        """Send a command down the newest socket; `command_id=""` sends none."""
        ids = {"command_id": command_id} if command_id else {}
        self.socket.says("command", {**ids, **payload}, f"r-{command_id}")

    def answer_register(self) -> None:
        """Answer the oldest register that was held back (`manners.registers` is off)."""
        self._register(*self.held_registers.popleft())

    def go_away(self, failure: DialFailure = GONE, *, by_close_frame: bool = False) -> None:
        """Lose all connections and fail every dial."""
        self.manners.dial = failure
        for socket in self.open_sockets():
            socket.lose(by_close_frame=by_close_frame)

    def come_back(self) -> None:
        self.manners.dial = None

    def open_sockets(self) -> Iterator[FakeSocket]:
        return iter([socket for socket in self.sockets if socket.open])

    # --- what it does by itself ---

    def _dialled(self, dial: FakeDial) -> None:
        failure = self.manners.dial or self.manners.refuse(dial.spec)
        if self.manners.hangs:
            return
        if failure is not None:
            dial.fail(failure)
            return
        socket = dial.accept()
        socket.on_sent = lambda message: self._said(socket, message)
        socket.on_pinged = lambda payload: socket.pong(payload) if self.manners.pongs else None
        self.sockets.append(socket)

    def _said(self, socket: FakeSocket, message: Message) -> None:
        self.log.append(Sent(asyncio.get_running_loop().time(), socket, message))
        self._changed.set()
        if self.manners.closes is not None:
            code, reason = self.manners.closes
            socket.lose(by_close_frame=True, code=code, reason=reason)
        elif message.type == "register":
            if self.manners.registers:
                self._register(socket, message)
            else:
                self.held_registers.append((socket, message))
        elif message.type in ("heartbeat", "status") and self.manners.acks:
            socket.says("heartbeat_ack", {"received_at": "2026-11-24T21:28:04Z"}, message.request_id)

    def _register(self, socket: FakeSocket, message: Message) -> None:
        payload = message.payload
        if self.manners.cluster_id is not None:
            cluster_id = self.manners.cluster_id(payload)
        else:
            cluster_id = payload.get("cluster_id") or self._clusters.setdefault(
                payload["name"], f"c-{len(self._clusters) + 1}"
            )
        success = {
            "cluster_id": cluster_id,
            "cluster_uuid": f"uuid-{cluster_id}",
            "name": payload["name"],
            "status": "registered",
            "workspace_id": 7,
            "token": "never-passed-down",
            **self.manners.success,
        }
        socket.says("register_success", success, message.request_id)
