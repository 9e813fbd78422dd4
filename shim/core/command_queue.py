"""State transitions of commands, the command queue of one session, and the latest commands."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import takewhile

import msgspec
from msgspec.structs import replace

from shim.core.agent_calls import OfferedCommand
from shim.core.records import ARRIVED, CommandRecord, CommandState, SessionKey, TraceEntry
from shim.errors import IllegalTransition


class CommandEvent(Enum):
    """Events in the life of a command."""

    OFFER = "offer"  # put into a poll reply
    UNWRITTEN = "unwritten"  # the reply did not reach the agent: no attempt
    EVIDENCE = "evidence"  # the agent has received the command
    NO_EVIDENCE = "no_evidence"  # it is unknown if the agent has received the command
    RESULT = "result"  # the agent's result is on disk
    FENCED = "fenced"  # the controller has received the result
    EXPIRE = "expire"
    GIVE_UP = "give_up"  # all attempts were used, the type is delivered at most once, or an operator purged it
    FORGET = "forget"  # the session was deleted
    REDELIVER = "redeliver"  # an operator asked for it


_S, _E = CommandState, CommandEvent
TRANSITIONS: dict[tuple[CommandState, CommandEvent], CommandState] = {
    (_S.QUEUED, _E.OFFER): _S.OFFERED,
    (_S.QUEUED, _E.EXPIRE): _S.EXPIRED,
    (_S.QUEUED, _E.GIVE_UP): _S.DEAD,
    (_S.QUEUED, _E.FORGET): _S.EXPIRED,
    (_S.OFFERED, _E.UNWRITTEN): _S.QUEUED,
    (_S.OFFERED, _E.EVIDENCE): _S.DELIVERED,
    (_S.OFFERED, _E.NO_EVIDENCE): _S.UNCERTAIN,
    (_S.OFFERED, _E.FORGET): _S.EXPIRED,
    (_S.UNCERTAIN, _E.OFFER): _S.OFFERED,
    (_S.UNCERTAIN, _E.EVIDENCE): _S.DELIVERED,
    (_S.UNCERTAIN, _E.GIVE_UP): _S.DEAD,
    (_S.UNCERTAIN, _E.FORGET): _S.EXPIRED,
    (_S.DELIVERED, _E.REDELIVER): _S.QUEUED,
    (_S.EXPIRED, _E.REDELIVER): _S.QUEUED,
    (_S.DEAD, _E.REDELIVER): _S.QUEUED,
    (_S.ANSWERED, _E.FENCED): _S.CLOSED,
    # A valid result is stored in every state. A repeated result does not change the state.
    (_S.QUEUED, _E.RESULT): _S.ANSWERED,
    (_S.OFFERED, _E.RESULT): _S.ANSWERED,
    (_S.UNCERTAIN, _E.RESULT): _S.ANSWERED,
    (_S.DELIVERED, _E.RESULT): _S.ANSWERED,
    (_S.EXPIRED, _E.RESULT): _S.ANSWERED,
    (_S.DEAD, _E.RESULT): _S.ANSWERED,
    (_S.ANSWERED, _E.RESULT): _S.ANSWERED,
    (_S.CLOSED, _E.RESULT): _S.CLOSED,
}


def next_state(state: CommandState, step: CommandEvent) -> CommandState:
    """Return the state after an event. Raises `IllegalTransition` if the table has no such cell."""
    after = TRANSITIONS.get((state, step))
    if after is None:
        raise IllegalTransition(f"{step.name} in {state.name}")
    return after


ARRIVING_COMMANDS = 128
ARRIVING_BYTES = 4 * 1024 * 1024
MAX_ARRIVING_COMMANDS = 4096
MAX_ARRIVING_BYTES = 24 * 1024 * 1024
OVERLAP_S = 0.02  # a poll this soon after a reply on another connection may have been sent before the reply was read


class QueuedCommand(msgspec.Struct, eq=False):
    """A command that waits for its agent, ordered by arrival. `reason` is why it is offered again, else empty.

    `replies` counts the poll replies that contained it, including those that were not written. `since` (queued),
    `arrived_at` (`None` after a restart) and `expires_at` are monotonic seconds.
    """

    seq: int
    record: CommandRecord
    state: CommandState
    attempts: int
    expires_at: float
    since: float
    reason: str = ""
    replies: int = 0
    arrived_at: float | None = None

    def __lt__(self, other: QueuedCommand) -> bool:
        return self.seq < other.seq


OpenUntil = Callable[[], float]
"""Returns the monotonic time up to which the agent's side of a connection was certainly open, -inf if that is unknown.

A connection to another machine may look open long after that machine, or the network to it, is gone."""


def unknown_open() -> float:
    """Return -inf: nothing is known of the agent's side of a connection (`OpenUntil`)."""
    return -math.inf


class Batch(msgspec.Struct):
    """The commands of one poll reply, until their delivery is decided.

    `connection` is the number of the TCP connection, negative if another replica has it; `polled_at` is the arrival of
    the poll in monotonic seconds. The agent API keeps a batch as the `ports.DeliveryReceipt` of its reply.
    `unconfirmed_poll_at` is the time of a later poll that is evidence if the connection was still open then.
    """

    key: SessionKey
    number: int
    commands: tuple[QueuedCommand, ...]
    connection: int
    polled_at: float
    written_at: float | None = None
    open_until: OpenUntil = unknown_open
    cleanly_closed: bool | None = None  # None while the connection is open
    unconfirmed_poll_at: float | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the commands in order."""
        return tuple(queued.record.id for queued in self.commands)

    @property
    def offered(self) -> tuple[OfferedCommand, ...]:
        """The commands as the reply contains them."""
        return tuple(
            OfferedCommand(queued.record.id, queued.record.type, queued.record.payload, queued.record.created_at)
            for queued in self.commands
        )

    def is_read_at_poll(self, arrived_s: float, now: float) -> bool:
        """Return True if a poll that arrived at `arrived_s` proves that the agent has read the reply.

        The rule is docs/reference/protocol.md#3-commands. A connection that was closed by FIN has been read to its end.
        While it is open, the poll must not have been on its way when the reply was written: agents may have two polls
        at once, and may pipeline. And the agent's side must have been open at the poll. Unless that is certain at once,
        the poll is noted with the time `now`, and proves nothing until a report shows that it was.
        """
        if self.cleanly_closed is not None:
            return self.cleanly_closed
        if self.written_at is None or arrived_s < self.written_at + OVERLAP_S:
            return False
        if self.open_until() >= arrived_s:
            return True
        if self.unconfirmed_poll_at is None:
            self.unconfirmed_poll_at = now
        return False

    def is_confirmed_by_open_at(self, until_s: float) -> bool:
        """Return True if the connection was still open after the later poll was sent. True once for each poll."""
        if self.unconfirmed_poll_at is None or until_s < self.unconfirmed_poll_at + OVERLAP_S:
            return False
        self.unconfirmed_poll_at = None
        return True


class QueuePolicy(msgspec.Struct, frozen=True):
    """Bounds of a session's queue and of one reply, and the treatment of commands without evidence."""

    max_queued: int
    max_queued_bytes: int
    max_batch: int
    max_bytes: int
    max_attempts: int
    redeliver: bool
    at_most_once: frozenset[str]


class Arriving(msgspec.Struct):
    """Counter of the commands of all sessions that are being stored, looked up or ended.

    If `has_room` is false, the next frame is not read, so that TCP slows the controller down. A disk that stands still
    must not keep pings unread for long, so frames are read again after a while. Commands that exceed the limits are
    rejected.
    """

    commands: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count a command that was submitted to the store."""
        self.commands += 1
        self.size_bytes += size_bytes

    def remove(self, size_bytes: int) -> None:
        """Stop counting a command: the store has answered."""
        self.commands -= 1
        self.size_bytes -= size_bytes

    @property
    def has_room(self) -> bool:
        """True if the next frame may be read."""
        return self.commands < ARRIVING_COMMANDS and self.size_bytes < ARRIVING_BYTES

    @property
    def exhausted(self) -> bool:
        """True if a further command must be rejected without asking the store."""
        return self.commands >= MAX_ARRIVING_COMMANDS or self.size_bytes >= MAX_ARRIVING_BYTES


class UncertainOutcome(msgspec.Struct, frozen=True):
    """Result of a batch without evidence: commands to offer again (`again`) and commands given up (`dead`)."""

    again: tuple[QueuedCommand, ...]
    dead: tuple[QueuedCommand, ...]


class CommandQueue:
    """The commands of one session without evidence of delivery, in the order of their arrival."""

    __slots__ = ("_by_id", "_bytes", "_order", "_reserved", "_reserved_bytes", "key", "offer")

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self._by_id: dict[str, QueuedCommand] = {}
        self._order: list[QueuedCommand] = []
        self._bytes = 0
        self._reserved = 0
        self._reserved_bytes = 0
        self.offer: Batch | None = None

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def size_bytes(self) -> int:
        """JSON bytes of all commands in the queue."""
        return self._bytes

    @property
    def waiting_since(self) -> float | None:
        """Monotonic time at which the oldest command was queued, `None` if the queue is empty."""
        return self._order[0].since if self._order else None

    def get(self, command_id: str) -> QueuedCommand | None:
        """Return the command with this id if it is in the queue."""
        return self._by_id.get(command_id)

    def all(self) -> tuple[QueuedCommand, ...]:
        """Return all commands in order, offered ones included."""
        return tuple(self._order)

    def waiting(self) -> bool:
        """Return True if a command could be offered now."""
        return self.offer is None and bool(self._order)

    def is_idle(self) -> bool:
        """Return True if the queue is empty, no offer is without evidence, and no command is being stored."""
        return not self._by_id and self.offer is None and not self._reserved

    def room_for(self, size_bytes: int, policy: QueuePolicy) -> bool:
        """Return True if the bounds allow one more command of this size."""
        return (
            len(self._by_id) + self._reserved < policy.max_queued
            and self._bytes + self._reserved_bytes + size_bytes <= policy.max_queued_bytes
        )

    def reserve(self, size_bytes: int) -> None:
        """Reserve room for a command that is being stored."""
        self._reserved += 1
        self._reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Release a reservation made by `reserve`, whether or not the command was stored."""
        self._reserved -= 1
        self._reserved_bytes -= size_bytes

    def add(self, record: CommandRecord, expires_at: float, since: float) -> QueuedCommand:
        """Add a stored command."""
        queued = QueuedCommand(record.seq, record, record.state, record.attempts, expires_at, since)
        self._by_id[record.id] = queued
        if self._order and queued < self._order[-1]:
            insort(self._order, queued)
        else:
            self._order.append(queued)
        self._bytes += record.size_bytes
        return queued

    def take(self, number: int, connection: int, polled_at: float, policy: QueuePolicy) -> Batch | None:
        """Offer the oldest commands within the bounds of a reply, at least one.

        Returns `None` if none can be offered.
        """
        if not self.waiting():
            return None
        batch: list[QueuedCommand] = []
        size_bytes = 0
        for queued in self._order:
            size_bytes += queued.record.size_bytes
            if batch and (len(batch) >= policy.max_batch or size_bytes > policy.max_bytes):
                break
            batch.append(queued)
        for queued in batch:
            queued.state = next_state(queued.state, CommandEvent.OFFER)
            queued.attempts += 1
            queued.replies += 1
        self.offer = Batch(self.key, number, tuple(batch), connection, polled_at)
        return self.offer

    def unrecorded(self, offer: Batch, policy: QueuePolicy) -> Batch | None:
        """Reduce an offer that could not be recorded on disk to the commands that may be sent anyway.

        A crash would deliver an unrecorded offer again. So a command of a type with at most one delivery stays in the
        queue, and every command behind it, to keep the order. Returns the reduced offer, `None` if it is empty.
        """
        kept = tuple(takewhile(lambda queued: queued.record.type not in policy.at_most_once, offer.commands))
        for queued in _take_back(offer.commands[len(kept) :]):
            queued.replies -= 1
        self.offer = replace(offer, commands=kept) if kept else None
        return self.offer

    def unwritten(self, offer: Batch) -> tuple[QueuedCommand, ...]:
        """Return the commands of a reply that did not reach the agent to their places.

        It does not count as an attempt.
        """
        back = _take_back(offer.commands)
        if self.offer is offer:
            self.offer = None
        return back

    def delivered(self, offer: Batch) -> tuple[QueuedCommand, ...]:
        """Mark the commands of a batch as delivered. Returns those that were not settled before.

        Evidence may come after the batch became uncertain. It then settles only commands that have not been offered
        again.
        """
        open_states = (
            (CommandState.OFFERED, CommandState.UNCERTAIN) if self.offer is offer else (CommandState.UNCERTAIN,)
        )
        held = (queued for queued in offer.commands if self._by_id.get(queued.record.id) is queued)
        done = tuple(queued for queued in held if queued.state in open_states)
        for queued in done:
            queued.state = next_state(queued.state, CommandEvent.EVIDENCE)
            self._drop(queued)
        if self.offer is offer:
            self.offer = None
        return done

    def mark_uncertain(self, offer: Batch, reason: str, policy: QueuePolicy) -> UncertainOutcome:
        """Mark a batch without evidence as uncertain; offer its commands again or give them up.

        The rule is docs/reference/protocol.md#3-commands, *uncertain*.
        """
        open_ = [queued for queued in offer.commands if queued.state is CommandState.OFFERED]
        for queued in open_:
            queued.state = next_state(queued.state, CommandEvent.NO_EVIDENCE)
            queued.reason = reason
        if self.offer is offer:
            self.offer = None
        return self._redeliver_or_dead(open_, policy)

    def recover_after_restart(self, policy: QueuePolicy) -> UncertainOutcome:
        """Mark every command that was offered before a restart as uncertain."""
        uncertain = [queued for queued in self._order if queued.state in (CommandState.OFFERED, CommandState.UNCERTAIN)]
        for queued in uncertain:
            if queued.state is CommandState.OFFERED:
                queued.state = next_state(queued.state, CommandEvent.NO_EVIDENCE)
            queued.reason = queued.reason or "restart"
        return self._redeliver_or_dead(uncertain, policy)

    def _redeliver_or_dead(self, uncertain: Iterable[QueuedCommand], policy: QueuePolicy) -> UncertainOutcome:
        again: list[QueuedCommand] = []
        dead: list[QueuedCommand] = []
        for queued in uncertain:
            once = queued.record.type in policy.at_most_once
            if not once and policy.redeliver and queued.attempts < policy.max_attempts:
                again.append(queued)
                continue
            queued.state = next_state(queued.state, CommandEvent.GIVE_UP)
            self._drop(queued)
            dead.append(queued)
        return UncertainOutcome(tuple(again), tuple(dead))

    def answered(self, command_id: str) -> tuple[QueuedCommand, ...]:
        """Remove a command for which the agent posted a result. Returns the other commands that are delivered by that.

        These are all commands of the reply, if the command was in no other reply.
        """
        queued = self._by_id.get(command_id)
        if queued is None:
            return ()
        offer = self.offer if queued.state is CommandState.OFFERED and queued.replies == 1 else None
        queued.state = next_state(queued.state, CommandEvent.RESULT)
        self._drop(queued)
        return self.delivered(offer) if offer is not None else ()

    def expire(self, command_id: str) -> QueuedCommand | None:
        """End a command whose time is over. Returns it, or `None` if it is not QUEUED."""
        queued = self._by_id.get(command_id)
        if queued is None or queued.state is not CommandState.QUEUED:
            return None
        queued.state = next_state(queued.state, CommandEvent.EXPIRE)
        self._drop(queued)
        return queued

    def give_up(self, command_id: str) -> QueuedCommand | None:
        """End a command on an operator's request.

        Returns it, or `None` if it is offered at present and cannot be withdrawn.
        """
        queued = self._by_id.get(command_id)
        if queued is None or queued.state is CommandState.OFFERED:
            return None
        queued.state = next_state(queued.state, CommandEvent.GIVE_UP)
        self._drop(queued)
        return queued

    def forget_all(self) -> tuple[QueuedCommand, ...]:
        """End all commands of a session that is being deleted, and return them."""
        ended = self.all()
        for queued in ended:
            queued.state = next_state(queued.state, CommandEvent.FORGET)
            self._drop(queued)
        self.offer = None
        return ended

    def move_to(self, other: CommandQueue) -> None:
        """Move all commands to the queue of a successor session.

        A command that both queues have stays as the successor's. Settle an open offer before: its evidence would arrive
        under another session.
        """
        for queued in self.all():
            self._drop(queued)
            if other.get(queued.record.id) is None:
                record = replace(queued.record, session=other.key, state=queued.state, attempts=queued.attempts)
                moved = other.add(record, queued.expires_at, queued.since)
                moved.reason, moved.replies, moved.arrived_at = queued.reason, queued.replies, queued.arrived_at

    def _drop(self, queued: QueuedCommand) -> None:
        del self._by_id[queued.record.id]
        del self._order[bisect_left(self._order, queued)]
        self._bytes -= queued.record.size_bytes


def _take_back(commands: Iterable[QueuedCommand]) -> tuple[QueuedCommand, ...]:
    """Return those commands that are offered to their places, without counting an attempt."""
    back = tuple(queued for queued in commands if queued.state is CommandState.OFFERED)
    for queued in back:
        # A command that was uncertain before the offer stays uncertain: the failed reply proves nothing about the
        # earlier one.
        queued.state = next_state(queued.state, CommandEvent.NO_EVIDENCE if queued.reason else CommandEvent.UNWRITTEN)
        queued.attempts -= 1
    return back


SHOWN_COMMANDS = 50


class RecentCommand(msgspec.Struct):
    """The newest step of a command. `type` and `arrived_unix` are unknown (`""`, 0) if it arrived before the start."""

    id: str
    session: SessionKey
    event: str
    detail: str
    wall: float
    type: str = ""
    arrived_unix: float = 0.0


class RecentCommands:
    """The commands that changed last, for the status page."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[SessionKey, str], RecentCommand] = OrderedDict()

    def __iter__(self) -> Iterator[RecentCommand]:
        """Iterate over the commands, the newest step first."""
        return iter(list(reversed(self._recent.values())))

    def note(self, key: SessionKey, ids: tuple[str, ...], entry: TraceEntry) -> None:
        """Record a step of commands."""
        for command_id in ids[-SHOWN_COMMANDS:]:
            known = self._recent.pop((key, command_id), None)
            recent = RecentCommand(command_id, key, entry.event, entry.detail, entry.wall)
            if entry.event == ARRIVED:
                recent.type, recent.arrived_unix = entry.detail, entry.wall
            elif known is not None:
                recent.type, recent.arrived_unix = known.type, known.arrived_unix
            self._recent[key, command_id] = recent
        while len(self._recent) > SHOWN_COMMANDS:
            self._recent.popitem(last=False)
