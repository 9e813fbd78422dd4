"""Send queue of one connection, and the faults that apply to sending."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle

from aiohttp import WSMsgType, web

from devtools.controller import faults as fault
from devtools.controller.active_faults import Scope
from devtools.controller.history import Condition, Event, EventKind
from devtools.controller.message_handler import CloseAfterReply
from devtools.controller.state import ControllerState
from shim.protocol.upstream_message import Message, encode

GARBAGE: tuple[str | bytes, ...] = (
    "not json",
    "",
    b"\xff\xfe\x00\x01",
    "[1,2,3]",
    '"text"',
    "null",
    '{"payload":{}}',
    '{"type":5,"payload":{}}',
    '{"type":"","payload":{}}',
    b"",
    '{"type":"command","request_id":"garbage","payload":[1]}',
    '{"type":"command","payload":{"command_id":"garbage"',
    "[" * 5_000,
    '{"type":"garbage","payload":{},"timestamp":"yesterday"}',
)
"""Frames of the fault `garbage`. None of them violates the WebSocket protocol itself."""


def _future() -> asyncio.Future[Event | None]:
    return asyncio.get_running_loop().create_future()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A data frame to send. `written` receives the event of its first sending, or `None` if it was never sent.

    A message passes through the faults, a raw frame (`message` is `None`) does not. `placed`: its order is settled.
    """

    data: bytes
    opcode: WSMsgType = WSMsgType.TEXT
    message: Message | None = None
    command_id: str = ""
    placed: bool = False
    written: asyncio.Future[Event | None] = field(default_factory=_future)


class Outbox:
    """A queue and the loop that empties it. `gated` is true while sending is forbidden; call `wake` when it changes."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        state: ControllerState,
        *,
        scope: Callable[[str], Scope],
        gated: Callable[[], bool],
    ) -> None:
        self._socket = socket
        self._faults = state.faults
        self._history = state.history
        self._commands = state.commands
        self._binary = state.options.binary_frames
        self._scope = scope
        self._gated = gated
        self._items: deque[Outgoing | CloseAfterReply] = deque()
        self._held: list[Outgoing] = []
        self._timers: set[asyncio.TimerHandle] = set()
        self._garbage = cycle(GARBAGE)
        self._wakeup = Condition()
        self._leaving: CloseAfterReply | None = None
        self._shut = False

    def put(self, item: Outgoing | CloseAfterReply, delay_s: float = 0) -> None:
        """Queue an item behind the others, or `delay_s` later. After `shut` the item is dropped."""
        if isinstance(item, Outgoing) and item.message is not None:
            late = self._faults.take(fault.Delay, self._scope(item.message.type))
            delay_s += late.delay_s if late else 0
        if delay_s:
            self._later(delay_s, lambda: self._append(item))
        else:
            self._append(item)

    def leave(self, leave: CloseAfterReply) -> None:
        """Send a close frame before everything that waits."""
        self._leaving = leave
        self._wakeup.wake()

    def wake(self) -> None:
        """Re-evaluate the faults after a change."""
        if self._held and not self._faults.peek(fault.Reorder, self._scope(self._type(self._held[0]))):
            self._release()
        self._wakeup.wake()

    def shut(self) -> None:
        """Drop everything that waits, because the connection has ended. Idempotent."""
        self._shut = True
        for timer in self._timers:
            timer.cancel()
        for item in (*self._items, *self._held):
            self._drop(item)
        self._items.clear()
        self._held.clear()

    async def run(self) -> CloseAfterReply | None:
        """Send until the connection ends; return the `CloseAfterReply` that is due, if there was one."""
        try:
            while True:
                await self._wakeup.until(lambda: bool(self._leaving or (self._items and not self._gated())))
                item = self._leaving or self._items.popleft()
                if isinstance(item, CloseAfterReply):
                    return item
                for frame in self._arrange(item):
                    await self._write(frame)
        except ConnectionError:  # the reader detects and reports the end
            return None
        finally:
            self.shut()

    def _append(self, item: Outgoing | CloseAfterReply) -> None:
        if self._shut:
            self._drop(item)
            return
        self._items.append(item)
        self._wakeup.wake()

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        def due() -> None:
            self._timers.discard(timer)
            act()

        timer = asyncio.get_running_loop().call_later(delay_s, due)
        self._timers.add(timer)

    @staticmethod
    def _drop(item: Outgoing | CloseAfterReply) -> None:
        if isinstance(item, Outgoing) and not item.written.done():
            item.written.set_result(None)

    @staticmethod
    def _type(item: Outgoing) -> str:
        return item.message.type if item.message else ""

    def _arrange(self, item: Outgoing) -> Iterator[Outgoing]:
        """Return the frames that replace an item: none while it is held back, several with some faults."""
        if item.message is None:
            yield item
            return
        scope = self._scope(item.message.type)
        if not item.placed and self._hold(item, scope):
            return
        if self._faults.take(fault.Garbage, scope):
            yield _raw(next(self._garbage))
        if oversize := self._faults.take(fault.Oversize, scope):
            yield _raw('{"type":"oversize","payload":{"filler":"' + "x" * oversize.size_bytes + '"}}')
        duplicate = self._faults.take(fault.Duplicate, scope)
        binary = self._faults.take(fault.BinaryFrames, scope) is not None or self._binary
        for _ in range(duplicate.times if duplicate else 1):
            yield replace(item, opcode=WSMsgType.BINARY) if binary else item

    def _hold(self, item: Outgoing, scope: Scope) -> bool:
        reorder = self._faults.peek(fault.Reorder, scope)
        if reorder is None:
            return False
        self._held.append(item)
        if len(self._held) >= reorder.window:
            self._faults.take(fault.Reorder, scope)
            self._release()
        elif len(self._held) == 1:
            self._later(reorder.hold_s, self._release)
        return True

    def _release(self) -> None:
        """Put the held items before all others, in reverse order."""
        self._items.extendleft(replace(item, placed=True) for item in self._held)
        self._held.clear()
        self._wakeup.wake()

    async def _write(self, item: Outgoing) -> None:
        size_bytes = len(item.data)
        if slow := self._faults.peek(fault.Slow, self._scope(self._type(item))):
            await asyncio.sleep(slow.takes_s(size_bytes))
        if self._socket.closed:
            raise ConnectionResetError("the connection is closed")
        kind = EventKind.SENT if item.message else EventKind.SENT_RAW
        frame = "text" if item.opcode is WSMsgType.TEXT else "binary"
        number = self._scope("").connection
        event = self._history.record(kind, number, item.message, frame=frame, size_bytes=size_bytes)
        if item.command_id:
            self._commands.sent(item.command_id, event)
        if not item.written.done():
            item.written.set_result(event)
        await self._socket.send_frame(item.data, item.opcode)


def _raw(frame: str | bytes) -> Outgoing:
    if isinstance(frame, bytes):
        return Outgoing(frame, WSMsgType.BINARY)
    return Outgoing(frame.encode())


def outgoing(message: Message, command_id: str = "") -> Outgoing:
    """Encode a message for an outbox."""
    return Outgoing(encode(message), message=message, command_id=command_id)
