"""SQL for commands and their traces: part of the operations of `core.records`."""

from __future__ import annotations

from functools import partial
from typing import Any

from shim.core.records import (
    AddTrace,
    CommandRecord,
    CommandState,
    FindCommand,
    LookUpCommand,
    MarkCommands,
    Prune,
    PutCommand,
    PutOutcome,
    RequeueCommand,
    SessionKey,
    TraceEntry,
)
from shim.store import rows
from shim.store.database import Database, Finish, nothing
from shim.store.rows import UndecodableRow, encode_json, optional_object, parse_key
from shim.store.schema import ENDED

# Limit for the steps of commands that have no row. Ids and reasons are bounded in length before they reach the store.
MAX_LONE_TRACES = 10_000

INSERT_COMMAND = (
    "INSERT INTO commands (session, id, request_id, state, attempts, updated, arrived, expires, size_bytes, type,"
    " created_at, payload, via, first_step) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)"
    " ON CONFLICT (session, id) DO NOTHING"
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
    f"{_ANY_SESSION.format(table='commands')} SELECT result, first_step, {rows.COMMAND_COLUMNS} FROM commands"  # noqa: S608 - constants
    " WHERE seq IN (SELECT c.seq FROM known CROSS JOIN commands AS c WHERE c.session = known.session AND c.id = ?1)"
    " AND {mine} ORDER BY seq"
)
_FIND_LONE_TRACES = (
    f"{_ANY_SESSION.format(table='lone_traces')} SELECT t.session, t.wall, t.event, t.detail"  # noqa: S608 - constants
    " FROM known CROSS JOIN lone_traces AS t WHERE t.session = known.session AND t.command_id = ?1 AND {mine}"
    " ORDER BY t.id"
)
MARK = (
    "UPDATE commands SET state = ?1, attempts = CASE WHEN attempts + ?2 > 0 THEN attempts + ?2 ELSE 0 END, updated = ?3"
    " WHERE session = ?4 AND id = ?5"
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
# The condition on `arrived` is implied, because `arrived` is never later than `updated`. It is there for PostgreSQL,
# which has an index on `arrived` and none on `updated`.
_OUTDATED = f"commands WHERE {{mine}} AND {ENDED} AND updated < ?1 AND arrived < ?1"
_PRUNE = (
    f"DELETE FROM traces WHERE command IN (SELECT seq FROM {_OUTDATED})",  # noqa: S608 - constants
    f"DELETE FROM {_OUTDATED}",  # noqa: S608 - constants
    "DELETE FROM lone_traces WHERE {mine} AND wall < ?1",
    "DELETE FROM unknown_results WHERE {mine} AND wall < ?1",
)


class CommandOperations:
    """The operations on commands, carried out in a transaction that the caller begins and ends."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._execute = database.execute
        self._find_commands = _FIND_COMMANDS.format(mine=database.mine)
        self._find_lone_traces = _FIND_LONE_TRACES.format(mine=database.mine)
        self._trim_lone_traces = _TRIM_LONE_TRACES.format(mine=database.mine)
        self._prune = [statement.format(mine=database.mine) for statement in _PRUNE]

    def put(self, operation: PutCommand, first_step: str = "") -> Finish[PutOutcome]:
        parameters = insert_parameters(operation.record, first_step)
        seq = self._database.insert(INSERT_COMMAND, parameters)
        if seq is not None:
            return partial(PutOutcome, seq)
        return self.look_up_known(parameters[:2])

    def look_up_known(self, key: tuple[Any, ...]) -> Finish[PutOutcome]:
        outcome = duplicate(*self._execute(_SELECT_COMMAND, key).fetchone())
        return lambda: outcome

    def look_up(self, operation: LookUpCommand) -> Finish[PutOutcome | None]:
        found = self._execute(_SELECT_COMMAND, (str(operation.session), operation.command_id))

        def finish() -> PutOutcome | None:
            row = found.fetchone()
            return None if row is None else duplicate(*row)

        return finish

    def put_with_step(self, operation: PutCommand, step: AddTrace) -> Finish[PutOutcome]:
        """Store a command with a step of its trace.

        For a new command whose step repeats columns of its row, one insert stores both (`is_first_step`).
        """
        if not is_first_step(operation.record, step):
            finish = self.put(operation)
            self.add_trace(step)
            return finish
        parameters = insert_parameters(operation.record, step.entry.event)
        seq = self._database.insert(INSERT_COMMAND, parameters)
        if seq is not None:
            return partial(PutOutcome, seq)
        self.add_trace(step)
        return self.look_up_known(parameters[:2])

    def mark(self, operation: MarkCommands) -> Finish[None]:
        session = str(operation.session)
        for each in operation.ids:
            self._execute(MARK, (operation.state.value, operation.attempts, operation.wall, session, each))
        return nothing

    def mark_with_step(self, operation: MarkCommands, step: AddTrace) -> Finish[None]:
        """Change the state of commands and add a step to the trace of each."""
        self.mark(operation)
        return self.add_trace(step)

    def requeue(self, operation: RequeueCommand) -> Finish[bool]:
        parameters = (operation.expires_unix, operation.wall, str(operation.session), operation.command_id)
        changed = self._execute(_REQUEUE, parameters)
        return lambda: changed.rowcount == 1

    def find(
        self, operation: FindCommand
    ) -> Finish[list[tuple[CommandRecord, dict[str, Any] | None, list[TraceEntry]]]]:
        # Read now, not in `finish`: on PostgreSQL, operations later in the batch would have run by then.
        found = self._found(operation.command_id)
        return lambda: found

    def _found(self, command_id: str) -> list[tuple[CommandRecord, dict[str, Any] | None, list[TraceEntry]]]:
        lone: dict[SessionKey, list[TraceEntry]] = {}
        for session, *step in self._execute(self._find_lone_traces, (command_id,)).fetchall():
            lone.setdefault(parse_key(session), []).append(TraceEntry(*step))
        found = []
        for result, first_step, *row in self._execute(self._find_commands, (command_id,)).fetchall():
            try:
                record = rows.command(tuple(row))
            except UndecodableRow:
                continue  # leave the row in place: `load` quarantines it at the next start if the command is live
            steps = self._execute(_SELECT_TRACE, (record.seq,)).fetchall()
            first = [TraceEntry(record.arrived_unix, first_step, record.type)] if first_step else []
            trace = lone.pop(record.session, []) + first + [TraceEntry(*step) for step in steps]
            found.append((record, optional_object(result), trace))
        return found + [(rows.never_stored(key, command_id, trace), None, trace) for key, trace in lone.items()]

    def add_trace(self, operation: AddTrace) -> Finish[None]:
        session, step = str(operation.session), operation.entry
        for each in operation.ids:
            known = self._execute(_INSERT_TRACE, (step.wall, step.event, step.detail, session, each))
            if not known.rowcount:
                self._execute(_INSERT_LONE_TRACE, (session, each, step.wall, step.event, step.detail))
                self.trim_lone_traces()
        return nothing

    def trim_lone_traces(self) -> None:
        self._execute(self._trim_lone_traces, (MAX_LONE_TRACES,))

    def prune(self, operation: Prune) -> Finish[None]:
        for statement in self._prune:
            self._execute(statement, (operation.before_unix,))
        return self._database.reclaim


def insert_parameters(record: CommandRecord, first_step: str) -> tuple[Any, ...]:
    """Return the parameters of `INSERT_COMMAND`."""
    return (
        str(record.session),
        record.id,
        record.request_id,
        record.state._value_,  # `value` is a property call, too slow for a line that runs for every command
        record.attempts,
        record.arrived_unix,
        record.arrived_unix,
        record.expires_unix,
        record.size_bytes,
        record.type,
        record.created_at,
        encode_json(record.payload),
        record.via,
        first_step,
    )


def is_first_step(record: CommandRecord, step: AddTrace) -> bool:
    """Return whether the row of `record` with `step.entry.event` as its `first_step` holds all of this step."""
    entry = step.entry
    implied = (record.session, (record.id,), record.arrived_unix, record.type)
    return (step.session, step.ids, entry.wall, entry.detail) == implied


def duplicate(seq: int, state: str, result: Any) -> PutOutcome:
    """Return the outcome of storing a command whose id is already in the store."""
    return PutOutcome(seq, duplicate=True, state=CommandState(state), result=optional_object(result))
