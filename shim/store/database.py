"""The seam between the operations' SQL and the two engines that carry it out.

The statements are the same text for SQLite and PostgreSQL: numbered parameters (`?1`), `ON CONFLICT`, no
function that only one of them has. An engine adds two conditions to them, because only PostgreSQL keeps several shards
in one database, and only it has an index on whether a command is live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from shim.core.records import WriteProbe

_Result = TypeVar("_Result")

Finish = Callable[[], _Result]
"""Gives the result of an operation once its statements are carried out; it may carry out more of them."""


class Partition(NamedTuple):
    """The shard that is opened, the fencing token of its lease, and the process that holds it."""

    shard: int
    fence: int
    process: str


class Rows(Protocol):
    """What a statement gave. PostgreSQL carries a statement out when this is first asked, with all before it."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""

    def fetchone(self) -> Any:
        """Return the next row, `None` after the last one."""

    def fetchall(self) -> list[Any]:
        """Return all rows that were not fetched yet."""


class Database(Protocol):
    """One transaction after another; the caller begins and ends them.

    `mine` is the condition that a row belongs to this store, `live` the one that a command may still be delivered.
    """

    mine: str
    live: str
    execute: Callable[..., Rows]

    def insert(self, statement: str, parameters: Sequence[Any]) -> int | None:
        """Insert a row and return its `seq`, `None` where there is one already. (`RETURNING` is slow on SQLite.)"""

    def touch(self, operation: WriteProbe) -> Finish[None]:
        """Write something."""

    def reclaim(self) -> None:
        """Give free space back to the disk, as far as nobody feels it."""


def nothing() -> None:
    """Finish an operation that has no result."""
