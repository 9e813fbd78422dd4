"""The life of commands: the table of states, and the queue of one session."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

import msgspec
from msgspec.structs import replace

from shim.core.records import CommandRecord, CommandState
from shim.errors import IllegalTransition


class CommandEvent(Enum):
    """What can happen to a command."""

    OFFER = "offer"  # put into a poll reply
    UNWRITTEN = "unwritten"  # the reply did not reach the agent: no attempt
    EVIDENCE = "evidence"  # the agent has it
    NO_EVIDENCE = "no_evidence"  # nobody can tell
    RESULT = "result"  # the agent's result is on disk
    FENCED = "fenced"  # the controller has the result
    EXPIRE = "expire"
    GIVE_UP = "give_up"  # attempts used up, at most once, or purged by hand
    FORGET = "forget"  # its session is deleted
    REDELIVER = "redeliver"  # by hand


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
    # A valid result is always stored, in every state; after an end it changes the state no more than a repeat does.
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
    """The state after `step`; raises `IllegalTransition` for a cell that the table does not have."""
    after = TRANSITIONS.get((state, step))
    if after is None:
        raise IllegalTransition(f"{step.name} in {state.name}")
    return after


ARRIVING_COMMANDS = 128
ARRIVING_BYTES = 4 * 1024 * 1024
MAX_ARRIVING_COMMANDS = 4096
MAX_ARRIVING_BYTES = 24 * 1024 * 1024
OVERLAP_S = 0.02  # a poll so soon after a reply on another connection may have been sent before that was read


@dataclass(slots=True, order=True)
class QueuedCommand:
    """A command that waits for its agent, ordered by arrival. `reason` says why it is offered again.

    `replies` counts the poll replies that it was put into, also those that were not written. `since` (when it was taken
    in), `arrived_at` (`None` after a restart) and `expires_at` are monotonic seconds.
    """

    seq: int
    record: CommandRecord = field(compare=False)
    state: CommandState = field(compare=False)
    attempts: int = field(compare=False)
    expires_at: float = field(compare=False)
    since: float = field(compare=False)
    reason: str = field(compare=False, default="")
    replies: int = field(compare=False, default=0)
    arrived_at: float | None = field(compare=False, default=None)


@dataclass(slots=True)
class Batch:
    """A batch in a poll reply, until there is evidence or none. `connection` is the reply's TCP connection."""

    number: int
    commands: tuple[QueuedCommand, ...]
    connection: int
    written_at: float | None = None
    cleanly_closed: bool | None = None  # None while the connection is open

    @property
    def ids(self) -> tuple[str, ...]:
        """The commands' ids in order."""
        return tuple(live.record.id for live in self.commands)

    def is_acknowledged_by_poll_at(self, arrived_s: float) -> bool:
        """Whether a poll that arrived then tells that the agent has read the reply with this offer (protocol.md §3).

        A connection that was closed in an orderly way has been read. While it is open only a poll that cannot have been
        under way already tells something: agents may poll twice at once, and pipeline.
        """
        if self.cleanly_closed is not None:
            return self.cleanly_closed
        return self.written_at is not None and arrived_s >= self.written_at + OVERLAP_S


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Bounds of a session's queue and of one reply, and what to do without evidence."""

    max_queued: int
    max_queued_bytes: int
    max_batch: int
    max_bytes: int
    max_attempts: int
    redeliver: bool
    at_most_once: frozenset[str]


@dataclass(slots=True)
class Arriving:
    """The commands of all sessions that are on their way to the disk, are looked up there, or have just ended.

    While there is no room, no further frame is read, so that the controller is slowed down by TCP. A disk that stands
    still must not keep pings unread for long: then frames are read on, and commands beyond the limits are refused.
    """

    commands: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count a command that was submitted to the store."""
        self.commands += 1
        self.size_bytes += size_bytes

    def remove(self, size_bytes: int) -> None:
        """Count it no more: the store has answered."""
        self.commands -= 1
        self.size_bytes -= size_bytes

    @property
    def has_room(self) -> bool:
        """Whether the next frame may be read."""
        return self.commands < ARRIVING_COMMANDS and self.size_bytes < ARRIVING_BYTES

    @property
    def exhausted(self) -> bool:
        """Whether a further command must be refused without asking the store."""
        return self.commands >= MAX_ARRIVING_COMMANDS or self.size_bytes >= MAX_ARRIVING_BYTES


class UncertainOutcome(msgspec.Struct, frozen=True):
    """What became of a batch without evidence: commands to offer again, and commands given up."""

    again: tuple[QueuedCommand, ...]
    dead: tuple[QueuedCommand, ...]


class CommandQueue:
    """The commands of one session that its agent has not been seen to have, in the order of their arrival."""

    __slots__ = ("_by_id", "_bytes", "_order", "_reserved", "_reserved_bytes", "offer")

    def __init__(self) -> None:
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
        """JSON bytes of the commands held."""
        return self._bytes

    @property
    def waiting_since(self) -> float | None:
        """When the oldest command was taken in (monotonic), `None` if there is none."""
        return self._order[0].since if self._order else None

    def get(self, command_id: str) -> QueuedCommand | None:
        """A held command."""
        return self._by_id.get(command_id)

    def all(self) -> tuple[QueuedCommand, ...]:
        """All held commands, offered ones included, in order."""
        return tuple(self._order)

    def waiting(self) -> bool:
        """True if a command could be offered now."""
        return self.offer is None and bool(self._order)

    def room_for(self, size_bytes: int, policy: QueuePolicy) -> bool:
        """Whether the bounds allow one more command of this size."""
        return (
            len(self._by_id) + self._reserved < policy.max_queued
            and self._bytes + self._reserved_bytes + size_bytes <= policy.max_queued_bytes
        )

    def reserve(self, size_bytes: int) -> None:
        """A command is on its way to the disk."""
        self._reserved += 1
        self._reserved_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """It has arrived there, or not."""
        self._reserved -= 1
        self._reserved_bytes -= size_bytes

    def add(self, record: CommandRecord, expires_at: float, since: float) -> QueuedCommand:
        """Take in a stored command."""
        live = QueuedCommand(record.seq, record, record.state, record.attempts, expires_at, since)
        self._by_id[record.id] = live
        insort(self._order, live)
        self._bytes += record.size_bytes
        return live

    def take(self, number: int, connection: int, policy: QueuePolicy) -> Batch | None:
        """Offer the oldest commands within the reply's bounds, at least one; `None` if there is nothing to offer."""
        if not self.waiting():
            return None
        batch: list[QueuedCommand] = []
        size_bytes = 0
        for live in self._order:
            size_bytes += live.record.size_bytes
            if batch and (len(batch) >= policy.max_batch or size_bytes > policy.max_bytes):
                break
            batch.append(live)
        for live in batch:
            live.state = next_state(live.state, CommandEvent.OFFER)
            live.attempts += 1
            live.replies += 1
        self.offer = Batch(number, tuple(batch), connection)
        return self.offer

    def unrecorded(self, offer: Batch, policy: QueuePolicy) -> Batch | None:
        """The disk took no record of an offer, so that a crash would repeat it. Returns what may go out all the same.

        What must not be repeated waits, and everything behind it.
        """
        kept = tuple(takewhile(lambda live: live.record.type not in policy.at_most_once, offer.commands))
        for live in offer.commands[len(kept) :]:
            if live.state is not CommandState.OFFERED:
                continue
            live.state = next_state(live.state, CommandEvent.NO_EVIDENCE if live.reason else CommandEvent.UNWRITTEN)
            live.attempts -= 1
            live.replies -= 1
        self.offer = Batch(offer.number, kept, offer.connection) if kept else None
        return self.offer

    def unwritten(self, offer: Batch) -> tuple[QueuedCommand, ...]:
        """The reply did not reach the agent: its commands are back in their old places, and that was no attempt."""
        back = tuple(live for live in offer.commands if live.state is CommandState.OFFERED)
        for live in back:
            # What was uncertain before stays so: a further offer that failed is no news about the earlier one.
            live.state = next_state(live.state, CommandEvent.NO_EVIDENCE if live.reason else CommandEvent.UNWRITTEN)
            live.attempts -= 1
        if self.offer is offer:
            self.offer = None
        return back

    def delivered(self, offer: Batch) -> tuple[QueuedCommand, ...]:
        """There is evidence: the agent has the batch. Returns those that were still open.

        Evidence may come late: then it settles what became uncertain and has not been offered again.
        """
        open_states = (
            (CommandState.OFFERED, CommandState.UNCERTAIN) if self.offer is offer else (CommandState.UNCERTAIN,)
        )
        held = (live for live in offer.commands if self._by_id.get(live.record.id) is live)
        done = tuple(live for live in held if live.state in open_states)
        for live in done:
            live.state = next_state(live.state, CommandEvent.EVIDENCE)
            self._drop(live)
        if self.offer is offer:
            self.offer = None
        return done

    def mark_uncertain(self, offer: Batch, reason: str, policy: QueuePolicy) -> UncertainOutcome:
        """No evidence came: offer again or give up (protocol.md §3, *uncertain*)."""
        open_ = [live for live in offer.commands if live.state is CommandState.OFFERED]
        for live in open_:
            live.state = next_state(live.state, CommandEvent.NO_EVIDENCE)
            live.reason = reason
        if self.offer is offer:
            self.offer = None
        return self._redeliver_or_dead(open_, policy)

    def recover_after_restart(self, policy: QueuePolicy) -> UncertainOutcome:
        """After a restart: commands that were offered, or uncertain already, are uncertain now."""
        doubtful = [live for live in self._order if live.state in (CommandState.OFFERED, CommandState.UNCERTAIN)]
        for live in doubtful:
            if live.state is CommandState.OFFERED:
                live.state = next_state(live.state, CommandEvent.NO_EVIDENCE)
            live.reason = live.reason or "restart"
        return self._redeliver_or_dead(doubtful, policy)

    def _redeliver_or_dead(self, doubtful: Iterable[QueuedCommand], policy: QueuePolicy) -> UncertainOutcome:
        again: list[QueuedCommand] = []
        dead: list[QueuedCommand] = []
        for live in doubtful:
            once = live.record.type in policy.at_most_once
            if not once and policy.redeliver and live.attempts < policy.max_attempts:
                again.append(live)
                continue
            live.state = next_state(live.state, CommandEvent.GIVE_UP)
            self._drop(live)
            dead.append(live)
        return UncertainOutcome(tuple(again), tuple(dead))

    def answered(self, command_id: str) -> tuple[QueuedCommand, ...]:
        """The agent posted a result for it. Returns what else it must have because of that.

        It has the rest of the reply that the command came in, if it can have come in no other.
        """
        live = self._by_id.get(command_id)
        if live is None:
            return ()
        offer = self.offer if live.state is CommandState.OFFERED and live.replies == 1 else None
        live.state = next_state(live.state, CommandEvent.RESULT)
        self._drop(live)
        return self.delivered(offer) if offer is not None else ()

    def expire(self, command_id: str) -> QueuedCommand | None:
        """Its time is over; only a QUEUED command expires."""
        live = self._by_id.get(command_id)
        if live is None or live.state is not CommandState.QUEUED:
            return None
        live.state = next_state(live.state, CommandEvent.EXPIRE)
        self._drop(live)
        return live

    def give_up(self, command_id: str) -> QueuedCommand | None:
        """Purge by hand; an offered command cannot be taken back."""
        live = self._by_id.get(command_id)
        if live is None or live.state is CommandState.OFFERED:
            return None
        live.state = next_state(live.state, CommandEvent.GIVE_UP)
        self._drop(live)
        return live

    def forget_all(self) -> tuple[QueuedCommand, ...]:
        """The session is deleted: all of its commands end."""
        ended = self.all()
        for live in ended:
            live.state = next_state(live.state, CommandEvent.FORGET)
            self._drop(live)
        self.offer = None
        return ended

    def drain_to(self, other: CommandQueue, rekey: Callable[[CommandRecord], CommandRecord]) -> None:
        """Move everything to a successor's queue; commands that both know stay the successor's.

        An open offer must have been settled before: its evidence would come under another session.
        """
        for live in self.all():
            self._drop(live)
            if other.get(live.record.id) is None:
                record = replace(rekey(live.record), state=live.state, attempts=live.attempts)
                moved = other.add(record, live.expires_at, live.since)
                moved.reason, moved.replies, moved.arrived_at = live.reason, live.replies, live.arrived_at

    def _drop(self, live: QueuedCommand) -> None:
        if self._by_id.pop(live.record.id, None) is not None:
            del self._order[bisect_left(self._order, live)]
            self._bytes -= live.record.size_bytes
