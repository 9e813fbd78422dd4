"""Rows that wait for a statement that takes many: starting a statement costs the server more than a row does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shim.core.records import WriteProbe
from shim.store.database import Finish, Rows, nothing
from shim.store.postgres.pipeline import Pipeline

# Each size is a statement of its own to prepare, so there are few; what does not fill one goes into the next smaller.
_SIZES = (32, 8, 2, 1)


class _Chunk:
    """The rows of one statement and what it gave for them, by the number that each row has in it."""

    def __init__(self, answer: Rows) -> None:
        self._answer = answer
        self._found: dict[int, tuple[Any, ...]] | None = None

    def of(self, number: int) -> tuple[Any, ...]:
        if self._found is None:
            self._found = {row[0]: row[1:] for row in self._answer.fetchall()}
        return self._found[number]


class Row:
    """A row on its way."""

    __slots__ = ("_chunk", "_number")

    def __init__(self) -> None:
        self._chunk: _Chunk | None = None
        self._number = 0

    def sent(self, chunk: _Chunk, number: int) -> None:
        self._chunk, self._number = chunk, number

    def found(self) -> tuple[Any, ...]:
        """Return what the statement gave for this row, once it was sent."""
        if self._chunk is None:
            raise RuntimeError("the group was not sent")
        return self._chunk.of(self._number)


class Group:
    """Rows for one kind of statement. `head` and `tail` stand around `VALUES`, whose rows are numbered from 0.

    Statements give one row for each of them, beginning with its number.
    """

    def __init__(self, head: str, tail: str, pipeline: Pipeline) -> None:
        self._head, self._tail = head, tail
        self._pipeline = pipeline
        self._rows: list[tuple[Row, Sequence[Any]]] = []
        self._statements: dict[int, str] = {}

    def add(self, parameters: Sequence[Any]) -> Row:
        """Let a row wait for `send`."""
        row = Row()
        self._rows.append((row, parameters))
        if len(self._rows) == _SIZES[0]:
            self.send()
            self._pipeline.push()  # the server works on it while the next ones are put together
        return row

    def send(self) -> None:
        """Send all rows that wait, in their order."""
        rows, self._rows = self._rows, []
        start = 0
        while start < len(rows):
            size = next(each for each in _SIZES if each <= len(rows) - start)
            part = rows[start : start + size]
            start += size
            values = [value for _, parameters in part for value in parameters]
            statement = self._statements.get(size) or self._make(size, len(part[0][1]))
            chunk = _Chunk(self._pipeline.execute(statement, values))
            for number, (row, _) in enumerate(part):
                row.sent(chunk, number)

    def drop(self) -> None:
        """Forget all rows that wait."""
        self._rows.clear()

    def _make(self, size: int, width: int) -> str:
        rows = (
            f"({number}, {', '.join(f'?{number * width + column}' for column in range(1, width + 1))})"
            for number in range(size)
        )
        statement = self._statements[size] = f"{self._head} (VALUES {', '.join(rows)}){self._tail}"
        return statement


class PostgresDatabase:
    """A `store.database.Database`: the rows of one shard.

    A command is in one group at a time, and every other statement comes after the groups: so each command sees its
    operations in their order.
    """

    live = "live"

    def __init__(self, pipeline: Pipeline, shard: int) -> None:
        self.mine = f"shard = {shard:d}"
        self._pipeline = pipeline
        self._groups: list[Group] = []
        self._grouped: set[tuple[str, str]] = set()
        self.execute: Callable[..., Rows] = self._execute

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        if self._grouped:
            self.send_groups()
        return self._pipeline.execute(statement, parameters)

    def group(self, head: str, tail: str) -> Group:
        """Make a group of one kind of statement."""
        group = Group(head, tail, self._pipeline)
        self._groups.append(group)
        return group

    def join(self, session: str, command_id: str) -> None:
        """Tell that a row of this command is about to be added to a group."""
        if (session, command_id) in self._grouped:
            self.send_groups()
        self._grouped.add((session, command_id))

    def send_groups(self) -> None:
        """Send what waits for others of its kind."""
        self._grouped.clear()
        for group in self._groups:
            group.send()

    def drop_groups(self) -> None:
        """Forget what waits: its transaction is rolled back."""
        self._grouped.clear()
        for group in self._groups:
            group.drop()

    def insert(self, statement: str, parameters: Sequence[Any]) -> int | None:
        row = self.execute(f"{statement} RETURNING seq", parameters).fetchone()
        return None if row is None else row[0]

    def touch(self, operation: WriteProbe) -> Finish[None]:
        """Write nothing: every transaction writes the lease's row."""
        del operation
        return nothing

    def reclaim(self) -> None:
        """Leave that to the server's autovacuum."""
