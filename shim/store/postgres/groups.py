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
"""Function that makes the outcome of each row from the result of a statement for so many rows."""


class GroupStatement:
    """A statement for any number of rows, which are its parameters: an array for each column.

    `statement` has `{rows}` for them. `kinds` has a letter for each column (`Pipeline.execute_columns`).
    """

    def __init__(self, statement: str, kinds: str, read: Read) -> None:
        arrays = ", ".join(f"?{number}" for number in range(1, len(kinds) + 1))
        self.text = statement.replace("{rows}", f"unnest({arrays})")
        self.kinds = kinds
        self.read = read


class Group:
    """Rows for one execution of a statement."""

    __slots__ = ("_answer", "_outcomes", "_statement", "rows")

    def __init__(self, statement: GroupStatement) -> None:
        self._statement = statement
        self.rows: list[Sequence[Any]] = []
        self._answer: Rows | None = None
        self._outcomes: Sequence[Any] | None = None

    def send(self, pipeline: Pipeline) -> None:
        """Send the rows, in order."""
        self._answer = pipeline.execute_columns(self._statement.text, self._statement.kinds, self.rows)

    def outcome(self, number: int) -> Any:
        """Return the outcome of a row, numbered from 0. The group must have been sent."""
        if self._outcomes is None:
            if self._answer is None:
                raise RuntimeError("the group was not sent")
            self._outcomes = self._statement.read(self._answer, len(self.rows))
        return self._outcomes[number]


class PostgresDatabase:
    """A `store.database.Database` on the rows of one shard.

    Groups must not change the order of the operations on one command. Only one row per command may therefore wait in
    the groups, and all groups are sent before any other statement.
    """

    live = "live"

    def __init__(self, pipeline: Pipeline, shard: int) -> None:
        self.mine = f"shard = {shard:d}"
        self._pipeline = pipeline
        self._groups: dict[GroupStatement, Group] = {}
        self._grouped: set[Key] = set()
        self.execute: Callable[..., Rows] = self._execute

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> Rows:
        if self._grouped:
            self.send_groups()
        return self._pipeline.execute(statement, parameters)

    def execute_grouped(self, statement: GroupStatement, key: Key, parameters: Sequence[Any]) -> Finish[Any]:
        """Queue a row of the command `key` for a statement, and return a function for its outcome.

        A full group is sent at once, and all groups if one has a row of this command already.
        """
        if key in self._grouped:
            self.send_groups()
        self._grouped.add(key)
        group = self._groups.get(statement)
        if group is None:
            group = self._groups[statement] = Group(statement)
        finish = partial(group.outcome, len(group.rows))
        group.rows.append(parameters)
        if len(group.rows) == CHUNK:
            del self._groups[statement]
            group.send(self._pipeline)
            self._pipeline.flush()
        return finish

    def send_groups(self) -> None:
        """Send the waiting rows of all groups."""
        for group in self._groups.values():
            group.send(self._pipeline)
        self.clear_groups()

    def clear_groups(self) -> None:
        """Forget the waiting rows: they were sent, or their transaction is rolled back."""
        self._grouped.clear()
        self._groups.clear()

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
