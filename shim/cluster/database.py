"""Cluster tables in PostgreSQL: the agreement of all replicas, the members, and the owners of shards.

A member's row is the lease of all its shards. The member renews the row until it deletes it, or until another replica
deletes it after it has expired. A deleted row cannot be renewed, so the deletion is the atomic step that ends the
member's right to its shards.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psycopg

from shim.core.shards import Member, View
from shim.errors import ConfigError, Fault, StoreError, StoreUnreachable
from shim.log import get
from shim.store.postgres.database import refusal
from shim.store.postgres.dsn import application

log = get(__name__)

SHARDS = 16
KEY_BYTES = 32
CONNECT_S = 4.0
LISTEN_S = 86_400.0
"""After this time the connection for notifications is replaced, even if it seems to work."""
LOCK_S = 1.0

_CREATE = (
    "INSERT INTO cluster (shards, owner_key, secret, agreed) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
    "INSERT INTO leases (shard) SELECT generate_series(0, shards - 1) FROM cluster ON CONFLICT DO NOTHING",
)
_AGREED = "SELECT shards, owner_key, secret, agreed FROM cluster FOR UPDATE"
_ANY_MEMBER = "SELECT EXISTS (SELECT FROM members WHERE until > clock_timestamp())"
_AGREE = "UPDATE cluster SET agreed = %s"
_JOIN = (
    "INSERT INTO members (process, name, address, fingerprint, lease_s, until, server)"
    " SELECT %(process)s, %(name)s, %(address)s, %(fingerprint)s, %(lease_s)s,"
    " clock_timestamp() + make_interval(secs => %(lease_s)s), pg_postmaster_start_time()"
    # FOR SHARE waits for a replica that is changing `agreed`, then checks the new value
    " FROM (SELECT FROM cluster WHERE agreed = %(agreed)s FOR SHARE) same"
    # The connection may be lost after the commit: the repetition finds the row, and renews it
    " ON CONFLICT (process) DO UPDATE SET until = excluded.until, server = excluded.server"
    " RETURNING pg_notify('agent_shim', '')"
)
_RENEW = (
    "UPDATE members SET until = clock_timestamp() + make_interval(secs => lease_s),"
    " server = pg_postmaster_start_time(), leaving = %s WHERE process = %s"
)
# After a failover, `until` was set by another server's clock, which may differ: wait one more lease before evicting.
_EVICT = (
    "DELETE FROM members WHERE clock_timestamp() > until + make_interval(secs =>"
    " CASE WHEN server = pg_postmaster_start_time() THEN 0 ELSE lease_s END)"
    " RETURNING process, pg_notify('agent_shim', '')"
)
# A paused replica may still hold the lock on a lease's row. Terminating its backend ends the transaction.
_TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE usename = current_user AND EXISTS"
    " (SELECT FROM unnest(%s::text[]) name WHERE application_name = name OR starts_with(application_name, name || ' '))"
)
_READ = (
    "SELECT (SELECT json_agg(m) FROM (SELECT process, name, address, fingerprint, leaving FROM members) m),"
    " (SELECT json_agg(json_build_array(shard, holder, fence)) FROM leases)"
)
_ACQUIRE = (
    "UPDATE leases SET holder = %(me)s, fence = fence + 1 WHERE shard = %(shard)s"
    " AND (holder IN ('', %(me)s) OR NOT EXISTS (SELECT FROM members WHERE process = leases.holder))"
    " AND EXISTS (SELECT FROM members WHERE process = %(me)s)"
    " RETURNING fence, pg_notify('agent_shim', '')"
)
_RELEASE = "UPDATE leases SET holder = '' WHERE shard = ANY(%s) AND holder = %s RETURNING pg_notify('agent_shim', '')"
_LEAVE = "DELETE FROM members WHERE process = %s RETURNING pg_notify('agent_shim', '')"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Values that all replicas share: the number of shards, the key for owner ids, and the members' secret."""

    shards: int
    owner_key: bytes = field(repr=False)
    secret: str = field(repr=False)


class Connection:
    """One connection to the database, opened on demand and again after a loss. One task uses it at a time."""

    def __init__(self, conninfo: Callable[[], str]) -> None:
        self._conninfo = conninfo
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def use(self, limit_s: float) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Yield the connection in autocommit mode. Raises `StoreError` if the database fails or exceeds the limit.

        At the limit the connection is shut down. Cancelling the statement would not help, because a server that hangs
        does not answer a cancellation either.
        """
        async with self._lock:
            connection = await self._open(min(limit_s, CONNECT_S))
            timer = asyncio.get_running_loop().call_later(limit_s, _shut_down, connection)
            try:
                yield connection
            except BaseException as error:
                await self.close()
                if isinstance(error, psycopg.Error):
                    raise refusal(error) from None
                raise
            finally:
                timer.cancel()

    async def _open(self, limit_s: float) -> psycopg.AsyncConnection[Any]:
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            try:
                async with asyncio.timeout(limit_s):
                    self._connection = await psycopg.AsyncConnection.connect(self._conninfo(), autocommit=True)
            except TimeoutError:
                raise StoreUnreachable("the database did not answer in time") from None
            except psycopg.Error as error:
                raise refusal(error) from None
            except ConfigError as error:  # the password file is read for each connection, and may be away at times
                raise StoreError(str(error)) from None
            self._connection.prepare_threshold = None  # names of prepared statements do not survive a pooler
        return self._connection

    async def close(self) -> None:
        """Close the connection. The next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                await connection.close()


def _shut_down(connection: psycopg.AsyncConnection[Any]) -> None:
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as copy:
        copy.shutdown(socket.SHUT_RDWR)


class Database:
    """Operations on the cluster tables. All raise `StoreError`."""

    def __init__(self, conninfo: Callable[[], str]) -> None:
        """Prepare the connections. `conninfo` returns the connection string for the current membership."""
        self._renewals = Connection(conninfo)
        self._work = Connection(conninfo)
        self._listener = Connection(conninfo)

    async def agree(self, settings: dict[str, Any], limit_s: float) -> Agreement:
        """Return the agreement. While no replica lives, the first one to start sets the common settings.

        Raises `ConfigError` if living replicas have other settings; nothing is changed then.
        """
        mine = _encode(settings)
        async with self._renewals.use(limit_s) as connection, connection.transaction():
            first = (SHARDS, secrets.token_bytes(KEY_BYTES), secrets.token_urlsafe(KEY_BYTES), mine)
            await connection.execute(_CREATE[0], first)
            await connection.execute(_CREATE[1])
            (row,) = await (await connection.execute(_AGREED)).fetchall()
            shards, owner_key, secret, agreed = row
            if agreed != mine:
                ((any_member,),) = await (await connection.execute(_ANY_MEMBER)).fetchall()
                if any_member:
                    raise ConfigError(list(_differences(settings, agreed)))
                await connection.execute(_AGREE, (mine,))
        return Agreement(shards, bytes(owner_key), secret)

    async def join(self, me: Member, lease_s: float, settings: dict[str, Any], limit_s: float) -> bool:
        """Become a member. Return false if the agreed settings have changed since `agree`."""
        row = {"process": me.process, "name": me.name, "address": me.address, "fingerprint": me.fingerprint}
        async with self._renewals.use(limit_s) as connection:
            joined = await connection.execute(_JOIN, row | {"lease_s": lease_s, "agreed": _encode(settings)})
        return joined.rowcount == 1

    async def renew(self, process: str, limit_s: float, *, leaving: bool) -> bool:
        """Renew a member's row. Return false if it was deleted, which ended the right to all its shards."""
        async with self._renewals.use(limit_s) as connection:
            return (await connection.execute(_RENEW, (leaving, process))).rowcount == 1

    async def read(self, limit_s: float) -> View:
        """Evict expired members, terminate their database connections, and return the remaining members and leases."""
        async with self._work.use(limit_s) as connection:
            evicted = [row[0] for row in await (await connection.execute(_EVICT)).fetchall()]
            if evicted:
                log.warning("replicas_evicted", processes=evicted)
                await connection.execute(_TERMINATE, ([application(each) for each in evicted],))
            (row,) = await (await connection.execute(_READ)).fetchall()
        members, leases = row
        found = (Member(**each) for each in members or ())
        return View(
            {member.process: member for member in found},
            {shard: (holder, fence) for shard, holder, fence in leases or ()},
        )

    async def acquire(self, shard: int, me: str, limit_s: float) -> int | None:
        """Acquire a shard that no member holds. Return its fencing token, or `None` if another replica has it."""
        async with self._work.use(limit_s) as connection, connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {int(LOCK_S * 1000)}")
            rows = await (await connection.execute(_ACQUIRE, {"shard": shard, "me": me})).fetchall()
        return rows[0][0] if rows else None

    async def release(self, shards: Sequence[int], me: str, limit_s: float) -> None:
        """Release shards, so that other replicas can take them."""
        async with self._work.use(limit_s) as connection:
            await connection.execute(_RELEASE, (list(shards), me))

    async def leave(self, me: str, limit_s: float) -> None:
        """Delete the member's row, which also frees its remaining shards."""
        async with self._work.use(limit_s) as connection:
            await connection.execute(_LEAVE, (me,))

    async def notifications(self) -> AsyncIterator[None]:
        """Yield at each change that a replica notifies, until the connection fails. Raises `StoreError` then."""
        async with self._listener.use(LISTEN_S) as connection:
            await connection.execute("LISTEN agent_shim")
            async for _ in connection.notifies():
                yield

    async def close(self) -> None:
        """Close all connections."""
        for connection in (self._renewals, self._work, self._listener):
            await connection.close()


def _encode(settings: dict[str, Any]) -> str:
    return msgspec.json.encode(settings, order="sorted").decode()


def _differences(mine: dict[str, Any], agreed: str) -> list[Fault]:
    """Return a fault for each key whose value differs from that of the living replicas."""
    theirs: dict[str, Any] = msgspec.json.decode(agreed)
    keys = sorted({*mine, *theirs})
    return [
        Fault(key, "the replicas that run on this database have another value: all must have the same")
        for key in keys
        if mine.get(key) != theirs.get(key)
    ]
