"""Ordered record of all events at the controller, for tests that wait for them and for the fault harness."""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from io import SEEK_END, FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from shim.clock import Clock
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message

# --- masking: credentials are shown as present and as equal or not, without their values ------------------------------

_MAX_LEVELS = 64
_SECRET = frozenset({"token", "password", "cluster_cert_data"})
_SECRET_ENDINGS = ("_token", "_password")


def masked(secret: str) -> str:
    """Return the mask of `secret`; equal secrets have equal masks."""
    return "sha256:" + hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()[:16]


def mask(value: Any, *, levels: int = _MAX_LEVELS) -> Any:
    """Return a copy of a JSON value with each non-empty text masked whose key denotes a credential.

    Values nested deeper than `levels` are left out, so that no message can exhaust the stack.
    """
    if not isinstance(value, (dict, list)):
        return value
    if not levels:
        return "(nested too deeply to show)"
    if isinstance(value, list):
        return [mask(item, levels=levels - 1) for item in value]
    return {
        key: masked(held) if _is_secret(key, held) else mask(held, levels=levels - 1) for key, held in value.items()
    }


def _is_secret(key: str, held: Any) -> bool:
    return isinstance(held, str) and held != "" and (key in _SECRET or key.endswith(_SECRET_ENDINGS))


class Condition:
    """A condition without a lock: code that changes the state calls `wake`, and the waiters check it again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Let every waiter evaluate the state."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], bool], *, timeout_s: float | None = None) -> bool:
        """Return True as soon as `ready()` is true, at once if it already is; return False after the time limit."""
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    await self._event.wait()
        except TimeoutError:
            return False
        return True


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


# --- the history as a file with one JSON object a line, which a `kill -9` does not lose -------------------------------


class HistoryFile:
    """Append-only file of events.

    A line has reached the operating system when `write` returns: the end of this process loses none, the end of the
    machine may. Several runs may append to one file.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises `OSError`."""
        self.last_n = _last_n(path)
        self._file = append_lines(path)

    def write(self, event: dict[str, Any]) -> None:
        """Append one event. Raises `OSError`."""
        self._file.write(msgspec.json.encode(event) + b"\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def append_lines(path: Path) -> FileIO:
    """Open a file for unbuffered appending, and terminate the incomplete last line of a run that was killed."""
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _last_n(path: Path) -> int:
    """Return the number of the last complete event of the file, or 0."""
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n")
        while end > 0:
            start = content.rfind(b"\n", 0, end) + 1
            try:
                return int(json.loads(content[start:end])["n"])
            except (ValueError, KeyError, TypeError):
                end = start - 1
    return 0
