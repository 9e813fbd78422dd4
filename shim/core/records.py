"""Stored data, and the operations that change it (docs/reference/protocol.md#3-commands).

The bridge creates the operations, and a `ports.CommandStore` performs them. Times named `wall` or `…_unix` are
Unix seconds.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec


class SessionKey(NamedTuple):
    """Key of a session: (owner, `cluster` or `agent`, the agent's own id).

    Its text is the primary key of stored rows.
    """

    owner: str
    kind: str
    ident: str

    def __str__(self) -> str:
        return f"{self.owner}/{self.kind}/{self.ident}"

    @classmethod
    def parse(cls, text: str) -> SessionKey:
        """Return the key whose `str()` is `text`. Ids and owners never contain `/`."""
        owner, kind, ident = text.split("/")
        return cls(owner, kind, ident)


VIA_HTTP = "http"


class CommandState(Enum):
    """States of a command (docs/reference/protocol.md#3-commands).

    A command without evidence of delivery is UNCERTAIN until it is offered again.
    """

    QUEUED = "queued"
    OFFERED = "offered"
    UNCERTAIN = "uncertain"
    DELIVERED = "delivered"
    ANSWERED = "answered"
    CLOSED = "closed"
    EXPIRED = "expired"
    DEAD = "dead"


class CommandRecord(msgspec.Struct, frozen=True):
    """A normalised command. `payload` is an object; `created_at` is RFC 3339 UTC; `size_bytes` is its size as JSON.

    `seq` orders the commands of a store; it is 0 before the command is stored. `attempts` counts the offers that the
    agent may have received. `via` is `VIA_HTTP` for a command from the vendor's HTTP API: its result is sent back that
    way.
    """

    session: SessionKey
    id: str
    type: str
    payload: dict[str, Any]
    created_at: str
    arrived_unix: float
    expires_unix: float
    request_id: str = ""
    size_bytes: int = 0
    state: CommandState = CommandState.QUEUED
    attempts: int = 0
    seq: int = 0
    via: str = ""


class SessionRecord(msgspec.Struct, frozen=True):
    """A session as it is stored, always without `k8s_service_token` and without an agent's own token.

    `registration` is the upstream register payload. `reply` has the fields of the last `register_success` that agents
    may receive. `hold` is the state of the hold estimators. All are JSON objects, empty if there is no such data.
    """

    key: SessionKey
    dialect: str
    agent_id: str
    upstream_cluster_id: str
    last_seen_unix: float
    registration: dict[str, Any] = {}
    reply: dict[str, Any] = {}
    hold: dict[str, Any] = {}
    superseded_by: str = ""


class OutboxEntry(msgspec.Struct, frozen=True):
    """A `command_result` to be sent upstream.

    `seq` orders the entries; the row is deleted when the result is CLOSED.
    """

    seq: int
    session: SessionKey
    command_id: str
    request_id: str
    payload: dict[str, Any]


class TraceEntry(msgspec.Struct, frozen=True):
    """One step in the life of a command."""

    wall: float
    event: str
    detail: str = ""


# --- operations -------------------------------------------------------------------------------------------------------

_Result = TypeVar("_Result")


class StoreOperation(msgspec.Struct, Generic[_Result], frozen=True):
    """One operation of a store; the type parameter is the type of its result."""


Operation = StoreOperation[Any]


class PutOutcome(msgspec.Struct, frozen=True):
    """`seq` of the stored command; for a duplicate also its state and the payload of its result, if any."""

    seq: int
    duplicate: bool = False
    state: CommandState = CommandState.QUEUED
    result: dict[str, Any] | None = None


class ResultOutcome(msgspec.Struct, frozen=True):
    """Outcome of a `PutResult`. `entry` is the outbox entry to send, `None` for a repeated result.

    `known` is true if the store knows the command. `state` is the command's state before the result.
    """

    entry: OutboxEntry | None
    known: bool
    state: CommandState | None = None


class CommandDetails(NamedTuple):
    """One stored command. `result` is the payload of its result for the controller, or None."""

    record: CommandRecord
    result: dict[str, Any] | None
    trace: list[TraceEntry]


ARRIVED = "arrived"
"""Event of the first step in a command's trace, which its row implies."""


class PutCommand(StoreOperation[PutOutcome], frozen=True):
    """Store a command unless (session, id) is known, and trace its arrival (`arrived`) also if it is.

    `offered` is the step of its first offer if it is offered at once: the record's state is OFFERED then.
    """

    record: CommandRecord
    offered: TraceEntry | None = None

    @property
    def arrived(self) -> TraceEntry:
        """The step of the command's arrival."""
        return TraceEntry(self.record.arrived_unix, ARRIVED, self.record.type)


class LookUpCommand(StoreOperation[PutOutcome | None], frozen=True):
    """Look up a command of a session. The result is as for a duplicate, `None` if the command is unknown."""

    session: SessionKey
    command_id: str


class MarkCommands(StoreOperation[None], frozen=True):
    """Set the state of commands of a session, add `attempts` to their count, and `step` to their traces.

    The state of a command with a result stays. Of an unknown id only the step is stored.
    """

    session: SessionKey
    ids: tuple[str, ...]
    state: CommandState
    step: TraceEntry
    attempts: int = 0


class RequeueCommand(StoreOperation[bool], frozen=True):
    """Queue a DELIVERED, EXPIRED or DEAD command again, without attempts and with a new expiry.

    An operator asks for this. The result is True if it was queued; in any other state nothing changes.
    """

    session: SessionKey
    command_id: str
    wall: float
    expires_unix: float


class PutResult(StoreOperation[ResultOutcome], frozen=True):
    """Store an agent's result and its outbox entry in one step.

    The first result per (session, id) wins. `payload` is the upstream `command_result` payload. A result for an unknown
    id is put into the outbox as well, with `code: unknown_command` added.
    """

    session: SessionKey
    command_id: str
    payload: dict[str, Any]
    wall: float


class PutOutbox(StoreOperation[OutboxEntry], frozen=True):
    """Put a rejection or a final failure into the outbox.

    It also settles a quarantined command (`StoreContents.quarantined_commands`).
    """

    session: SessionKey
    command_id: str
    request_id: str
    payload: dict[str, Any]


class CloseOutbox(StoreOperation[None], frozen=True):
    """Delete entries that the controller has received. An ANSWERED command without further entries becomes CLOSED."""

    seqs: tuple[int, ...]
    wall: float


class ReadOutbox(StoreOperation[list[OutboxEntry]], frozen=True):
    """Read up to `limit` entries of an owner's outbox with `seq` above `after`, in order."""

    owner: str
    after: int
    limit: int


class SaveSession(StoreOperation[None], frozen=True):
    """Insert or replace a session."""

    record: SessionRecord


class DeleteSession(StoreOperation[None], frozen=True):
    """Delete a session with its aliases and tunnel state. Its commands must have been ended before."""

    key: SessionKey


class MoveSession(StoreOperation[None], frozen=True):
    """Move commands, outbox entries, aliases, tunnel state and traces to another session; delete the first one.

    If both sessions have a command id, the target's command is kept.
    """

    source: SessionKey
    target: SessionKey


class SaveAlias(StoreOperation[None], frozen=True):
    """Insert or replace the alias (owner, agent_id) -> session."""

    owner: str
    agent_id: str
    session: SessionKey


class SaveTunnel(StoreOperation[None], frozen=True):
    """Insert or replace the tunnel state of a session."""

    session: SessionKey
    payload: dict[str, Any]


class AddTrace(StoreOperation[None], frozen=True):
    """Add one step to the trace of each of these commands."""

    session: SessionKey
    ids: tuple[str, ...]
    entry: TraceEntry


class Prune(StoreOperation[None], frozen=True):
    """Delete commands and traces that ended or were delivered before `before_unix`. Outbox entries are kept."""

    before_unix: float


class WriteProbe(StoreOperation[None], frozen=True):
    """Write a row of about `size_bytes` to find out if the store is writable (readiness)."""

    wall: float
    size_bytes: int = 0


class CheckStore(StoreOperation[None], frozen=True):
    """Change nothing: an idle store gets a chance to check its files and to truncate its write-ahead log."""


class FindCommand(StoreOperation[list[CommandDetails]], frozen=True):
    """Find commands by id in all sessions.

    A rejected command was never stored, so only its trace may be known. Its record has `seq` 0, state DEAD and empty
    fields.
    """

    command_id: str


class StoreContents(msgspec.Struct, frozen=True):
    """Contents of a store when it is opened. `commands` are those in QUEUED, OFFERED or UNCERTAIN, by `seq`.

    `key` is the store's random 32-byte key for owner ids. `quarantined` counts rows that could not be decoded and were
    moved to the quarantine table. `quarantined_commands` lists the commands among them as (session, id, request_id),
    with `None` and empty texts for unreadable fields. A command with a session and an id is listed at every opening
    until a `PutOutbox` for it is stored. `moved_aside` is the path to which a corrupt database was moved, else empty.
    `warnings` are sentences for the log.
    """

    key: bytes
    sessions: tuple[SessionRecord, ...] = ()
    aliases: tuple[tuple[str, str, SessionKey], ...] = ()
    tunnels: tuple[tuple[SessionKey, dict[str, Any]], ...] = ()
    commands: tuple[CommandRecord, ...] = ()
    outbox_owners: tuple[str, ...] = ()
    quarantined: int = 0
    quarantined_commands: tuple[tuple[SessionKey | None, str, str], ...] = ()
    moved_aside: str = ""
    warnings: tuple[str, ...] = ()
