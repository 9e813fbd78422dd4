"""The operations of `core.records` as SQL, and their dispatch.

Each method carries out one operation in a transaction that the caller begins and ends. It returns a `Finish`, because
PostgreSQL sends the statements of a whole batch before it waits for the first result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from heapq import merge
from operator import attrgetter
from typing import Any

from shim.core.records import (
    AddTrace,
    CheckStore,
    CloseOutbox,
    CommandDetails,
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
    TraceEntry,
    WriteProbe,
)
from shim.store import rows
from shim.store.database import Database, Finish, Rows, nothing
from shim.store.rows import (
    MAX_STEPS_CHARS,
    UndecodableRow,
    decode_object,
    encode_json,
    insert_parameters,
    optional_object,
    parse_key,
)
from shim.store.schema import ENDED

# Limit for the steps of commands that have no row. Ids and reasons are bounded in length before they reach the store.
MAX_LONE_TRACES = 10_000

COMMAND_COLUMNS = (
    "session, id, request_id, state, attempts, updated, arrived, expires, size_bytes, type, created_at, payload, via,"
    " first_step, steps"
)
INSERT_COMMAND = (
    f"INSERT INTO commands ({COMMAND_COLUMNS})"  # noqa: S608 - constants
    " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) ON CONFLICT (session, id) DO NOTHING"
)
_SELECT_COMMAND = "SELECT seq, state, result FROM commands WHERE session = ?1 AND id = ?2"
# The indexes begin with the session, because nearly all statements name one. A search in all sessions costs one probe
# of the index per session; an additional index on the id alone would slow down every insert.
_ANY_SESSION = (
    "WITH RECURSIVE known (session) AS (SELECT min(session) FROM {table} UNION ALL"
    " SELECT (SELECT min(session) FROM {table} WHERE session > known.session) FROM known"
    " WHERE known.session IS NOT NULL)"
)
_FIND_COMMANDS = (
    f"{_ANY_SESSION.format(table='commands')} SELECT result, first_step, steps, {rows.COMMAND_COLUMNS} FROM commands"  # noqa: S608 - constants
    " WHERE seq IN (SELECT c.seq FROM known CROSS JOIN commands AS c WHERE c.session = known.session AND c.id = ?1)"
    " AND {mine} ORDER BY seq"
)
_FIND_LONE_TRACES = (
    f"{_ANY_SESSION.format(table='lone_traces')} SELECT t.session, t.wall, t.event, t.detail"  # noqa: S608 - constants
    " FROM known CROSS JOIN lone_traces AS t WHERE t.session = known.session AND t.command_id = ?1 AND {mine}"
    " ORDER BY t.id"
)
# A result is final: it may have been stored after the change was decided and before it is carried out.
_CHANGE = (
    "UPDATE commands SET state = CASE WHEN result IS NULL THEN ?1 ELSE state END,"
    " attempts = CASE WHEN attempts + ?2 > 0 THEN attempts + ?2 ELSE 0 END, updated = ?3"
)
MARK = f"{_CHANGE} WHERE session = ?4 AND id = ?5"
# A step is appended to the command's own row as long as that has room.
_MARK_WITH_STEP = f"{_CHANGE}, steps = steps || ?6 WHERE session = ?4 AND id = ?5 AND length(steps) < {MAX_STEPS_CHARS}"
_ADD_STEP = (
    "UPDATE commands SET steps = steps || ?3"  # noqa: S608 - constants
    f" WHERE session = ?1 AND id = ?2 AND length(steps) < {MAX_STEPS_CHARS}"
)
_REQUEUE = (
    "UPDATE commands SET state = 'queued', attempts = 0, expires = ?1, updated = ?2"
    " WHERE session = ?3 AND id = ?4 AND state IN ('delivered', 'expired', 'dead')"
)
_INSERT_TRACE = (
    "INSERT INTO traces (command, wall, event, detail)"
    " SELECT seq, ?1, ?2, ?3 FROM commands WHERE session = ?4 AND id = ?5"
)
_INSERT_LONE_TRACE = "INSERT INTO lone_traces (session, command_id, wall, event, detail) VALUES (?1, ?2, ?3, ?4, ?5)"
_SELECT_TRACE = "SELECT wall, event, detail FROM traces WHERE command = ?1 ORDER BY id"
# Delete the oldest steps first: operators search for commands that were rejected recently.
_TRIM_LONE_TRACES = "DELETE FROM lone_traces WHERE {mine} AND id <= (SELECT max(id) FROM lone_traces WHERE {mine}) - ?1"
# PostgreSQL has an index on `arrived`, of the commands that are not live, and none on `updated`. A command that arrived
# later than it was changed, because the clock was set back, is kept.
_OUTDATED = f"commands WHERE {{mine}} AND {ENDED} AND NOT ({{live}}) AND updated < ?1 AND arrived < ?1"
_PRUNE = (
    f"DELETE FROM traces WHERE command IN (SELECT seq FROM {_OUTDATED})",  # noqa: S608 - constants
    f"DELETE FROM {_OUTDATED}",  # noqa: S608 - constants
    "DELETE FROM lone_traces WHERE {mine} AND wall < ?1",
    "DELETE FROM unknown_results WHERE {mine} AND wall < ?1",
)


_SELECT_FOR_RESULT = "SELECT seq, state, request_id, result FROM commands WHERE session = ?1 AND id = ?2"
_ANSWER_COMMAND = "UPDATE commands SET state = 'answered', updated = ?1, result = ?2 WHERE seq = ?3"
_INSERT_UNKNOWN = "INSERT INTO unknown_results (session, command_id, wall) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING"
INSERT_OUTBOX = "INSERT INTO outbox (owner, session, command_id, request_id, payload) VALUES (?1, ?2, ?3, ?4, ?5)"
_ANSWER_QUARANTINED = "UPDATE quarantine SET pending = false WHERE pending AND session = ?1 AND command_id = ?2"
# Close the command if entry ?1, which the next statement deletes, is its last one in the outbox.
_CLOSE_COMMAND = (
    "UPDATE commands SET state = 'closed', updated = ?2"
    " WHERE (session, id) = (SELECT session, command_id FROM outbox WHERE seq = ?1) AND state = 'answered'"
    " AND NOT EXISTS (SELECT 1 FROM outbox AS other"
    " WHERE other.session = commands.session AND other.command_id = commands.id AND other.seq <> ?1)"
)
_DELETE_ENTRY = "DELETE FROM outbox WHERE seq = ?1"
_READ_OUTBOX = (
    "SELECT seq, session, command_id, request_id, payload FROM outbox WHERE owner = ?1 AND seq > ?2"
    " ORDER BY seq LIMIT ?3"
)
_REPLACE_PAYLOAD = "UPDATE outbox SET payload = ?1 WHERE seq = ?2"


_SAVE_SESSION = (
    f"INSERT INTO sessions ({rows.SESSION_COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"  # noqa: S608 - constants
    " ON CONFLICT (session) DO UPDATE SET dialect = excluded.dialect, agent_id = excluded.agent_id,"
    " upstream_cluster_id = excluded.upstream_cluster_id, last_seen = excluded.last_seen,"
    " superseded_by = excluded.superseded_by, registration = excluded.registration, reply = excluded.reply,"
    " hold = excluded.hold"
)
_SAVE_ALIAS = (
    "INSERT INTO aliases (owner, agent_id, session) VALUES (?1, ?2, ?3)"
    " ON CONFLICT (owner, agent_id) DO UPDATE SET session = excluded.session"
)
_SAVE_TUNNEL = (
    "INSERT INTO tunnels (session, payload) VALUES (?1, ?2)"
    " ON CONFLICT (session) DO UPDATE SET payload = excluded.payload"
)
_DELETE_SESSION = tuple(f"DELETE FROM {table} WHERE session = ?1" for table in ("aliases", "tunnels", "sessions"))  # noqa: S608 - constants


def _move(table: str, key: str) -> str:
    """Return a statement that moves rows to another session, except those whose `key` exists there.

    The remaining rows are deleted afterwards.
    """
    return (
        f"UPDATE {table} SET session = ?2 WHERE session = ?1 AND NOT EXISTS"  # noqa: S608 - constants
        f" (SELECT 1 FROM {table} AS held WHERE held.session = ?2 AND held.{key} = {table}.{key})"
    )


_MOVE_SESSION = (
    _move("commands", "id"),
    "DELETE FROM traces WHERE command IN (SELECT seq FROM commands WHERE session = ?1)",
    "DELETE FROM commands WHERE session = ?1",
    _move("unknown_results", "command_id"),
    "DELETE FROM unknown_results WHERE session = ?1",
    "UPDATE lone_traces SET session = ?2 WHERE session = ?1",
    "UPDATE tunnels SET session = ?2 WHERE session = ?1 AND NOT EXISTS (SELECT 1 FROM tunnels WHERE session = ?2)",
    "DELETE FROM tunnels WHERE session = ?1",
    "DELETE FROM sessions WHERE session = ?1",
)
# Aliases are unique by owner and agent id, so only a move to another owner can conflict with an existing alias.
_MOVE_OUTBOX = "UPDATE outbox SET session = ?2, owner = ?3 WHERE session = ?1"
_MOVE_ALIASES = (
    "UPDATE aliases SET session = ?2, owner = ?3 WHERE session = ?1 AND (owner = ?3 OR NOT EXISTS"
    " (SELECT 1 FROM aliases AS held WHERE held.owner = ?3 AND held.agent_id = aliases.agent_id))"
)
_DELETE_ALIASES = "DELETE FROM aliases WHERE session = ?1"


class Operations:
    """All operations on one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._execute = database.execute
        self._find_commands = _FIND_COMMANDS.format(mine=database.mine)
        self._find_lone_traces = _FIND_LONE_TRACES.format(mine=database.mine)
        self._trim_lone_traces = _TRIM_LONE_TRACES.format(mine=database.mine)
        self._prune = [statement.format(mine=database.mine, live=database.live) for statement in _PRUNE]
        self._carriers: dict[type[Operation], Callable[[Any], Finish[Any]]] = {
            PutCommand: self.put,
            LookUpCommand: self.look_up,
            MarkCommands: self.mark,
            RequeueCommand: self.requeue,
            AddTrace: self.add_trace,
            Prune: self.prune,
            FindCommand: self.find,
            PutResult: self.put_result,
            PutOutbox: self.put_outbox,
            CloseOutbox: self.close_outbox,
            ReadOutbox: self.read_outbox,
            SaveSession: self.save_session,
            DeleteSession: self.delete_session,
            MoveSession: self.move_session,
            SaveAlias: self.save_alias,
            SaveTunnel: self.save_tunnel,
            WriteProbe: database.touch,
            CheckStore: lambda _: nothing,
        }

    def carry_out(self, operations: Sequence[Operation]) -> Any:
        """Carry out a submission and return the result of its first operation. Raises the engine's exceptions."""
        carriers = self._carriers
        result, *_ = [carriers[type(operation)](operation)() for operation in operations]
        return result

    def begin(self, operations: Sequence[Operation]) -> list[Finish[Any]]:
        """Queue the statements of a submission. Return functions for their results."""
        return [self._carriers[type(operation)](operation) for operation in operations]

    # --- commands and their traces ------------------------------------------------------------------------------------

    def put(self, operation: PutCommand) -> Finish[PutOutcome]:
        """Insert a command. The outcome names an existing one with the same id and its result."""
        seq = self._database.insert(INSERT_COMMAND, insert_parameters(operation))
        if seq is not None:
            return partial(PutOutcome, seq)
        self.trace_arrival(operation)
        outcome = self.look_up_known(operation)
        return lambda: outcome

    def trace_arrival(self, duplicate: PutCommand) -> Finish[None]:
        """Add the step that a new command's row implies to the trace of one that is stored already."""
        return self.add_trace(AddTrace(duplicate.record.session, (duplicate.record.id,), duplicate.arrived))

    def look_up_known(self, operation: PutCommand) -> PutOutcome:
        """Return the outcome for a command that exists."""
        record = operation.record
        return duplicate(*self._execute(_SELECT_COMMAND, (str(record.session), record.id)).fetchone())

    def look_up(self, operation: LookUpCommand) -> Finish[PutOutcome | None]:
        """Look up a command by session and id; the result is None if there is none."""
        found = self._execute(_SELECT_COMMAND, (str(operation.session), operation.command_id))

        def finish() -> PutOutcome | None:
            """Read the row, if there is one."""
            row = found.fetchone()
            return None if row is None else duplicate(*row)

        return finish

    def mark(self, operation: MarkCommands) -> Finish[None]:
        """Change the state of commands, add `attempts`, which may be negative, and a step to the trace of each."""
        step, session = operation.step, str(operation.session)
        text = rows.encode_step(step)
        for each in operation.ids:
            values = (operation.state.value, operation.attempts, step.wall, session, each)
            if not self._execute(_MARK_WITH_STEP, (*values, text)).rowcount:
                self._execute(MARK, values)
                self._add_as_row(session, each, step)
        return nothing

    def requeue(self, operation: RequeueCommand) -> Finish[bool]:
        """Queue a command again that ended without a result. The result is False if it is in another state."""
        parameters = (operation.expires_unix, operation.wall, str(operation.session), operation.command_id)
        changed = self._execute(_REQUEUE, parameters)
        return lambda: changed.rowcount == 1

    def find(self, operation: FindCommand) -> Finish[list[CommandDetails]]:
        """Find the commands with an id in all sessions, with results and traces, also if they were never stored."""
        # Read now, not in `finish`: on PostgreSQL, operations later in the batch would have run by then.
        found = self._found(operation.command_id)
        return lambda: found

    def _found(self, command_id: str) -> list[CommandDetails]:
        lone: dict[SessionKey, list[TraceEntry]] = {}
        for session, *step in self._execute(self._find_lone_traces, (command_id,)).fetchall():
            lone.setdefault(parse_key(session), []).append(TraceEntry(*step))
        found: list[CommandDetails] = []
        for result, first_step, steps, *row in self._execute(self._find_commands, (command_id,)).fetchall():
            try:
                record = rows.command(tuple(row))
            except UndecodableRow:
                continue  # leave the row in place: `load` quarantines it at the next start if the command is live
            trace = lone.pop(record.session, [])
            if first_step:
                trace.append(TraceEntry(record.arrived_unix, first_step, record.type))
            added = self._execute(_SELECT_TRACE, (record.seq,)).fetchall()
            # Rows follow the steps in a full row. Those of a shim before schema version 2 precede them.
            trace += merge(rows.decode_steps(steps), [TraceEntry(*step) for step in added], key=attrgetter("wall"))
            found.append(CommandDetails(record, optional_object(result), trace))
        return found + [
            CommandDetails(rows.never_stored(key, command_id, trace), None, trace) for key, trace in lone.items()
        ]

    def add_trace(self, operation: AddTrace) -> Finish[None]:
        """Add a step to the traces of commands."""
        session, text = str(operation.session), rows.encode_step(operation.entry)
        for each in operation.ids:
            if not self._execute(_ADD_STEP, (session, each, text)).rowcount:
                self._add_as_row(session, each, operation.entry)
        return nothing

    def _add_as_row(self, session: str, command_id: str, step: TraceEntry) -> None:
        """Add a step as a row, because the command's own row is full or the command is not stored."""
        if not self.add_trace_row(session, command_id, step).rowcount:
            self.add_lone_trace(session, command_id, step)

    def add_trace_row(self, session: str, command_id: str, step: TraceEntry) -> Rows:
        """Add a step to the trace of a stored command, as a row. The result has no row if it is not stored."""
        return self._execute(_INSERT_TRACE, (step.wall, step.event, step.detail, session, command_id))

    def add_lone_trace(self, session: str, command_id: str, step: TraceEntry) -> None:
        """Add a step to the trace of a command that is not stored. Such traces are bounded."""
        self._execute(_INSERT_LONE_TRACE, (session, command_id, step.wall, step.event, step.detail))
        self._execute(self._trim_lone_traces, (MAX_LONE_TRACES,))

    def prune(self, operation: Prune) -> Finish[None]:
        """Delete what ended before a Unix time, with its traces, then reclaim some space."""
        for statement in self._prune:
            self._execute(statement, (operation.before_unix,))
        return self._database.reclaim

    # --- results and the outbox ---------------------------------------------------------------------------------------

    def put_result(self, operation: PutResult) -> Finish[ResultOutcome]:
        """Store the first result of a command and its entry in the outbox; a later result changes nothing."""
        session, command_id = str(operation.session), operation.command_id
        row = self._execute(_SELECT_FOR_RESULT, (session, command_id)).fetchone()
        if row is None:
            return self._put_unknown_result(operation)
        seq, state_text, request_id, result = row
        state = CommandState(state_text)
        if result is not None:
            return partial(ResultOutcome, None, known=True, state=state)
        payload = encode_json(operation.payload)
        self._execute(_ANSWER_COMMAND, (operation.wall, payload, seq))
        entry = self._insert_outbox(operation.session, command_id, request_id, operation.payload, payload)()
        return partial(ResultOutcome, entry, known=True, state=state)

    def _put_unknown_result(self, operation: PutResult) -> Finish[ResultOutcome]:
        known = self._execute(_INSERT_UNKNOWN, (str(operation.session), operation.command_id, operation.wall))
        if not known.rowcount:
            return partial(ResultOutcome, None, known=False)
        payload = as_unknown(operation.payload)
        entry = self._insert_outbox(operation.session, operation.command_id, "", payload, encode_json(payload))()
        return partial(ResultOutcome, entry, known=False)

    def put_outbox(self, operation: PutOutbox) -> Finish[OutboxEntry]:
        """Store a report in the outbox, as for a rejected command, and settle a quarantined command of this id."""
        key, command_id, payload = operation.session, operation.command_id, operation.payload
        self._execute(_ANSWER_QUARANTINED, (str(key), command_id))
        return self._insert_outbox(key, command_id, operation.request_id, payload, encode_json(payload))

    def _insert_outbox(
        self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, Any], encoded: bytes
    ) -> Finish[OutboxEntry]:
        seq = self._database.insert(INSERT_OUTBOX, (key.owner, str(key), command_id, request_id, encoded))
        return partial(OutboxEntry, seq or 0, key, command_id, request_id, payload)

    def close_outbox(self, operation: CloseOutbox) -> Finish[None]:
        """Delete entries that the controller has received, and close their commands."""
        for seq in operation.seqs:
            self._execute(_CLOSE_COMMAND, (seq, operation.wall))
            self._execute(_DELETE_ENTRY, (seq,))
        return nothing

    def read_outbox(self, operation: ReadOutbox) -> Finish[list[OutboxEntry]]:
        """Read up to `limit` entries of an owner after the number `after`.

        An unreadable one becomes an error report.
        """
        page = self._execute(_READ_OUTBOX, (operation.owner, operation.after, operation.limit))
        return lambda: [self._outbox_entry(*row) for row in page.fetchall()]

    def _outbox_entry(self, seq: int, session: str, command_id: str, request_id: str, column: Any) -> OutboxEntry:
        try:
            payload = decode_object(column)
        except UndecodableRow as error:
            # The controller waits for a result of this command: send an error in place of the unreadable one.
            content = {"session": session, "command_id": command_id, "request_id": request_id, "payload": column}
            rows.quarantine(self._database, "outbox", content, str(error))
            payload = {
                "command_id": command_id,
                "success": False,
                "code": "malformed",
                "error": "the stored result cannot be read",
            }
            self._execute(_REPLACE_PAYLOAD, (encode_json(payload), seq))
        return OutboxEntry(seq, parse_key(session), command_id, request_id, payload)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def save_session(self, operation: SaveSession) -> Finish[None]:
        """Insert or replace the record of a session."""
        record = operation.record
        self._execute(
            _SAVE_SESSION,
            (
                str(record.key),
                record.dialect,
                record.agent_id,
                record.upstream_cluster_id,
                record.last_seen_unix,
                record.superseded_by,
                encode_json(record.registration),
                encode_json(record.reply),
                encode_json(record.hold),
            ),
        )
        return nothing

    def delete_session(self, operation: DeleteSession) -> Finish[None]:
        """Delete a session with everything that is stored for it."""
        for statement in _DELETE_SESSION:
            self._execute(statement, (str(operation.key),))
        return nothing

    def move_session(self, operation: MoveSession) -> Finish[None]:
        """Give the stored commands, results and aliases of a session to another one, and delete the session."""
        source, target = str(operation.source), str(operation.target)
        if source != target:
            for statement in (_MOVE_OUTBOX, _MOVE_ALIASES):
                self._execute(statement, (source, target, operation.target.owner))
            self._execute(_DELETE_ALIASES, (source,))
            for statement in _MOVE_SESSION:
                self._execute(statement, (source, target) if "?2" in statement else (source,))
        return nothing

    def save_alias(self, operation: SaveAlias) -> Finish[None]:
        """Make an agent id an alias of a session."""
        self._execute(_SAVE_ALIAS, (operation.owner, operation.agent_id, str(operation.session)))
        return nothing

    def save_tunnel(self, operation: SaveTunnel) -> Finish[None]:
        """Store the latest tunnel state of a session."""
        self._execute(_SAVE_TUNNEL, (str(operation.session), encode_json(operation.payload)))
        return nothing


def duplicate(seq: int, state: str, result: Any) -> PutOutcome:
    """Return the outcome of storing a command whose id is already in the store."""
    return PutOutcome(seq, duplicate=True, state=CommandState(state), result=optional_object(result))


def as_unknown(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the result of an unknown command in the form that the controller receives."""
    return payload | {"code": "unknown_command"}
