"""Settings, ports, state, events and timers that all parts of the bridge share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from shim.config.settings import Settings
from shim.core.backoff import BackoffPolicy
from shim.core.call_records import FallbackRecord, RecentCalls
from shim.core.command_queue import Arriving, QueuePolicy, RecentCommands
from shim.core.records import (
    AddTrace,
    CommandState,
    MarkCommands,
    Operation,
    SessionKey,
    StoreOperation,
    TraceEntry,
)
from shim.core.sessions import Sessions
from shim.errors import StoreError
from shim.log import get
from shim.metrics import Metrics
from shim.ports import Clock, CommandStore, Timer, Timers, UpstreamPort
from shim.redaction import Redaction, without_secrets

log = get(__name__)
_Result = TypeVar("_Result")
NoteStep = Callable[[SessionKey, tuple[str, ...], TraceEntry], None]
DEFAULT_OWNER = "default"
ENVELOPE_BYTES = 512
"""Upper bound on the bytes that an upstream envelope adds to its payload."""

LATE_S = 1.0
"""Delay after which a timer is considered late because the process was stopped, frozen or without CPU."""
CATCH_UP_S = 0.25
"""Delay of a late timer, in which waiting input is read: event loops call timers before they read from sockets."""


class EventQueue:
    """Events, handled in order after the callback that caused them has returned.

    Without the queue an event would be handled on the stack of its cause: the message that completes a registration
    would bring the link online, read the outbox and send heartbeats before its own handler has returned. `handlers` has
    one handler for each type of event; it is set before the first event.
    """

    def __init__(self, timers: Timers, metrics: Metrics) -> None:
        self._timers = timers
        self._metrics = metrics
        self._events: deque[object] = deque()
        self._scheduled = False
        self.handlers: Mapping[type, Callable[[Any], None]] = {}

    def put(self, event: object) -> None:
        """Handle an event in the next iteration of the event loop, after the events that are queued already."""
        self._events.append(event)
        if not self._scheduled:
            self._scheduled = True
            self._timers.call_later(0, self.handle_all)

    def handle_all(self) -> None:
        """Handle all queued events now."""
        self._scheduled = False
        while self._events:
            event = self._events.popleft()
            try:
                self.handlers[type(event)](event)
            except Exception:
                self._metrics.internal_errors.labels("bridge").inc()
                log.exception("event_failed", kind=type(event).__name__)


class _PendingTimer:
    """One `ports.Timer` of a `TimerGroup`."""

    __slots__ = ("_callback", "_due_s", "_owner", "timer")

    def __init__(self, owner: TimerGroup, callback: Callable[[], None], due_s: float) -> None:
        self._owner = owner
        self._callback = callback
        self._due_s: float | None = due_s
        self.timer: Timer | None = None

    def fire(self) -> None:
        """Call the callback; if the timer is late, wait once for input that arrived meanwhile."""
        if self._due_s is not None and self._owner.now_s() - self._due_s > LATE_S:
            self._due_s = None
            self.timer = self._owner.again(CATCH_UP_S, self.fire)
            return
        self._owner.pending.discard(self)
        self.timer = None  # the loop's timer refers to this object: the garbage collector would have to find the pair
        self._callback()

    def cancel(self) -> None:
        """Cancel the call (`ports.Timer`)."""
        self._owner.pending.discard(self)
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.cancel()


class TimerGroup:
    """`ports.Timers` on top of another one, with a list of its pending timers."""

    def __init__(self, timers: Timers, clock: Clock) -> None:
        self._timers = timers
        self._closed = False
        self.now_s = clock.monotonic_s
        self.again = timers.call_later
        self.pending: set[_PendingTimer] = set()

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` after `delay` seconds, unless the group is closed by then."""
        pending = _PendingTimer(self, callback, self.now_s() + delay)
        if not self._closed:
            self.pending.add(pending)
            pending.timer = self._timers.call_later(delay, pending.fire)
        return pending

    def close(self) -> None:
        """Cancel all pending timers and ignore later calls of `call_later`."""
        self._closed = True
        for pending in list(self.pending):
            pending.cancel()


class Moment(NamedTuple):
    """The time of one event, which is read once and passed on: `now` in monotonic seconds, `unix` in Unix seconds."""

    now: float
    unix: float


class BridgeContext(msgspec.Struct):
    """Settings, ports and shared state of the bridge.

    `settings` is replaced on a reload. `rng` yields floats in [0, 1). `read_token` returns the configured upstream
    token or raises `ShimError`. `fallback` records the results of calls to the vendor's HTTP API, `refused_calls` the
    refused calls of agents. `note_step` is called with each step of commands, if traces are exported. The bridge
    replaces `timers` by a `TimerGroup` and sets `events`. `refused_bytes` is the size of the largest command or result
    that the store has refused since readiness has last seen that as much can be written.
    """

    settings: Settings
    clock: Clock
    timers: Timers
    rng: Callable[[], float]
    new_id: Callable[[], str]
    store: CommandStore
    upstream: UpstreamPort
    metrics: Metrics
    read_token: Callable[[], str]
    sessions: Sessions
    owner_key: bytes = b""
    redaction: Redaction = msgspec.field(default_factory=Redaction)
    arriving: Arriving = msgspec.field(default_factory=Arriving)
    recent_commands: RecentCommands = msgspec.field(default_factory=RecentCommands)
    fallback: FallbackRecord = msgspec.field(default_factory=FallbackRecord)
    refused_calls: RecentCalls = msgspec.field(default_factory=RecentCalls)
    note_step: NoteStep | None = None
    refused_bytes: int = 0
    events: EventQueue = msgspec.UNSET  # type: ignore[assignment] # a queue needs the timers that the bridge makes

    def masked(self, text: str, *secrets: str) -> str:
        """Return a text from the controller with every known secret masked, for agents, logs and the status page.

        `secrets` are those that only the caller knows. Mask a text before shortening it: half a secret is not
        recognised.
        """
        return without_secrets(self.redaction.text(text), *secrets)

    async def execute(self, operation: StoreOperation[_Result], *also: Operation) -> _Result:
        """Carry out store operations as one unit and return the result of the first one. Raises `StoreError`."""
        answer: asyncio.Future[_Result | StoreError] = asyncio.get_running_loop().create_future()
        self.store.submit(operation, *also, done=partial(resolve, answer))
        outcome = await answer
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def step(self, key: SessionKey, ids: tuple[str, ...], wall: float, event: str, detail: str = "") -> AddTrace:
        """Return a step for the trace of commands, to be stored together with the change that it describes."""
        entry = TraceEntry(wall, event, detail)
        self.show_step(key, ids, entry)
        return AddTrace(key, ids, entry)

    def mark(
        self,
        key: SessionKey,
        ids: tuple[str, ...],
        state: CommandState,
        wall: float,
        event: str,
        detail: str = "",
        *,
        attempts: int = 0,
    ) -> MarkCommands:
        """Return the change of commands to a state, with the step of their traces."""
        entry = TraceEntry(wall, event, detail)
        self.show_step(key, ids, entry)
        return MarkCommands(key, ids, state, entry, attempts)

    def show_step(self, key: SessionKey, ids: tuple[str, ...], entry: TraceEntry) -> None:
        """Show a step of commands on the status page and to the trace collector."""
        self.recent_commands.note(key, ids, entry)
        if self.note_step is not None:
            self.note_step(key, ids, entry)

    def moment(self) -> Moment:
        """Return the time of an event that happens now."""
        return Moment(self.clock.monotonic_s(), self.clock.wall_s())

    @property
    def now(self) -> float:
        """The current monotonic time in seconds."""
        return self.clock.monotonic_s()

    @property
    def queue_policy(self) -> QueuePolicy:
        """The configured bounds of a queue and of a poll reply."""
        commands, poll = self.settings.commands, self.settings.poll
        return QueuePolicy(
            max_queued=commands.max_queued,
            max_queued_bytes=commands.max_queued_bytes,
            max_batch=poll.max_batch,
            max_bytes=poll.max_bytes,
            max_attempts=commands.max_attempts,
            redeliver=commands.uncertain == "redeliver",
            at_most_once=frozenset(commands.at_most_once),
        )

    @property
    def backoff_policy(self) -> BackoffPolicy:
        """The configured delays between dials."""
        reconnect = self.settings.upstream.reconnect
        return BackoffPolicy(reconnect.initial_s, reconnect.max_s, reconnect.refused_max_s)


def resolve(answer: asyncio.Future[_Result], outcome: _Result) -> None:
    """Pass an outcome to its waiting call, unless that was cancelled: its agent may have hung up."""
    if not answer.done():
        answer.set_result(outcome)
