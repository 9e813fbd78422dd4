"""Ordered record of all events at the controller, for tests that wait for them and for the fault harness."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any

from devtools.controller.condition import Condition
from devtools.controller.history_file import HistoryFile
from devtools.controller.masking import mask
from shim.clock import Clock
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message

_EVENT_BYTES = 500


class EventKind(Enum):
    """Kind of an event."""

    STARTED = "started"
    STOPPED = "stopped"
    REFUSED = "refused"  # a handshake; `status`, `reason`
    OPENED = "opened"  # a connection; `endpoint`, `auth` (the places where the token stood), `query`, `user_agent`
    RECEIVED = "received"  # a message that was handled; `timestamp` as it was sent
    DISCARDED = "discarded"  # a message that a fault kept from being handled
    BAD_FRAME = "bad_frame"  # a data frame that is no message; `problem`
    SENT = "sent"  # a message, handed to the socket
    SENT_RAW = "sent_raw"  # a data frame that is no message
    PING_RECEIVED = "ping_received"
    PING_SENT = "ping_sent"
    PONG_RECEIVED = "pong_received"
    CLOSED = "closed"  # end of a connection; `by`, `how`, `code`
    FAULT_SET = "fault_set"  # `fault`
    FAULT_ENDED = "fault_ended"


_IN = frozenset(
    {
        EventKind.RECEIVED,
        EventKind.DISCARDED,
        EventKind.BAD_FRAME,
        EventKind.PING_RECEIVED,
        EventKind.PONG_RECEIVED,
    }
)
_OUT = frozenset({EventKind.SENT, EventKind.SENT_RAW, EventKind.PING_SENT})


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `n` counts up without gaps; `connection` is 0 for an event without one.

    `payload` is that of the message, with credentials masked. `detail` holds the fields of the kind.
    """

    n: int
    kind: EventKind
    connection: int
    monotonic_s: float
    wall_s: float
    type: str = ""
    request_id: str = ""
    payload: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def direction(self) -> str:
        """Return `in` (from the agent), `out` (to the agent) or the empty string."""
        return "in" if self.kind in _IN else "out" if self.kind in _OUT else ""

    def to_json(self) -> dict[str, Any]:
        """Return the event as the control API and the journal show it."""
        shown: dict[str, Any] = {
            "n": self.n,
            "kind": self.kind.value,
            "direction": self.direction,
            "connection": self.connection,
            "monotonic_s": self.monotonic_s,
            "wall_s": self.wall_s,
            "time": rfc3339(self.wall_s),
        }
        if self.type:
            shown |= {"type": self.type, "request_id": self.request_id, "payload": self.payload}
        return shown | self.detail


Wanted = Callable[[Event], bool]


class History:
    """Bounded, ordered record of events.

    With a journal, numbers continue where the file ends, and an event is in the file before `record` returns, and so
    before any of its consequences.
    """

    def __init__(self, clock: Clock, *, max_events: int, max_bytes: int, journal: HistoryFile | None = None) -> None:
        self._clock = clock
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._journal = journal
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._wakeup = Condition()
        self.last_n = journal.last_n if journal else 0
        self.listeners: list[Callable[[Event], None]] = []

    @property
    def first_n(self) -> int:
        """Return the number of the oldest event that is still held, or `last_n + 1` if there is none."""
        return self.last_n - len(self._events) + 1

    def record(self, kind: EventKind, connection: int = 0, message: Message | None = None, **detail: Any) -> Event:
        """Append an event; `detail["size_bytes"]` counts towards the limit."""
        self.last_n += 1
        event = Event(
            n=self.last_n,
            kind=kind,
            connection=connection,
            monotonic_s=self._clock.monotonic_s(),
            wall_s=self._clock.wall_s(),
            type=message.type if message else "",
            request_id=message.request_id if message else "",
            payload=mask(message.payload) if message else {},
            detail=detail,
        )
        if self._journal:
            self._journal.write(event.to_json())
        size_bytes = _EVENT_BYTES + int(detail.get("size_bytes", 0))
        self._events.append((event, size_bytes))
        self._bytes += size_bytes
        while len(self._events) > self._max_events or self._bytes > self._max_bytes:
            self._bytes -= self._events.popleft()[1]
        for listener in self.listeners:
            listener(event)
        self._wakeup.wake()
        return event

    def after(self, n: int, wanted: Wanted | None = None, limit: int | None = None) -> list[Event]:
        """Return the held events with numbers above `n`, oldest first."""
        start = max(0, n + 1 - self.first_n)
        found = (event for event, _ in islice(self._events, start, None) if wanted is None or wanted(event))
        return list(islice(found, limit))

    async def _newer(self, n: int) -> None:
        await self._wakeup.until(lambda: self.last_n > n)

    async def until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for a state that changes only with events; return False if the time runs out."""
        return await self._wakeup.until(ready, timeout_s=timeout_s)

    async def wait_for(self, wanted: Wanted, *, after: int = 0, timeout_s: float = 5) -> Event:
        """Return the first matching event above `after`, which may lie in the past. Raises `TimeoutError`."""
        seen = after
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for event in self.after(seen):
                        if wanted(event):
                            return event
                    seen = max(seen, self.last_n)
                    await self._newer(seen)
        except TimeoutError:
            latest = ", ".join(f"{event.kind.value} {event.type}".strip() for event in self.after(self.last_n - 10))
            raise TimeoutError(f"not within {timeout_s} s; the latest events were: {latest or 'none'}") from None
