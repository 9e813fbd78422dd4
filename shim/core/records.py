"""What is kept on disk, as pure data, and the operations that keep it (protocol.md §1.6, §3).

The core returns these operations as effects; a `ports.CommandStore` carries them out. `wall` times are Unix seconds.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import msgspec


class SessionKey(NamedTuple):
    """(owner, `cluster` or `agent`, the agent's own id). Its text form is the primary key of everything stored."""

    owner: str
    kind: str
    ident: str

    def __str__(self) -> str:
        return f"{self.owner}/{self.kind}/{self.ident}"

    @classmethod
    def parse(cls, text: str) -> SessionKey:
        """Inverse of `str()`; ids and owners never contain `/`."""
        owner, kind, ident = text.split("/")
        return cls(owner, kind, ident)


VIA_HTTP = "http"


class CommandState(Enum):
    """The life of a command (protocol.md §3). A command without evidence is UNCERTAIN until it is offered again."""

    QUEUED = "queued"
    OFFERED = "offered"
    UNCERTAIN = "uncertain"
    DELIVERED = "delivered"
    ANSWERED = "answered"
    CLOSED = "closed"
    EXPIRED = "expired"
    DEAD = "dead"


class CommandRecord(msgspec.Struct, frozen=True):
    """A normalised command. `payload` is an object; `created_at` RFC 3339 UTC; `size_bytes` its JSON size.

    `seq` orders the commands of a store; 0 until it is stored. `attempts` counts offers that may have been received.
    `via` is `VIA_HTTP` for a command that came by the vendor's HTTP API: its result goes back that way.
    """

    session: SessionKey
    id: str
    type: str
    payload: dict[str, Any]
    created_at: str
    arrived_wall: float
    expires_wall: float
    request_id: str = ""
    size_bytes: int = 0
    state: CommandState = CommandState.QUEUED
    attempts: int = 0
    seq: int = 0
    via: str = ""


class SessionRecord(msgspec.Struct, frozen=True):
    """A session as it is stored; never with `k8s_service_token` or an agent's own token.

    `registration` is the upstream register payload, `reply` the fields of the last `register_success` that may be
    passed down, `hold` the learnt hold state (JSON objects; empty where there is none).
    """

    key: SessionKey
    dialect: str
    agent_id: str
    upstream_cluster_id: str
    last_seen_wall: float
    registration: dict[str, Any] = {}
    reply: dict[str, Any] = {}
    hold: dict[str, Any] = {}
    superseded_by: str = ""


class OutboxEntry(msgspec.Struct, frozen=True):
    """A `command_result` on its way up; `seq` orders them, and the row goes when the result is CLOSED."""

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
# Each tells the result that a store gives for it; `None` where none is named.


class PutCommand(msgspec.Struct, frozen=True):
    """Queue a command unless (session, id) is known. Result: `PutOutcome`."""

    record: CommandRecord


class PutOutcome(msgspec.Struct, frozen=True):
    """`seq` of the stored command; for a duplicate the state it is in and its result's outbox payload, if any."""

    seq: int
    duplicate: bool = False
    state: CommandState = CommandState.QUEUED
    result: dict[str, Any] | None = None


class LookUpCommand(msgspec.Struct, frozen=True):
    """Tell what is stored of a command of a session. Result: `PutOutcome` as for a duplicate, `None` if unknown."""

    session: SessionKey
    command_id: str


class MarkCommands(msgspec.Struct, frozen=True):
    """Move commands of a session to `state`. `attempts` is added to their count. Unknown ids are ignored."""

    session: SessionKey
    ids: tuple[str, ...]
    state: CommandState
    wall: float
    attempts: int = 0


class RequeueCommand(msgspec.Struct, frozen=True):
    """By hand: a command that is DELIVERED, EXPIRED or DEAD is QUEUED again, with no attempts and another expiry.

    Result: whether it was; in any other state nothing changes.
    """

    session: SessionKey
    command_id: str
    wall: float
    expires_wall: float


class PutResult(msgspec.Struct, frozen=True):
    """Store an agent's result and its outbox entry in one step. Result: `ResultOutcome`.

    The first result per (session, id) wins. `payload` is the upstream `command_result` payload; for an unknown id it is
    put into the outbox all the same, with `code: unknown_command` added.
    """

    session: SessionKey
    command_id: str
    payload: dict[str, Any]
    wall: float


class ResultOutcome(msgspec.Struct, frozen=True):
    """`entry` is the outbox entry to send, `None` for a repeat. `known` tells whether the command was ours;

    `state` is the command's state before the result.
    """

    entry: OutboxEntry | None
    known: bool
    state: CommandState | None = None


class PutOutbox(msgspec.Struct, frozen=True):
    """Put a rejection or a final failure into the outbox. Result: the `OutboxEntry` with its `seq`.

    A quarantined command is answered by it (`Loaded.quarantined_commands`).
    """

    session: SessionKey
    command_id: str
    request_id: str
    payload: dict[str, Any]


class CloseOutbox(msgspec.Struct, frozen=True):
    """The controller has these entries: delete them; commands that are ANSWERED become CLOSED with their last entry."""

    seqs: tuple[int, ...]
    wall: float


class ReadOutbox(msgspec.Struct, frozen=True):
    """Result: up to `limit` `OutboxEntry`s of the owner with `seq` above `after`, in order, as a list."""

    owner: str
    after: int
    limit: int


class SaveSession(msgspec.Struct, frozen=True):
    """Insert or replace a session."""

    record: SessionRecord


class DeleteSession(msgspec.Struct, frozen=True):
    """Delete a session with its aliases and tunnel state; its commands must have been ended before."""

    key: SessionKey


class MoveSession(msgspec.Struct, frozen=True):
    """Move commands, outbox entries, aliases, tunnel state and traces from one session to another; delete the first.

    Where both know a command id, the target's stands.
    """

    source: SessionKey
    target: SessionKey


class SaveAlias(msgspec.Struct, frozen=True):
    """Insert or replace (owner, agent_id) -> session."""

    owner: str
    agent_id: str
    session: SessionKey


class SaveTunnel(msgspec.Struct, frozen=True):
    """Insert or replace the tunnel state of a session."""

    session: SessionKey
    payload: dict[str, Any]


class AddTrace(msgspec.Struct, frozen=True):
    """Add one step to the trace of each of these commands."""

    session: SessionKey
    ids: tuple[str, ...]
    entry: TraceEntry


class Prune(msgspec.Struct, frozen=True):
    """Forget commands (with traces) that ended, or were delivered, before `before_wall`; outbox entries stay."""

    before_wall: float


class WriteProbe(msgspec.Struct, frozen=True):
    """Write something, to learn whether the store can be written (readiness)."""

    wall: float


class FindCommand(msgspec.Struct, frozen=True):
    """Result: a list of (`CommandRecord`, result payload or `None`, list of `TraceEntry`) with this id, any session.

    Where only a trace is known (a rejected command was never stored), the record has `seq` 0, is DEAD and empty else.
    """

    command_id: str


Operation = (
    PutCommand
    | LookUpCommand
    | MarkCommands
    | RequeueCommand
    | PutResult
    | PutOutbox
    | CloseOutbox
    | ReadOutbox
    | SaveSession
    | DeleteSession
    | MoveSession
    | SaveAlias
    | SaveTunnel
    | AddTrace
    | Prune
    | WriteProbe
    | FindCommand
)


class StoreContents(msgspec.Struct, frozen=True):
    """What a store holds when it is opened. `commands` are those in QUEUED, OFFERED or UNCERTAIN, by `seq`.

    `key` is the store's random 32-byte key for owner ids. `quarantined` counts rows that could not be decoded and were
    moved aside. `quarantined_commands` names the commands among them as (session, id, request_id): session `None` and
    the texts empty where they cannot be read. One that has a session and an id is named at every opening until a
    `PutOutbox` for it is stored. `moved_aside` is the path that a corrupt database was moved to, else empty;
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
