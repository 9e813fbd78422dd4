"""Grouping of rows into multi-row statements, because a statement costs the server more than a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from shim.core.records import WriteProbe
from shim.store.database import Finish, Rows, nothing
from shim.store.postgres.pipeline import Pipeline

# Rows per statement. Each size is a separate prepared statement, so there are few. Rows are split into the largest
# sizes that they fill.
_SIZES = (32, 8, 2, 1)


class Row:
    """An input row that waits in a group or was sent."""

    __slots__ = ("_number", "_results")

    def __init__(self) -> None:
        self._results: Callable[[], dict[int, tuple[Any, ...]]] | None = None
        self._number = 0

    def attach(self, results: Callable[[], dict[int, tuple[Any, ...]]], number: int) -> None:
        """Set the results of the row's statement, and the number of the row in it."""
        self._results, self._number = results, number

    def result(self) -> tuple[Any, ...]:
        """Return the result for this row. The group must have been sent."""
        if self._results is None:
            raise RuntimeError("the group was not sent")
        return self._results()[self._number]


class Group:
    """Waiting rows for one kind of statement. `head` and `tail` enclose its `VALUES`, whose rows are numbered from 0.

    The statement must return one row per input row, with the number in its first column.
    """

    def __init__(self, head: str, tail: str, pipeline: Pipeline) -> None:
        self._head, self._tail = head, tail
        self._pipeline = pipeline
        self._rows: list[tuple[Row, Sequence[Any]]] = []
        self._statements: dict[int, str] = {}

    def add(self, parameters: Sequence[Any]) -> Row:
        """Queue a row for `send`. A full group is sent at once."""
        row = Row()
        self._rows.append((row, parameters))
        if len(self._rows) == _SIZES[0]:
            self.send()
            self._pipeline.flush()  # the server works on these rows while we encode the next ones
        return row

    def send(self) -> None:
        """Send all waiting rows in order."""
        rows, self._rows = self._rows, []
        start = 0
        while start < len(rows):
            size = next(each for each in _SIZES if each <= len(rows) - start)
            part = rows[start : start + size]
            start += size
            values = [value for _, parameters in part for value in parameters]
            statement = self._statements.get(size) or self._make(size, len(part[0][1]))
            results = cache(partial(_by_number, self._pipeline.execute(statement, values)))
            for number, (row, _) in enumerate(part):
                row.attach(results, number)

    def clear(self) -> None:
        """Discard all waiting rows."""
        self._rows.clear()

    def _make(self, size: int, width: int) -> str:
        rows = (
            f"({number}, {', '.join(f'?{number * width + column}' for column in range(1, width + 1))})"
            for number in range(size)
        )
        statement = self._statements[size] = f"{self._head} (VALUES {', '.join(rows)}){self._tail}"
        return statement


def _by_number(answer: Rows) -> dict[int, tuple[Any, ...]]:
    return {row[0]: row[1:] for row in answer.fetchall()}


class PostgresDatabase:
    """A `store.database.Database` on the rows of one shard.

    Groups must not change the order of the operations on one command. Only one row per command may therefore wait in
    the groups, and all groups are sent before any other statement.
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
        """Make a group for one kind of statement."""
        group = Group(head, tail, self._pipeline)
        self._groups.append(group)
        return group

    def reserve(self, session: str, command_id: str) -> None:
        """Prepare for adding a row of this command to a group: send the groups if one has a row of it already."""
        if (session, command_id) in self._grouped:
            self.send_groups()
        self._grouped.add((session, command_id))

    def send_groups(self) -> None:
        """Send the waiting rows of all groups."""
        self._grouped.clear()
        for group in self._groups:
            group.send()

    def clear_groups(self) -> None:
        """Discard the waiting rows, because their transaction is rolled back."""
        self._grouped.clear()
        for group in self._groups:
            group.clear()

    def insert(self, statement: str, parameters: Sequence[Any]) -> int | None:
        """Insert a row and return its `seq`, or None if it conflicts with an existing one."""
        row = self.execute(f"{statement} RETURNING seq", parameters).fetchone()
        return None if row is None else row[0]

    def touch(self, operation: WriteProbe) -> Finish[None]:
        """Write nothing, because every transaction writes the lease's row anyway."""
        del operation
        return nothing

    def reclaim(self) -> None:
        """Do nothing, because the server's autovacuum reclaims space."""
