"""The reference implementation of a command store: plain dictionaries, with which the stores of the shim are compared.

Worlds in virtual time use it as their store, because it needs no thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from shim.core.records import (
    AddTrace,
    CheckStore,
    CloseOutbox,
    CommandDetails,
    CommandRecord,
    CommandState,
    DeleteSession,
    FindCommand,
    LookUpCommand,
    MarkCommands,
    MoveSession,
    Operation,
    OutboxEntry,
    Prune,
    PutCommand,
    PutOutbox,
    PutOutcome,
    PutResult,
    ReadOutbox,
    RequeueCommand,
    ResultOutcome,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    SessionKey,
    SessionRecord,
    StoreContents,
    StoreOperation,
    TraceEntry,
    WriteProbe,
)
from shim.errors import StoreError
from shim.ports import StoreDone
from shim.store.rows import encode_json, never_stored
from shim.store.writer import CallThreadsafe, run_on_loop, store_error

MAX_LONE_TRACES = 10_000
_LIVE = frozenset({CommandState.QUEUED, CommandState.OFFERED, CommandState.UNCERTAIN})
_ENDED = frozenset({CommandState.DELIVERED, CommandState.CLOSED, CommandState.EXPIRED, CommandState.DEAD})
_CommandKey = tuple[SessionKey, str]
_Result = TypeVar("_Result")


class _StoredCommand(msgspec.Struct):
    record: CommandRecord
    updated_unix: float
    result: dict[str, Any] | None
    trace: list[TraceEntry]

    def enter(self, state: CommandState, wall: float, attempts: int = 0) -> None:
        """Change the state and the number of attempts, at the Unix time `wall`."""
        self.record = replace(self.record, state=state, attempts=max(self.record.attempts + attempts, 0))
        self.updated_unix = wall


class MemoryStore:
    """A `ports.CommandStore` in memory. Its content survives `close()` and a later `open()`."""

    def __init__(self, call_threadsafe: CallThreadsafe) -> None:
        self._call_threadsafe = call_threadsafe
        self._is_open = False
        self._key = secrets.token_bytes(32)
        self._last_command = 0
        self._last_entry = 0
        self._commands: dict[_CommandKey, _StoredCommand] = {}
        self._outbox: dict[int, OutboxEntry] = {}
        self._unknown_results: dict[_CommandKey, float] = {}
        self._lone_traces: list[tuple[_CommandKey, TraceEntry]] = []
        self._sessions: dict[SessionKey, SessionRecord] = {}
        self._aliases: dict[tuple[str, str], SessionKey] = {}
        self._tunnels: dict[SessionKey, dict[str, Any]] = {}
        self._carriers: dict[type[Operation], Callable[[Any], Any]] = {
            PutCommand: self._put_command,
            LookUpCommand: self._look_up,
            MarkCommands: self._mark,
            RequeueCommand: self._requeue,
            AddTrace: self._add_trace,
            Prune: self._prune,
            FindCommand: self._find,
            PutResult: self._put_result,
            PutOutbox: lambda o: self._insert_outbox(o.session, o.command_id, o.request_id, o.payload),
            CloseOutbox: self._close_outbox,
            ReadOutbox: self._read_outbox,
            SaveSession: lambda o: self._sessions.update({o.record.key: o.record}),
            DeleteSession: lambda o: self._delete_session(o.key),
            MoveSession: self._move_session,
            SaveAlias: lambda o: self._aliases.update({(o.owner, o.agent_id): o.session}),
            WriteProbe: lambda _: None,
            CheckStore: lambda _: None,
            SaveTunnel: lambda o: self._tunnels.update({o.session: o.payload}),
        }

    def open(self) -> StoreContents:
        """Return the live commands and all sessions (`ports.CommandStore`)."""
        self._is_open = True
        live = (each.record for each in self._commands.values() if each.record.state in _LIVE)
        return StoreContents(
            key=self._key,
            sessions=tuple(self._sessions[key] for key in sorted(self._sessions, key=str)),
            aliases=tuple((*name, session) for name, session in sorted(self._aliases.items())),
            tunnels=tuple((key, self._tunnels[key]) for key in sorted(self._tunnels, key=str)),
            commands=tuple(sorted(live, key=lambda record: record.seq)),
            outbox_owners=tuple(sorted({entry.session.owner for entry in self._outbox.values()})),
        )

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        """Carry out operations at once; schedule `done` on the event loop (`ports.CommandStore`)."""
        operations = (operation, *also)
        outcome: Any
        try:
            # Reject what a database could not store, before any operation is applied.
            encode_json(operations)
            carriers = [self._carriers[type(operation)] for operation in operations]
        except (TypeError, ValueError, RecursionError, KeyError) as error:
            outcome = store_error(error)
        else:
            if self._is_open:
                outcome, *_ = [carry_out(each) for carry_out, each in zip(carriers, operations, strict=True)]
            else:
                outcome = StoreError("the store is not open")
        if done is not None:
            run_on_loop(self._call_threadsafe, [partial(done, outcome)])

    def close(self) -> None:
        """Reject later submissions (`ports.CommandStore`)."""
        self._is_open = False

    # --- commands -----------------------------------------------------------------------------------------------------

    def _put_command(self, operation: PutCommand) -> PutOutcome:
        record = operation.record
        known = self._look_up(LookUpCommand(record.session, record.id))
        if known is not None:
            self._add_trace(AddTrace(record.session, (record.id,), operation.arrived))
            return known
        self._last_command += 1
        trace = [operation.arrived, *([operation.offered] if operation.offered is not None else [])]
        self._commands[record.session, record.id] = _StoredCommand(
            replace(record, seq=self._last_command), record.arrived_unix, None, trace
        )
        return PutOutcome(self._last_command)

    def _look_up(self, operation: LookUpCommand) -> PutOutcome | None:
        known = self._commands.get((operation.session, operation.command_id))
        if known is None:
            return None
        return PutOutcome(known.record.seq, duplicate=True, state=known.record.state, result=known.result)

    def _mark(self, operation: MarkCommands) -> None:
        for each in operation.ids:
            command = self._commands.get((operation.session, each))
            if command is not None:
                state = operation.state if command.result is None else command.record.state
                command.enter(state, operation.step.wall, operation.attempts)
        self._add_trace(AddTrace(operation.session, operation.ids, operation.step))

    def _requeue(self, operation: RequeueCommand) -> bool:
        command = self._commands.get((operation.session, operation.command_id))
        if command is None or command.record.state not in (
            CommandState.DELIVERED,
            CommandState.EXPIRED,
            CommandState.DEAD,
        ):
            return False
        command.enter(CommandState.QUEUED, operation.wall, -command.record.attempts)
        command.record = replace(command.record, expires_unix=operation.expires_unix)
        return True

    def _add_trace(self, operation: AddTrace) -> None:
        for each in operation.ids:
            command = self._commands.get((operation.session, each))
            if command is not None:
                command.trace.append(operation.entry)
            else:
                self._lone_traces.append(((operation.session, each), operation.entry))
                del self._lone_traces[:-MAX_LONE_TRACES]

    def _prune(self, operation: Prune) -> None:
        before = operation.before_unix
        self._commands = {
            key: command
            for key, command in self._commands.items()
            # A command may have arrived later than it was changed, if the clock was set back: it stays, as in the SQL.
            if command.record.state not in _ENDED or max(command.updated_unix, command.record.arrived_unix) >= before
        }
        self._lone_traces = [each for each in self._lone_traces if each[1].wall >= before]
        self._unknown_results = {key: wall for key, wall in self._unknown_results.items() if wall >= before}

    def _find(self, operation: FindCommand) -> list[CommandDetails]:
        lone: dict[SessionKey, list[TraceEntry]] = {}
        for (session, command_id), entry in self._lone_traces:
            if command_id == operation.command_id:
                lone.setdefault(session, []).append(entry)
        stored = [each for (_, command_id), each in self._commands.items() if command_id == operation.command_id]
        stored.sort(key=lambda each: each.record.seq)
        found = [
            CommandDetails(each.record, each.result, lone.pop(each.record.session, []) + each.trace) for each in stored
        ]
        return found + [
            CommandDetails(never_stored(key, operation.command_id, trace), None, trace) for key, trace in lone.items()
        ]

    # --- results and the outbox ---------------------------------------------------------------------------------------

    def _put_result(self, operation: PutResult) -> ResultOutcome:
        key = (operation.session, operation.command_id)
        command = self._commands.get(key)
        if command is None:
            if key in self._unknown_results:
                return ResultOutcome(None, known=False)
            self._unknown_results[key] = operation.wall
            payload = operation.payload | {"code": "unknown_command"}
            return ResultOutcome(self._insert_outbox(*key, "", payload), known=False)
        state = command.record.state
        if command.result is not None:
            return ResultOutcome(None, known=True, state=state)
        command.result = operation.payload
        command.enter(CommandState.ANSWERED, operation.wall)
        entry = self._insert_outbox(*key, command.record.request_id, operation.payload)
        return ResultOutcome(entry, known=True, state=state)

    def _insert_outbox(
        self, session: SessionKey, command_id: str, request_id: str, payload: dict[str, Any]
    ) -> OutboxEntry:
        self._last_entry += 1
        entry = OutboxEntry(self._last_entry, session, command_id, request_id, payload)
        self._outbox[entry.seq] = entry
        return entry

    def _close_outbox(self, operation: CloseOutbox) -> None:
        closed = [self._outbox.pop(seq) for seq in operation.seqs if seq in self._outbox]
        still_there = {(entry.session, entry.command_id) for entry in self._outbox.values()}
        for key in {(entry.session, entry.command_id) for entry in closed} - still_there:
            command = self._commands.get(key)
            if command is not None and command.record.state is CommandState.ANSWERED:
                command.enter(CommandState.CLOSED, operation.wall)

    def _read_outbox(self, operation: ReadOutbox) -> list[OutboxEntry]:
        page = [
            entry
            for seq, entry in sorted(self._outbox.items())
            if seq > operation.after and entry.session.owner == operation.owner
        ]
        return page[: operation.limit]

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _delete_session(self, key: SessionKey) -> None:
        self._sessions.pop(key, None)
        self._tunnels.pop(key, None)
        self._aliases = {name: session for name, session in self._aliases.items() if session != key}

    def _move_session(self, operation: MoveSession) -> None:
        source, target = operation.source, operation.target
        if source == target:
            return
        for session, command_id in [key for key in self._commands if key[0] == source]:
            command = self._commands.pop((session, command_id))
            command.record = replace(command.record, session=target)
            self._commands.setdefault((target, command_id), command)
        for (session, command_id), wall in list(self._unknown_results.items()):
            if session == source:
                del self._unknown_results[session, command_id]
                self._unknown_results.setdefault((target, command_id), wall)
        for seq, entry in self._outbox.items():
            if entry.session == source:
                self._outbox[seq] = replace(entry, session=target)
        self._lone_traces = [
            ((target if key[0] == source else key[0], key[1]), entry) for key, entry in self._lone_traces
        ]
        moved = [name[1] for name, session in self._aliases.items() if session == source]
        tunnel = self._tunnels.get(source)
        self._move_names(source, target, moved)
        if tunnel is not None:
            self._tunnels.setdefault(target, tunnel)

    def _move_names(self, source: SessionKey, target: SessionKey, agent_ids: list[str]) -> None:
        self._delete_session(source)
        for agent_id in agent_ids:
            self._aliases.setdefault((target.owner, agent_id), target)
