"""A database of either engine as a test sees it: stores that are opened on it, and statements past them."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from typing import Any

from shim.core.records import StoreContents
from shim.ports import CommandStore
from shim.store import CallThreadsafe
from shim.store.sqlite import SqliteStore
from tests.support.stores import StoreClient


class TestedDatabase(ABC):
    """Opens stores on one database, and closes them all in the end."""

    __test__ = False

    def __init__(self, place: str) -> None:
        self.place = place
        self._clients: list[StoreClient] = []

    @abstractmethod
    def store(self, post: CallThreadsafe) -> CommandStore:
        """A store that is yet to be opened."""

    @abstractmethod
    def execute(self, statement: str, *values: Any) -> tuple[int, list[tuple[Any, ...]]]:
        """Run a statement with `?` for each value, past any store; how many rows it concerned, and what it returned."""

    def open(self) -> tuple[StoreClient, StoreContents]:
        self._clients.append(StoreClient(self.store))
        return self._clients[-1], self._clients[-1].open()

    def loaded(self) -> StoreContents:
        """Open the store, close it again, and return its contents."""
        client, loaded = self.open()
        client.close()
        return loaded

    def change(self, statement: str, *values: Any) -> None:
        """Change one row."""
        assert self.execute(statement, *values)[0] == 1

    def quarantined(self) -> list[tuple[Any, ...]]:
        return self.execute("SELECT origin, reason, content FROM quarantine ORDER BY id")[1]

    def close(self) -> None:
        for client in self._clients:
            client.close()


class SqliteFile(TestedDatabase):
    """A file."""

    def store(self, post: CallThreadsafe) -> CommandStore:
        return SqliteStore(Path(self.place), post)

    def execute(self, statement: str, *values: Any) -> tuple[int, list[tuple[Any, ...]]]:
        with closing(sqlite3.connect(self.place, isolation_level=None)) as connection:
            cursor = connection.execute(statement, values)
            return cursor.rowcount, cursor.fetchall()


class PostgresDatabase(TestedDatabase):
    """A database of a server that runs; each store takes the shard's lease anew, as after a crash."""

    def store(self, post: CallThreadsafe) -> CommandStore:
        from tests.support import postgres  # noqa: PLC0415 - the driver is an extra

        return postgres.store(self.place, post)

    def execute(self, statement: str, *values: Any) -> tuple[int, list[tuple[Any, ...]]]:
        from tests.support import postgres  # noqa: PLC0415 - the driver is an extra

        return postgres.execute(self.place, statement.replace("?", "%s"), values)


def database_at(place: str) -> TestedDatabase:
    """The database with this URL or path."""
    return PostgresDatabase(place) if place.startswith("postgresql://") else SqliteFile(place)
