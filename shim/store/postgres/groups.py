"""Grouping of rows into statements for many rows, because a statement costs the server more than a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from shim.core.records import WriteProbe
from shim.store.database import Finish, Rows, nothing
from shim.store.postgres.pipeline import Pipeline

# Rows that are sent at once. The server works on them while the next ones are encoded.
CHUNK = 50

Key = tuple[str, str]
"""Session and id of a command."""

Read = Callable[[Rows, int], Sequence[Any]]
"""Function that converts the result of a statement for so many rows to the outcome of each row."""


class GroupAnswer:
    """Result of the statement for a group of rows."""

    __slots__ = ("_answer", "_count", "_outcomes", "_read")

    def __init__(self, read: Read) -> None:
        self._read = read
        self._answer: Rows | None = None
        self._count = 0
        self._outcomes: Sequence[Any] | None = None

    def attach(self, answer: Rows, count: int) -> None:
        """Set the result of the statement that was sent with `count` rows."""
        self._answer, self._count = answer, count

    def outcome(self, number: int) -> Any:
        """Return the outcome of a row, numbered from 0. The group must have been sent."""
        if self._outcomes is None:
            if self._answer is None:
                raise RuntimeError("the group was not sent")
            self._outcomes = self._read(self._answer, self._count)
        return self._outcomes[number]


class Group:
    """Waiting rows for one kind of statement, which are its parameters: an array for each column.

    `statement` has `{rows}` for them. `kinds` has a letter for each column (`Pipeline.execute_columns`). `read` makes
    the outcome of each row from the result.
    """

    def __init__(self, statement: str, kinds: str, read: Read, pipeline: Pipeline) -> None:
        arrays = ", ".join(f"?{number}" for number in range(1, len(kinds) + 1))
        self._statement = statement.replace("{rows}", f"unnest({arrays})")
        self._kinds = kinds
        self._read = read
        self._pipeline = pipeline
        self.clear()

    def add(self, parameters: Sequence[Any]) -> Finish[Any]:
        """Queue a row for `send` and return a function for its outcome. A full group is sent at once."""
        finish = partial(self._answer.outcome, len(self._rows))
        self._rows.append(parameters)
        if len(self._rows) == CHUNK:
            self.send()
            self._pipeline.flush()
        return finish

    def send(self) -> None:
        """Send all waiting rows in order."""
        rows = self._rows
        if rows:
            self._answer.attach(self._pipeline.execute_columns(self._statement, self._kinds, rows), len(rows))
            self.clear()

    def clear(self) -> None:
        """Discard all waiting rows and begin a new statement."""
        self._rows: list[Sequence[Any]] = []
        self._answer = GroupAnswer(self._read)


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
        self._grouped: set[Key] = set()
        self.execute: Callable[..., Rows] = self._execute

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        if self._grouped:
            self.send_groups()
        return self._pipeline.execute(statement, parameters)

    def group(self, statement: str, kinds: str, read: Read) -> Group:
        """Make a group for one kind of statement."""
        group = Group(statement, kinds, read, self._pipeline)
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
