"""Events of a run's history: one a line, written once, read by the checker and by people.

`at` is monotonic seconds, the same clock in every process of one machine. `session` is the harness's own name for an
agent whatever its ids are (`clusters_agent-1`); a command's id begins with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="kind"):
    """Base of all events."""

    at: float


# --- commands ---------------------------------------------------------------------------------------------------------


class Pushed(Event, frozen=True, tag="pushed"):
    """The controller handed a command to a socket; `once` if its type must never be delivered twice."""

    command: str
    session: str
    once: bool = False


class Queued(Event, frozen=True, tag="queued"):
    """The shim says that the command is on its disk."""

    command: str


class Acked(Event, frozen=True, tag="acked"):
    """The controller has the shim's word that it is (`command_ack`)."""

    command: str


class Stored(Event, frozen=True, tag="stored"):
    """After the run the shim's database knows the command: its place in the order of arrival, its state, its trace."""

    command: str
    seq: int
    state: str
    trace: tuple[str, ...] = ()


class Offered(Event, frozen=True, tag="offered"):
    """The shim put it into a reply, for the `attempt`-th time. `recorded`: and its disk knows that.

    `by` is the shim's configuration, which tells replicas apart.
    """

    command: str
    attempt: int
    reason: str = ""
    recorded: bool = True
    by: str = ""


class Requeued(Event, frozen=True, tag="requeued"):
    """The shim took an offer back: its reply did not reach the agent. Perhaps it had not even said that it made it."""

    command: str
    attempt: int = 1


class Delivered(Event, frozen=True, tag="delivered"):
    """The shim holds it for certain that the agent has the command."""

    command: str
    evidence: str = ""


class Received(Event, frozen=True, tag="received"):
    """An agent had the whole reply with the command in its hands."""

    command: str
    session: str
    process: str = ""


class Posted(Event, frozen=True, tag="posted"):
    """An agent's result was answered with this status; 0 without an answer."""

    command: str
    status: int


class Reported(Event, frozen=True, tag="reported"):
    """The controller handled a `command_result`."""

    command: str
    success: bool
    code: str = ""


# --- agents -----------------------------------------------------------------------------------------------------------


class Contact(Event, frozen=True, tag="contact"):
    """A call of a session's agent ended now; it began at `since`, whatever became of it."""

    session: str
    what: str
    outcome: str
    since: float
    status: int = 0


class Spoilt(Event, frozen=True, tag="spoilt"):
    """An agent got a reply that its generation cannot decode."""

    session: str
    what: str
    reason: str


class Life(Event, frozen=True, tag="life"):
    """A process came (`born`) or went: an agent's, the shim's or the controller's. `detail` says how."""

    who: str
    born: bool
    detail: str = ""


# --- the upstream side ------------------------------------------------------------------------------------------------


class Opened(Event, frozen=True, tag="opened"):
    """The controller accepted a connection."""

    connection: str


class Introduced(Event, frozen=True, tag="introduced"):
    """A `register` for a session reached the controller's side of a connection, handled or not."""

    connection: str
    session: str


class Beat(Event, frozen=True, tag="beat"):
    """The controller handled a heartbeat; `sent_unix` is its envelope's time by the shim's wall clock (0: none)."""

    connection: str
    session: str
    sent_unix: float = 0.0


class Spoke(Event, frozen=True, tag="spoke"):
    """A message came from this owner's side of a connection; `sent_unix` is its envelope's time."""

    owner: str
    connection: str
    sent_unix: float


class Link(Event, frozen=True, tag="link"):
    """The shim says that its link is in another state now."""

    state: str
    was: str = ""


class Condemned(Event, frozen=True, tag="condemned"):
    """The shim gave a connection up that nobody closed."""

    reason: str


class WallClock(Event, frozen=True, tag="wall_clock"):
    """From now on wall time minus monotonic time is this for a shim that starts or runs."""

    offset_s: float


# --- what was done to them --------------------------------------------------------------------------------------------


class Fault(Event, frozen=True, tag="fault"):
    """A fault begins or ends."""

    name: str
    begins: bool
    detail: str = ""


class StoreLost(Event, frozen=True, tag="store_lost"):
    """The shim found its database beyond repair and moved it aside: the one documented loss."""


class Defect(Event, frozen=True, tag="defect"):
    """The shim did or said what no fault explains: a traceback, an unknown exit code, a forbidden transition."""

    text: str


class Lag(Event, frozen=True, tag="lag"):
    """The longest that the shim's event loop was blocked in one life, in seconds, by its own metric."""

    seconds: float


class Late(Event, frozen=True, tag="late"):
    """The harness itself had no time to look for so many seconds before `at`: it cannot tell what came first then."""

    seconds: float


class Stopped(Event, frozen=True, tag="stopped"):
    """The shim was gone so many seconds after a SIGTERM."""

    seconds: float


AnyEvent = (
    Pushed
    | Queued
    | Acked
    | Stored
    | Offered
    | Requeued
    | Delivered
    | Received
    | Posted
    | Reported
    | Contact
    | Spoilt
    | Life
    | Opened
    | Introduced
    | Beat
    | Spoke
    | Link
    | Condemned
    | WallClock
    | Fault
    | StoreLost
    | Defect
    | Lag
    | Late
    | Stopped
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyEvent)


class Recorder:
    """Appends events to a file and to memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.events: list[AnyEvent] = []
        self._file = path.open("ab") if path is not None else None

    def add(self, event: AnyEvent) -> None:
        self.events.append(event)
        if self._file is not None:
            self._file.write(_encoder.encode(event) + b"\n")

    def extend(self, events: Iterable[AnyEvent]) -> None:
        for event in events:
            self.add(event)

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[AnyEvent]:
    """The events of a file, in the order in which they were written."""
    return [_decoder.decode(line) for line in path.read_bytes().splitlines()]


def to_builtins(event: AnyEvent) -> Any:
    """For a person's eyes."""
    return msgspec.to_builtins(event)
