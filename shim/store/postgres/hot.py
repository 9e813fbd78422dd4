"""The most frequent operations in few statements: each result that a later statement depends on costs a round trip.

The statements combine those of `store.operations` in WITH clauses. SQLite does not support changes in
a WITH clause, and has no round trips to save.
"""

from __future__ import annotations

from shim.core.records import (
    AddTrace,
    CommandState,
    MarkCommands,
    OutboxEntry,
    PutCommand,
    PutOutcome,
    PutResult,
    ResultOutcome,
    SessionKey,
)
from shim.store.database import Finish, Rows, nothing
from shim.store.operations import (
    COMMAND_COLUMNS,
    INSERT_OUTBOX,
    Operations,
    as_unknown,
    duplicate,
    insert_parameters,
    is_first_step,
)
from shim.store.postgres.groups import PostgresDatabase
from shim.store.rows import encode_json

# ORDER BY n keeps the order of arrival in `seq`. For a duplicate no row is inserted, so the trace step that the row
# would have implied is inserted into `traces`.
_PUT = (
    f"WITH given (n, {COMMAND_COLUMNS}) AS",
    (
        f", new AS (INSERT INTO commands ({COMMAND_COLUMNS}) SELECT {COMMAND_COLUMNS} FROM given ORDER BY n"
        " ON CONFLICT (session, id) DO NOTHING RETURNING seq, session, id),"
        " old AS (SELECT n, seq, c.state, c.result, g.arrived, g.first_step, g.type FROM given AS g JOIN commands AS c"
        " ON c.session = g.session AND c.id = g.id),"
        " step AS (INSERT INTO traces (command, wall, event, detail)"
        " SELECT seq, arrived, first_step, type FROM old WHERE first_step <> '')"
        " SELECT n, seq, NULL, NULL FROM new JOIN given USING (session, id)"
        " UNION ALL SELECT n, seq, state, result FROM old"
    ),
)
_MARK = (
    "WITH given (n, state, more, updated, session, id, wall, event, detail) AS",
    (
        ", known AS (UPDATE commands AS c SET state = g.state, updated = g.updated,"
        " attempts = CASE WHEN attempts + more > 0 THEN attempts + more ELSE 0 END"
        " FROM given AS g WHERE c.session = g.session AND c.id = g.id RETURNING n, seq, wall, event, detail),"
        " step AS (INSERT INTO traces (command, wall, event, detail) SELECT seq, wall, event, detail FROM known),"
        " lone AS (INSERT INTO lone_traces (session, command_id, wall, event, detail)"
        " SELECT session, id, wall, event, detail FROM given WHERE n NOT IN (SELECT n FROM known) RETURNING 1)"
        " SELECT n, (SELECT count(*) FROM lone) FROM given"
    ),
)
_LONE = (
    " INSERT INTO lone_traces (session, command_id, wall, event, detail)"
    " SELECT {session}, {id}, {wall}, {event}, {detail} WHERE NOT EXISTS (SELECT 1 FROM known)"
)
_ADD_TRACE = (
    "WITH known AS (SELECT seq FROM commands WHERE session = ?4 AND id = ?5), step AS"
    " (INSERT INTO traces (command, wall, event, detail) SELECT seq, ?1, ?2, ?3 FROM known)"
) + _LONE.format(session="?4", id="?5", wall="?1", event="?2", detail="?3")
_PUT_RESULT = (
    "WITH known AS (SELECT seq, state, request_id, result FROM commands WHERE session = ?2 AND id = ?3),"
    " answered AS (UPDATE commands SET state = 'answered', updated = ?4, result = ?5"
    " WHERE seq IN (SELECT seq FROM known WHERE result IS NULL)),"
    " unknown AS (INSERT INTO unknown_results (session, command_id, wall) SELECT ?2, ?3, ?4"
    " WHERE NOT EXISTS (SELECT 1 FROM known) ON CONFLICT DO NOTHING RETURNING session),"
    " entry AS (INSERT INTO outbox (owner, session, command_id, request_id, payload)"
    " SELECT ?1, ?2, ?3, request_id, ?5 FROM known WHERE result IS NULL"
    " UNION ALL SELECT ?1, ?2, ?3, '', ?6 FROM unknown RETURNING seq, request_id)"
    " SELECT (SELECT state FROM known), (SELECT seq FROM entry), (SELECT request_id FROM entry)"
)
_PUT_OUTBOX = f"{INSERT_OUTBOX} RETURNING seq"


class HotOperations(Operations):
    """The operations, the most frequent ones without intermediate results that the client must wait for.

    The most frequent kinds of submissions share a statement.
    """

    def __init__(self, database: PostgresDatabase) -> None:
        super().__init__(database)
        self._reserve = database.reserve
        self._puts, self._marks = database.group(*_PUT), database.group(*_MARK)

    def put(self, operation: PutCommand, first_step: str = "") -> Finish[PutOutcome]:
        """Insert a command as a row of one grouped statement."""
        parameters = insert_parameters(operation.record, first_step)
        self._reserve(parameters[0], parameters[1])
        row = self._puts.add(parameters)

        def finish() -> PutOutcome:
            """Read the outcome of the row."""
            seq, state, result = row.result()
            return PutOutcome(seq) if state is None else duplicate(seq, state, result)

        return finish

    def put_with_step(self, operation: PutCommand, step: AddTrace) -> Finish[PutOutcome]:
        """Insert a command with a step of its trace."""
        if is_first_step(operation.record, step):
            return self.put(operation, step.entry.event)
        finish, finish_step = self.put(operation), self.add_trace(step)

        def finish_both() -> PutOutcome:
            """Finish the step, then the command, whose outcome counts."""
            finish_step()
            return finish()

        return finish_both

    def mark_with_step(self, operation: MarkCommands, step: AddTrace) -> Finish[None]:
        """Change the state of commands and add a step to their traces, by one grouped statement."""
        session, entry = str(operation.session), step.entry
        marked = (operation.state.value, operation.attempts, operation.wall, session)
        values = (entry.wall, entry.event, entry.detail)
        rows = []
        for each in operation.ids:
            self._reserve(session, each)
            rows.append(self._marks.add((*marked, each, *values)))

        def finish() -> None:
            """Trim the traces of commands that are not stored, if one was added."""
            if any(row.result()[0] for row in rows):
                self.trim_lone_traces()

        return finish

    def add_trace(self, operation: AddTrace) -> Finish[None]:
        """Add a step to the traces of commands."""
        session, step = str(operation.session), operation.entry
        values = (step.wall, step.event, step.detail, session)
        return self._trimmed([self._execute(_ADD_TRACE, (*values, each)) for each in operation.ids])

    def _trimmed(self, lone: list[Rows]) -> Finish[None]:
        def finish() -> None:
            """Trim the traces of commands that are not stored, if one was added."""
            if sum(each.rowcount for each in lone):
                self.trim_lone_traces()

        return finish if lone else nothing

    def put_result(self, operation: PutResult) -> Finish[ResultOutcome]:
        """Store the first result of a command and its entry in the outbox, by one statement."""
        key, command_id, payload = operation.session, operation.command_id, operation.payload
        unknown = as_unknown(payload)
        found = self._execute(
            _PUT_RESULT,
            (key.owner, str(key), command_id, operation.wall, encode_json(payload), encode_json(unknown)),
        )

        def finish() -> ResultOutcome:
            """Read the outcome."""
            state, seq, request_id = found.fetchone()
            entry = None
            if seq is not None:
                entry = OutboxEntry(seq, key, command_id, request_id, unknown if state is None else payload)
            return ResultOutcome(entry, known=state is not None, state=None if state is None else CommandState(state))

        return finish

    def _insert_outbox(
        self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, object], encoded: bytes
    ) -> Finish[OutboxEntry]:
        new = self._execute(_PUT_OUTBOX, (key.owner, str(key), command_id, request_id, encoded))
        return lambda: OutboxEntry(new.fetchone()[0], key, command_id, request_id, payload)
