"""Interface between the SQL of the operations and the two engines, SQLite and PostgreSQL.

Both engines get the same statements: numbered parameters (`?1`), `ON CONFLICT`, and only functions that both have.
Each engine supplies two conditions for them, because only PostgreSQL keeps several shards in one database and has a
column that marks live commands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from shim.core.records import WriteProbe

_Result = TypeVar("_Result")

Finish = Callable[[], _Result]
"""Function that returns the result of an operation after its statements were queued. It may run further statements."""


class Partition(NamedTuple):
    """A shard to open, the fencing token of its lease, and the process that holds the lease."""

    shard: int
    fence: int
    process: str


class Rows(Protocol):
    """Result of a statement. On PostgreSQL the first access sends all queued statements and waits for this result."""

    @property
    def rowcount(self) -> int:
        """Number of rows that the statement changed."""

    def fetchone(self) -> Any:
        """Return the next row, or `None` after the last one."""

    def fetchall(self) -> list[Any]:
        """Return all remaining rows."""


class Database(Protocol):
    """A connection on which the caller begins and ends transactions.

    `mine` is the SQL condition for rows that belong to this store. `live` is the SQL condition for commands that have
    not ended.
    """

    mine: str
    live: str
    execute: Callable[..., Rows]

    def insert(self, statement: str, parameters: Sequence[Any]) -> int | None:
        """Insert a row and return its `seq`, or `None` if it conflicts with an existing one.

        A method of its own, because `RETURNING` is slow on SQLite.
        """

    def touch(self, operation: WriteProbe) -> Finish[None]:
        """Write to the database, as a test that it accepts writes."""

    def reclaim(self) -> None:
        """Return some free pages to the file system, few enough not to delay other work."""


def nothing() -> None:
    """Return None, as the `Finish` of an operation without a result."""
