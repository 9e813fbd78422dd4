"""One WebSocket of an agent, from the accepted handshake to its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket as sockets
import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import WebSocketError, WSMessage, WSMsgType, web
from msgspec.structs import replace

from devtools.controller import faults as fault
from devtools.controller.active_faults import Scope
from devtools.controller.faults import Endpoint, How
from devtools.controller.history import Condition, Event, EventKind
from devtools.controller.message_handler import Answer, CloseAfterReply, MessageHandler
from devtools.controller.outbox import Outbox, Outgoing, outgoing
from devtools.controller.state import ControllerState
from shim.errors import MessageError
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message, decode_frame

_RST_ON_CLOSE = struct.pack("ii", 1, 0)
_PROBLEMS = {
    "not_json": "message is not JSON",
    "not_object": "message must be an object",
    "no_type": "missing required field: type",
    "bad_payload": "payload must be an object",
}


@dataclass(frozen=True, slots=True)
class AcceptedHandshake:
    """Data of an accepted handshake."""

    number: int
    endpoint: Endpoint
    owner: str
    socket: web.WebSocketResponse
    transport: asyncio.Transport


class Connection:
    """One connection of an agent. `run` serves it until it ends; other methods may be called at any time meanwhile."""

    def __init__(self, accepted: AcceptedHandshake, state: ControllerState, message_handler: MessageHandler) -> None:
        self.number = accepted.number
        self.endpoint = accepted.endpoint
        self.owner = accepted.owner
        self.clusters: dict[str, str] = {}
        self._socket = accepted.socket
        self._transport = accepted.transport
        self._clock = state.clock
        self._options = state.options
        self._faults = state.faults
        self._history = state.history
        self._message_handler = message_handler
        self._heard_s = state.clock.monotonic_s()
        self._wakeup = Condition()
        self._left: CloseAfterReply | None = None
        self._paused = False
        self.outbox = Outbox(
            accepted.socket,
            state,
            scope=self.scope,
            gated=lambda: self._shows(fault.Silent) or self._shows(fault.Stalled),
        )

    def scope(self, message_type: str = "") -> Scope:
        """Return the context for faults on this connection."""
        return Scope(self.endpoint, self.number, set(self.clusters.values()), message_type)

    def _shows(self, kind: type[fault.Fault]) -> bool:
        return self._faults.peek(kind, self.scope()) is not None

    def send(self, message: Message, *, command_id: str = "", delay_s: float = 0) -> Outgoing:
        """Queue a message; set its time of sending if it has none."""
        if not message.timestamp:
            message = replace(message, timestamp=rfc3339(self._clock.wall_s() + delay_s))
        item = outgoing(message, command_id)
        self.outbox.put(item, delay_s)
        return item

    def drop(self, how: How, code: int = 1001, reason: str = "") -> None:
        """End the connection. A second call after a close frame aborts it."""
        leave = CloseAfterReply(how, code, reason=reason)
        if how is How.CLOSE and self._left is None:
            self.outbox.leave(leave)
            self._leaves(leave)
        else:
            self._left = self._left or leave
            self._cut(how)

    def _leaves(self, leave: CloseAfterReply) -> None:
        """Ignore everything but the peer's close frame from now on, and wait for that only for a limited time."""
        self._left = leave
        asyncio.get_running_loop().call_later(self._options.close_timeout_s, self._transport.abort)
        self._read_again()

    def _cut(self, how: How) -> None:
        if how is How.RST:
            raw = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed already
                raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _RST_ON_CLOSE)
        self._transport.abort()
        self._wakeup.wake()

    def _read_again(self) -> None:
        if self._paused:
            self._paused = False
            self._heard_s = self._clock.monotonic_s()
            self._transport.resume_reading()
        self._wakeup.wake()

    def faults_changed(self) -> None:
        """Apply a change of faults: stop or resume reading, and send what is no longer held back."""
        if not self._shows(fault.Silent):
            self._read_again()
        elif not self._paused and self._left is None:
            self._paused = True
            self._transport.pause_reading()
        self.outbox.wake()

    async def run(self) -> None:
        """Serve until the connection ends."""
        self.faults_changed()
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write())
                pinger = group.create_task(self._ping())
                ended = await self._read()
                writer.cancel()
                pinger.cancel()
        finally:
            self.outbox.shut()
        self._history.record(EventKind.CLOSED, self.number, **ended)

    async def _write(self) -> None:
        leave = await self.outbox.run()
        if leave is None:
            return
        if leave.how is not How.CLOSE:
            self.drop(leave.how, leave.code)
            return
        if self._left is None:
            self._leaves(leave)
        with contextlib.suppress(ConnectionError):  # the reader detects the end
            await self._socket.send_frame(struct.pack("!H", leave.code) + leave.reason.encode(), WSMsgType.CLOSE)

    async def _ping(self) -> None:
        """Send pings and drop a peer that sends nothing (docs/reference/legacy-agents.md#34-timers-and-reconnect).

        The fault `silent` stops this, too.
        """
        next_ping_s = self._clock.monotonic_s() + self._options.ping_interval_s
        while True:
            dead_s = self._heard_s + self._options.silent_after_s
            await asyncio.sleep(max(0, min(next_ping_s, dead_s) - self._clock.monotonic_s()))
            await self._wakeup.until(lambda: not self._paused)
            now_s = self._clock.monotonic_s()
            if now_s >= self._heard_s + self._options.silent_after_s:
                self.drop(How.CLOSE, 1001, "nothing was heard")
                return
            if now_s >= next_ping_s:
                next_ping_s = now_s + self._options.ping_interval_s
                self._history.record(EventKind.PING_SENT, self.number)
                # The reader detects the end; a full socket buffer is no end.
                with contextlib.suppress(ConnectionError, TimeoutError):
                    async with asyncio.timeout(self._options.silent_after_s):
                        await self._socket.ping()

    async def _read(self) -> dict[str, Any]:
        """Read until the connection ends, and return the cause."""
        while True:
            frame = await self._socket.receive()
            await self._wakeup.until(lambda: self._left is not None or not self._paused)
            self._heard_s = self._clock.monotonic_s()
            if frame.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await self._data(frame)
            elif frame.type is WSMsgType.PING:
                self._history.record(EventKind.PING_RECEIVED, self.number)
                with contextlib.suppress(ConnectionError):
                    await self._socket.pong(frame.data)
            elif frame.type is WSMsgType.PONG:
                self._history.record(EventKind.PONG_RECEIVED, self.number)
            else:
                return await self._end(frame)

    async def _end(self, frame: WSMessage) -> dict[str, Any]:
        if self._left is not None:
            self._transport.close()
            code = self._left.code if self._left.how is How.CLOSE else 1006
            return {"by": "controller", "how": self._left.how.value, "code": code}
        if frame.type is WSMsgType.CLOSE:
            code = int(frame.data or 1005)
            await self._socket.close(code=1000 if code == 1005 else code, drain=False)
            return {"by": "agent", "how": "close", "code": code}
        if isinstance(frame.data, WebSocketError):
            return {"by": "controller", "how": "protocol_error", "code": int(frame.data.code)}
        return {"by": "agent", "how": "lost", "code": 1006}

    async def _data(self, frame: WSMessage) -> None:
        size_bytes = len(frame.data)
        if slow := self._faults.peek(fault.Slow, self.scope()):
            await self._wakeup.until(lambda: self._left is not None, timeout_s=slow.takes_s(size_bytes))
        detail: dict[str, Any] = {
            "frame": "text" if frame.type is WSMsgType.TEXT else "binary",
            "size_bytes": size_bytes,
        }
        for message in decode_frame(bytes(frame.data)):
            if isinstance(message, MessageError) or message.fault:
                kind = message.kind if isinstance(message, MessageError) else "not_json"
                self._history.record(EventKind.BAD_FRAME, self.number, problem=kind, **detail)
                if not self._shows(fault.Stalled):
                    self.send(Message("error", {"error": _PROBLEMS[kind]}))
            else:
                self._take(message, dict(detail))

    def _take(self, message: Message, detail: dict[str, Any]) -> None:
        if message.timestamp:
            detail["timestamp"] = message.timestamp
        drop = self._faults.take(fault.Drop, self.scope(message.type))
        if self._left is not None or self._shows(fault.Stalled) or (drop is not None and drop.discard):
            self._history.record(EventKind.DISCARDED, self.number, message, **detail)
        else:
            self._handle(message, detail)
        if drop is not None:
            self.drop(drop.how, drop.code, drop.reason)

    def _handle(self, message: Message, detail: dict[str, Any]) -> None:
        event = self._history.record(EventKind.RECEIVED, self.number, message, **detail)
        last: Outgoing | None = None
        for answer in self._message_handler.handle(self, message, event):
            if isinstance(answer, Answer):
                last = self.send(answer.message, delay_s=answer.delay_s)
            elif last is not None:
                last.written.add_done_callback(partial(self._leave_after, answer))

    def _leave_after(self, leave: CloseAfterReply, _written: asyncio.Future[Event | None]) -> None:
        self.outbox.put(leave)
