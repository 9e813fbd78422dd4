"""Work on a database that no replica uses: source or target of `store.copy`, and another number of shards."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg

from shim.config import settings
from shim.errors import StoreError
from shim.store.postgres.database import connect, prepare, refusal
from shim.store.schema import TABLES, Table, shard_of_session

SHARDS = 16
_PAGE = 2000
_OIDS = {"t": "text", "i": "int8", "f": "float8", "b": "bytea", "n": "bytea", "o": "bool"}
_LIVING = "SELECT name FROM members WHERE until > clock_timestamp()"
# `schema.shard_of_session` as SQL.
_SHARD = (
    "(('x' || substr(encode(sha256(convert_to(split_part(session, '/', 1), 'UTF8')), 'hex'), 1, 8))::bit(32)::bigint"
    " %% %s)::integer"
)


@contextmanager
def unused(configured: settings.Store, place: str = "") -> Iterator[psycopg.Connection[Any]]:
    """Open a database in a transaction during which no replica can become a member. The caller commits.

    Raises `StoreError` if a replica is a member already. `place` begins the text of errors, if it is given.
    """
    place = place and f"{place}: "
    prepare(configured)
    try:
        with closing(connect(configured, "agent-shim store")) as connection:
            connection.autocommit = False
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute("LOCK TABLE members IN EXCLUSIVE MODE")
            living = connection.execute(_LIVING).fetchall()
            if living:
                names = ", ".join(name for (name,) in living)
                raise StoreError(f"{place}replicas use the database ({names}): stop all of them first")
            yield connection
    except psycopg.Error as error:
        raise StoreError(f"{place}{refusal(error)}") from None


@contextmanager
def copy_end(configured: settings.Store, option: str) -> Iterator[CopyEnd]:
    """Open a database as an end of a copy. Raises `StoreError`; errors of the database begin with `option`."""
    with unused(configured, option) as connection:
        row = connection.execute("SELECT shards FROM cluster").fetchone()
        yield CopyEnd(connection, SHARDS if row is None else row[0])


class CopyEnd:
    """A `store.copy.End` on PostgreSQL."""

    def __init__(self, connection: psycopg.Connection[Any], shards: int) -> None:
        self._connection = connection
        self._shards = shards

    def key(self) -> bytes | None:
        """Return the key for owner ids, `None` if the store was never used."""
        row = self._connection.execute("SELECT owner_key FROM cluster").fetchone()
        return None if row is None else bytes(row[0])

    def read(self, table: Table) -> Iterator[tuple[Any, ...]]:
        """Yield all rows of a table in the order of its key columns."""
        with self._connection.cursor(f"read_{table.name}") as cursor:
            cursor.itersize = _PAGE
            cursor.execute(table.select)
            yield from cursor

    def write(self, table: Table, rows: Iterator[tuple[Any, ...]]) -> None:
        """Insert rows into an empty table, and continue its numbers behind them."""
        names, kinds = table.names, [each.partition(":")[2] for each in table.columns.split()]
        booleans = [number for number, kind in enumerate(kinds) if kind == "o"]
        has_shard = "session" in names
        at = names.index("session") if has_shard else 0
        columns = ", ".join([*names, "shard"] if has_shard else names)
        with self._connection.cursor() as cursor, cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as out:
            out.set_types([*(_OIDS[kind] for kind in kinds), *(["int4"] if has_shard else [])])
            for row in rows:
                values = list(row)
                for number in booleans:
                    values[number] = bool(values[number])
                out.write_row([*values, shard_of_session(row[at], self._shards)] if has_shard else values)
        if names[0] in ("id", "seq"):
            last = f"(SELECT coalesce(max({names[0]}), 0) + 1 FROM {table.name})"
            self._connection.execute(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', '{names[0]}'), {last}, false)"
            )

    def finish(self, key: bytes) -> None:
        """Set the key for owner ids and commit the transaction."""
        # `agreed` stays empty: the first replica that starts fills in the settings.
        self._connection.execute(
            "INSERT INTO cluster (shards, owner_key, secret, agreed) VALUES (%s, %s, %s, '')"
            " ON CONFLICT (one) DO UPDATE SET owner_key = excluded.owner_key",
            (self._shards, key, secrets.token_urlsafe(32)),
        )
        self._connection.commit()


def change_shards(configured: settings.Store, count: int) -> int:
    """Divide the store into `count` shards and return the previous number. Blocks.

    Raises `StoreError` if a replica is a member or the database was never used; nothing is changed then.
    """
    with unused(configured) as connection:
        rows = connection.execute("SELECT shards FROM cluster FOR UPDATE").fetchall()
        if not rows:
            raise StoreError("the database was never used: the first replica makes the shards")
        connection.execute("DELETE FROM members")
        # Raise all fencing tokens, so that former owners can no longer commit, even paused ones that resume later.
        connection.execute("UPDATE leases SET holder = '', fence = (SELECT max(fence) + 1 FROM leases)")
        connection.execute(
            "INSERT INTO leases (shard, fence) SELECT number, (SELECT coalesce(max(fence), 0) FROM leases)"
            " FROM generate_series(0, %s - 1) number ON CONFLICT DO NOTHING",
            (count,),
        )
        connection.execute("DELETE FROM leases WHERE shard >= %s", (count,))
        for table in TABLES:
            if "session" in table.names and table.name != "traces":
                connection.execute(f"UPDATE {table.name} SET shard = {_SHARD}".encode(), (count,))
        connection.execute("UPDATE cluster SET shards = %s", (count,))
        connection.commit()
        return int(rows[0][0])
