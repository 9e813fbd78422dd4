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
from shim.store.database import Finish, Rows
from shim.store.operations import (
    COMMAND_COLUMNS,
    INSERT_OUTBOX,
    Operations,
    as_unknown,
    duplicate,
)
from shim.store.postgres.groups import GroupStatement, PostgresDatabase
from shim.store.rows import MAX_STEPS_CHARS, encode_json, encode_step, insert_parameters

# Appends a step to the row of `c`, or a final space if the row is full: then the step becomes a row of `traces`.
_STEPS = (
    f"steps = CASE WHEN length(c.steps) < {MAX_STEPS_CHARS} THEN c.steps || {{step}}"
    " WHEN c.steps LIKE '% ' THEN c.steps ELSE c.steps || ' ' END"
)


def _read_puts(answer: Rows, count: int) -> list[PutOutcome]:
    (_, seqs, *_), *existing = answer.fetchall()
    new = [PutOutcome(seq) for seq in seqs or ()]
    if not existing:
        return new
    known = {number: duplicate(seq, state, result) for number, (seq,), state, result in existing}
    rest = iter(new)
    return [known.get(number) or next(rest) for number in range(count)]


def _read_marks(answer: Rows, count: int) -> list[bool | None]:
    """Return for each row whether the command's trace is full, None if the command is not stored."""
    ((numbers,),) = answer.fetchall()
    full: list[bool | None] = [None] * count
    for number in numbers or ():
        full[abs(number) - 1] = number < 0
    return full


# The first row of the result has the numbers of all new commands in the order of arrival, which is the order of the
# arrays. The other rows are the commands that exist already; without one, the second half is not carried out.
_PUT = GroupStatement(
    f"WITH new AS (INSERT INTO commands ({COMMAND_COLUMNS}) SELECT * FROM {{rows}}"
    " ON CONFLICT (session, id) DO NOTHING RETURNING seq)"
    " SELECT NULL, array_agg(seq), NULL, NULL FROM new UNION ALL"
    " SELECT n - 1, ARRAY[c.seq], c.state, c.result FROM unnest(?1, ?2) WITH ORDINALITY AS given (session, id, n)"
    " JOIN commands AS c USING (session, id) WHERE (SELECT count(*) FROM new) < cardinality(?1)",
    "ttttifffittbttt",
    _read_puts,
)
# The result is the numbers of the rows whose command is stored, in any order: negative if its trace is full.
_MARK = GroupStatement(
    "WITH marked AS (UPDATE commands AS c SET updated = g.updated,"
    " state = CASE WHEN c.result IS NULL THEN g.state ELSE c.state END,"
    f" {_STEPS.format(step='g.step')}, attempts = CASE WHEN attempts + more > 0 THEN attempts + more ELSE 0 END"
    " FROM {rows} WITH ORDINALITY AS g (state, more, updated, session, id, step, n)"
    " WHERE c.session = g.session AND c.id = g.id RETURNING CASE WHEN c.steps LIKE '% ' THEN -n ELSE n END AS n)"
    " SELECT array_agg(n) FROM marked",
    "tifttt",
    _read_marks,
)
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
        self._execute_grouped, self._send_groups = database.execute_grouped, database.send_groups

    def carry_out(self, operations: Sequence[Operation]) -> Any:
        """Carry out a submission, each operation before the next one, and return the result of its first operation."""
        results = []
        for operation in operations:
            finish = self._carriers[type(operation)](operation)
            self._send_groups()
            results.append(finish())
        return results[0]

    def put(self, operation: PutCommand) -> Finish[PutOutcome]:
        """Insert a command as a row of one grouped statement."""
        parameters = insert_parameters(operation)
        stored = self._execute_grouped(_PUT, (parameters[0], parameters[1]), parameters)

        def finish() -> PutOutcome:
            """Return the outcome."""
            outcome: PutOutcome = stored()
            if outcome.duplicate:
                self.trace_arrival(operation)()
            return outcome

        return finish

    def mark(self, operation: MarkCommands) -> Finish[None]:
        """Change the state of commands and add a step to their traces, by one grouped statement."""
        step, session = operation.step, str(operation.session)
        text = encode_step(step)
        marked = (operation.state._value_, operation.attempts, step.wall, session)
        full = [(each, self._execute_grouped(_MARK, (session, each), (*marked, each, text))) for each in operation.ids]

        def finish() -> None:
            """Add the step as a row where that is needed."""
            for each, is_full in full:
                self._add_row_if_needed(is_full(), session, each, step)

        return finish

    def add_trace(self, operation: AddTrace) -> Finish[None]:
        """Add a step to the traces of commands."""
        session, text = str(operation.session), encode_step(operation.entry)
        answers = [(each, self._execute(_ADD_STEP, (session, each, text))) for each in operation.ids]

        def finish() -> None:
            """Add the step as a row where that is needed."""
            for each, answer in answers:
                row = answer.fetchone()
                self._add_row_if_needed(row[0] if row else None, session, each, operation.entry)

        return finish

    def _add_row_if_needed(self, full: bool | None, session: str, command_id: str, step: TraceEntry) -> None:
        """Add a step as a row if the command is not stored (`full` is None) or its own row is full."""
        if full is None:
            self.add_lone_trace(session, command_id, step)
        elif full:
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
