"""Commands and their traces as SQL (the operations of `core.records`)."""

from __future__ import annotations

import sqlite3
from typing import Any

from shim.core.records import (
    AddTrace,
    CommandRecord,
    FindCommand,
    LookUpCommand,
    MarkCommands,
    Prune,
    PutCommand,
    PutOutcome,
    RequeueCommand,
    SessionKey,
    State,
    TraceEntry,
)
from shim.store import rows
from shim.store.rows import UndecodableRow, encode_json, optional_object, parse_key
from shim.store.schema import ENDED

# One `Prune` gives back so many of the free pages: enough to follow, too few to be felt; some are kept for use.
_VACUUM_PAGES = 1000
_KEPT_PAGES = 2500

# Steps of commands that were refused; each has an id and a reason whose lengths are bounded where they enter.
MAX_LONE_TRACES = 10_000

_INSERT_COMMAND = (
    "INSERT INTO commands (session, id, request_id, state, attempts, updated, arrived, expires, size_bytes, type,"
    " created_at, payload, via, first_step) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (session, id) DO NOTHING"
)
_SELECT_COMMAND = "SELECT seq, state, result FROM commands WHERE session = ? AND id = ?"
# The indexes begin with the session, because that is what nearly all statements name. A command that is looked for in
# any session is found by one probe per session that the index knows; an index of its own would slow every insert down.
_ANY_SESSION = (
    "WITH RECURSIVE known (session) AS (SELECT min(session) FROM {table} UNION ALL"
    " SELECT (SELECT min(session) FROM {table} WHERE session > known.session) FROM known"
    " WHERE known.session IS NOT NULL)"
)
_FIND_COMMANDS = (
    f"{_ANY_SESSION.format(table='commands')} SELECT result, first_step, {rows.COMMAND_COLUMNS} FROM commands"  # noqa: S608 - constants
    " WHERE seq IN (SELECT c.seq FROM known CROSS JOIN commands AS c WHERE c.session = known.session AND c.id = ?)"
    " ORDER BY seq"
)
_FIND_LONE_TRACES = (
    f"{_ANY_SESSION.format(table='lone_traces')} SELECT t.session, t.wall, t.event, t.detail"  # noqa: S608 - constants
    " FROM known CROSS JOIN lone_traces AS t WHERE t.session = known.session AND t.command_id = ? ORDER BY t.id"
)
_MARK = "UPDATE commands SET state = ?, attempts = max(attempts + ?, 0), updated = ? WHERE session = ? AND id = ?"
_REQUEUE = (
    "UPDATE commands SET state = 'queued', attempts = 0, expires = ?, updated = ?"
    " WHERE session = ? AND id = ? AND state IN ('delivered', 'expired', 'dead')"
)
_INSERT_TRACE = (
    "INSERT INTO traces (command, wall, event, detail) SELECT seq, ?, ?, ? FROM commands WHERE session = ? AND id = ?"
)
_INSERT_LONE_TRACE = "INSERT INTO lone_traces (session, command_id, wall, event, detail) VALUES (?, ?, ?, ?, ?)"
# The oldest go first: whoever looks for a refused command looks for one of the last.
_TRIM_LONE_TRACES = "DELETE FROM lone_traces WHERE id <= (SELECT max(id) FROM lone_traces) - ?"
_PRUNE = (
    f"DELETE FROM traces WHERE command IN (SELECT seq FROM commands WHERE {ENDED} AND updated < :before)",  # noqa: S608 - constants
    f"DELETE FROM commands WHERE {ENDED} AND updated < :before",  # noqa: S608 - constants
    "DELETE FROM lone_traces WHERE wall < :before",
    "DELETE FROM unknown_results WHERE wall < :before",
)


class CommandOperations:
    """Works on the cursor of a transaction that the caller has begun and will end."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    def put(self, operation: PutCommand, first_step: str = "") -> PutOutcome:
        record = operation.record
        session = str(record.session)
        self._cursor.execute(
            _INSERT_COMMAND,
            (
                session,
                record.id,
                record.request_id,
                record.state.value,
                record.attempts,
                record.arrived_wall,
                record.arrived_wall,
                record.expires_wall,
                record.size_bytes,
                record.type,
                record.created_at,
                encode_json(record.payload),
                record.via,
                first_step,
            ),
        )
        if self._cursor.rowcount and self._cursor.lastrowid:
            return PutOutcome(self._cursor.lastrowid)
        return _duplicate(*self._cursor.execute(_SELECT_COMMAND, (session, record.id)).fetchone())

    def look_up(self, operation: LookUpCommand) -> PutOutcome | None:
        key = (str(operation.session), operation.command_id)
        row = self._cursor.execute(_SELECT_COMMAND, key).fetchone()
        return None if row is None else _duplicate(*row)

    def put_with_step(self, operation: PutCommand, step: AddTrace) -> PutOutcome:
        """Put a command and add a step to its trace: in one row, if it is new and the step can be told from it."""
        record, entry = operation.record, step.entry
        told = (record.session, (record.id,), record.arrived_wall, record.type)
        if (step.session, step.ids, entry.wall, entry.detail) != told:
            outcome = self.put(operation)
        else:
            outcome = self.put(operation, entry.event)
            if not outcome.duplicate:
                return outcome
        self.add_trace(step)
        return outcome

    def mark(self, operation: MarkCommands) -> None:
        state, session = operation.state.value, str(operation.session)
        self._cursor.executemany(
            _MARK, [(state, operation.attempts, operation.wall, session, each) for each in operation.ids]
        )

    def requeue(self, operation: RequeueCommand) -> bool:
        self._cursor.execute(
            _REQUEUE, (operation.expires_wall, operation.wall, str(operation.session), operation.command_id)
        )
        return self._cursor.rowcount == 1

    def find(self, operation: FindCommand) -> list[tuple[CommandRecord, dict[str, Any] | None, list[TraceEntry]]]:
        lone: dict[SessionKey, list[TraceEntry]] = {}
        for session, *step in self._cursor.execute(_FIND_LONE_TRACES, (operation.command_id,)):
            lone.setdefault(parse_key(session), []).append(TraceEntry(*step))
        found = []
        for result, first_step, *row in self._cursor.execute(_FIND_COMMANDS, (operation.command_id,)).fetchall():
            try:
                record = rows.command(tuple(row))
            except UndecodableRow:
                continue  # it is ended, and of no use to the core; a live one is found at the next opening
            steps = self._cursor.execute(
                "SELECT wall, event, detail FROM traces WHERE command = ? ORDER BY id", (record.seq,)
            )
            first = [TraceEntry(record.arrived_wall, first_step, record.type)] if first_step else []
            trace = lone.pop(record.session, []) + first + [TraceEntry(*step) for step in steps]
            found.append((record, optional_object(result), trace))
        return found + [
            (rows.never_stored(key, operation.command_id, trace), None, trace) for key, trace in lone.items()
        ]

    def add_trace(self, operation: AddTrace) -> None:
        session, step = str(operation.session), operation.entry
        for each in operation.ids:
            self._cursor.execute(_INSERT_TRACE, (step.wall, step.event, step.detail, session, each))
            if not self._cursor.rowcount:
                self._cursor.execute(_INSERT_LONE_TRACE, (session, each, step.wall, step.event, step.detail))
                self._cursor.execute(_TRIM_LONE_TRACES, (MAX_LONE_TRACES,))

    def prune(self, operation: Prune) -> None:
        for statement in _PRUNE:
            self._cursor.execute(statement, {"before": operation.before_wall})
        (free,) = self._cursor.execute("PRAGMA freelist_count").fetchone()
        for _ in range(min(free - _KEPT_PAGES, _VACUUM_PAGES)):
            self._cursor.execute("PRAGMA incremental_vacuum(1)")  # Python steps a pragma once: one page, whatever N


def _duplicate(seq: int, state: str, result: Any) -> PutOutcome:
    return PutOutcome(seq, duplicate=True, state=State(state), result=optional_object(result))
