"""The most frequent operations in few statements: each result that a later statement depends on costs a round trip.

The statements combine those of `store.operations` in WITH clauses. SQLite does not support changes in
a WITH clause, and has no round trips to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shim.core.records import (
    AddTrace,
    CommandState,
    FindCommand,
    MarkCommands,
    MoveSession,
    Operation,
    OutboxEntry,
    Prune,
    PutCommand,
    PutOutcome,
    PutResult,
    ResultOutcome,
    SessionKey,
    TraceEntry,
)
from shim.store.database import Finish
from shim.store.operations import (
    COMMAND_COLUMNS,
    INSERT_OUTBOX,
    Operations,
    as_unknown,
    duplicate,
)
from shim.store.postgres.groups import PostgresDatabase
from shim.store.rows import MAX_STEPS_CHARS, encode_json, encode_step, insert_parameters, is_first_step

# Appends a step to the row of `c`, or a final space if the row is full: then the step becomes a row of `traces`.
_STEPS = (
    f"steps = CASE WHEN length(c.steps) < {MAX_STEPS_CHARS} THEN c.steps || {{step}}"
    " WHEN c.steps LIKE '% ' THEN c.steps ELSE c.steps || ' ' END"
)
# ORDER BY n keeps the order of arrival in `seq`.
_PUT = (
    f"WITH given ({COMMAND_COLUMNS}, n) AS (SELECT * FROM {{rows}}),"
    f" new AS (INSERT INTO commands ({COMMAND_COLUMNS}) SELECT {COMMAND_COLUMNS} FROM given ORDER BY n"
    " ON CONFLICT (session, id) DO NOTHING RETURNING seq, session, id)"
    " SELECT session, id, seq, NULL, NULL FROM new UNION ALL"
    " SELECT session, id, c.seq, c.state, c.result FROM given JOIN commands AS c USING (session, id)"
    " WHERE (SELECT count(*) FROM new) < (SELECT count(*) FROM given)"
)
_PUT_KINDS = "ttttifffittbtt"
_MARK = (
    f"UPDATE commands AS c SET state = g.state, updated = g.updated, {_STEPS.format(step='g.step')},"
    " attempts = CASE WHEN attempts + more > 0 THEN attempts + more ELSE 0 END"
    " FROM {rows} AS g (state, more, updated, session, id, step, n)"
    " WHERE c.session = g.session AND c.id = g.id RETURNING c.session, c.id, c.steps LIKE '% '"
)
_MARK_KINDS = "tifttt"
_ADD_STEP = (
    f"UPDATE commands AS c SET {_STEPS.format(step='?3')} WHERE session = ?1 AND id = ?2 RETURNING steps LIKE '% '"
)
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


# Operations that find the rows of traces. A step of an operation before them in the batch may become a row only when
# that operation is finished.
AFTER_FINISH = frozenset({FindCommand, MoveSession, Prune})


class HotOperations(Operations):
    """The operations, the most frequent ones without intermediate results that the client must wait for.

    The most frequent kinds of submissions share a statement.
    """

    def __init__(self, database: PostgresDatabase) -> None:
        super().__init__(database)
        self._reserve, self._send_groups = database.reserve, database.send_groups
        self._puts, self._marks = database.group(_PUT, _PUT_KINDS), database.group(_MARK, _MARK_KINDS)

    def carry_out(self, operations: Sequence[Operation]) -> Any:
        """Carry out a submission, each operation before the next one, and return the result of its first operation."""
        results = []
        for operation in operations:
            finish = self._carriers[type(operation)](operation)
            self._send_groups()
            results.append(finish())
        return results[0]

    def put(self, operation: PutCommand, first_step: str = "") -> Finish[PutOutcome]:
        """Insert a command as a row of one grouped statement."""
        parameters = insert_parameters(operation.record, first_step)
        key = (parameters[0], parameters[1])
        self._reserve(*key)
        answer = self._puts.add(parameters)

        def finish() -> PutOutcome:
            """Read the outcome of the row."""
            seq, state, result = answer.rows[key]
            return PutOutcome(seq) if state is None else duplicate(seq, state, result)

        return finish

    def put_with_step(self, operation: PutCommand, step: AddTrace) -> Finish[PutOutcome]:
        """Insert a command with a step of its trace."""
        if not is_first_step(operation.record, step):
            finish, finish_step = self.put(operation), self.add_trace(step)
        else:
            finish, finish_step = self.put(operation, step.entry.event), None

        def finish_both() -> PutOutcome:
            """Finish the command, whose outcome counts. Add the step that its row would have implied to a duplicate."""
            outcome = finish()
            if finish_step is not None:
                finish_step()
            elif outcome.duplicate:
                self.add_trace(step)()
            return outcome

        return finish_both

    def mark_with_step(self, operation: MarkCommands, step: AddTrace) -> Finish[None]:
        """Change the state of commands and add a step to their traces, by one grouped statement."""
        session, text = str(operation.session), encode_step(step.entry)
        marked = (operation.state._value_, operation.attempts, operation.wall, session)
        answers = []
        for each in operation.ids:
            self._reserve(session, each)
            answers.append((each, self._marks.add((*marked, each, text))))

        def finish() -> None:
            """Add the step as a row where that is needed."""
            for each, answer in answers:
                self._add_row_if_needed(answer.rows.get((session, each)), session, each, step.entry)

        return finish

    def add_trace(self, operation: AddTrace) -> Finish[None]:
        """Add a step to the traces of commands."""
        session, text = str(operation.session), encode_step(operation.entry)
        answers = [(each, self._execute(_ADD_STEP, (session, each, text))) for each in operation.ids]

        def finish() -> None:
            """Add the step as a row where that is needed."""
            for each, answer in answers:
                self._add_row_if_needed(answer.fetchone(), session, each, operation.entry)

        return finish

    def _add_row_if_needed(self, found: Sequence[Any] | None, session: str, command_id: str, step: TraceEntry) -> None:
        """Add a step as a row if the command is not stored (`found` is None) or its own row is full (`found[0]`)."""
        if found is None:
            self.add_lone_trace(session, command_id, step)
        elif found[0]:
            self.add_trace_row(session, command_id, step)

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
