"""Change of the number of shards while no replica runs: `agent-shim store shards`."""

from __future__ import annotations

from contextlib import closing

import psycopg

from shim.config import settings
from shim.errors import StoreError
from shim.store.postgres.database import connect, prepare, refusal
from shim.store.schema import TABLES

# `schema.shard_of_session` as SQL.
_SHARD = (
    "(('x' || substr(encode(sha256(convert_to(split_part(session, '/', 1), 'UTF8')), 'hex'), 1, 8))::bit(32)::bigint"
    " %% %s)::integer"
)


def change_shards(configured: settings.Store, count: int) -> int:
    """Divide the store into `count` shards and return the previous number. Blocks.

    Runs in one transaction. Raises `StoreError` if a replica is a member or the database was never used; nothing is
    changed then.
    """
    prepare(configured)
    try:
        with closing(connect(configured, "agent-shim store shards")) as connection, connection.transaction():
            rows = connection.execute("SELECT shards FROM cluster FOR UPDATE").fetchall()
            if not rows:
                raise StoreError("the database was never used: the first replica makes the shards")
            living = connection.execute("SELECT name FROM members WHERE until > clock_timestamp()").fetchall()
            if living:
                names = ", ".join(name for (name,) in living)
                raise StoreError(f"replicas live ({names}): stop all of them first")
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
            return int(rows[0][0])
    except psycopg.Error as error:
        raise refusal(error) from None
