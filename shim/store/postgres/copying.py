"""A PostgreSQL database as source or target of `store.copy`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg

from shim.config import settings
from shim.errors import StoreError
from shim.store.postgres.database import connect, prepare, refusal
from shim.store.schema import Table, shard_of_session

SHARDS = 16
_PAGE = 2000
_ALIVE = "SELECT count(*) FROM members WHERE until > clock_timestamp()"
_OIDS = {"t": "text", "i": "int8", "f": "float8", "b": "bytea", "n": "bytea", "o": "bool"}


class _Database:
    def __init__(self, connection: psycopg.Connection[Any], shards: int) -> None:
        self._connection = connection
        self._shards = shards

    def key(self) -> bytes | None:
        row = self._connection.execute("SELECT owner_key FROM cluster").fetchone()
        return None if row is None else bytes(row[0])

    def read(self, table: Table) -> Iterator[tuple[Any, ...]]:
        with self._connection.cursor(f"read_{table.name}") as cursor:
            cursor.itersize = _PAGE
            cursor.execute(table.select)
            yield from cursor

    def write(self, table: Table, rows: Iterator[tuple[Any, ...]]) -> None:
        names, kinds = table.names, [each.partition(":")[2] for each in table.columns.split()]
        booleans = [number for number, kind in enumerate(kinds) if kind == "o"]
        own = "session" in names
        at = names.index("session") if own else 0
        columns = ", ".join([*names, "shard"] if own else names)
        with self._connection.cursor() as cursor, cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as out:
            out.set_types([*(_OIDS[kind] for kind in kinds), *(["int4"] if own else [])])
            for row in rows:
                values = list(row)
                for number in booleans:
                    values[number] = bool(values[number])
                out.write_row([*values, shard_of_session(row[at], self._shards)] if own else values)
        if names[0] in ("id", "seq"):
            last = f"(SELECT coalesce(max({names[0]}), 0) + 1 FROM {table.name})"
            self._connection.execute(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', '{names[0]}'), {last}, false)"
            )

    def finish(self, key: bytes) -> None:
        # `agreed` stays empty: the first replica that starts fills in the settings.
        self._connection.execute(
            "INSERT INTO cluster (shards, owner_key, secret, agreed) VALUES (%s, %s, %s, '')"
            " ON CONFLICT (one) DO UPDATE SET owner_key = excluded.owner_key",
            (self._shards, key, secrets.token_urlsafe(32)),
        )
        self._connection.commit()


@contextmanager
def database(configured: settings.Store, option: str) -> Iterator[_Database]:
    """Open a database in a transaction during which no replica can become a member.

    Raises `StoreError` if a replica is a member already.
    """
    try:
        prepare(configured)
        with closing(connect(configured, "agent-shim copy")) as connection:
            connection.autocommit = False
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute("LOCK TABLE members IN EXCLUSIVE MODE")
            (alive,) = connection.execute(
                "SELECT count(*) FROM members WHERE until > clock_timestamp()"
            ).fetchone() or (0,)
            if alive:
                raise StoreError(f"{option}: {alive} replicas use the database: stop them first")
            row = connection.execute("SELECT shards FROM cluster").fetchone()
            yield _Database(connection, SHARDS if row is None else row[0])
    except psycopg.Error as error:
        raise StoreError(f"{option}: {refusal(error)}") from None
