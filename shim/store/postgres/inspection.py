"""Facts about a database for doctor, read without changing it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from threading import Timer
from typing import Any

import psycopg

from shim.clock import Clock
from shim.config import settings
from shim.store.postgres.database import check_server, connect, refusal, require_sync, schema_version
from shim.store.postgres.dsn import SCHEMA

monotonic = Clock().monotonic_s

PATIENCE_S = 4.0
COMMITS = 3

# If there is no schema, the shim creates it, which needs other rights than using its tables.
_RIGHTS = """
SELECT CASE WHEN namespace IS NULL THEN has_database_privilege(current_database(), 'CREATE')
    ELSE has_schema_privilege(namespace, 'USAGE') AND (has_schema_privilege(namespace, 'CREATE') OR tables > 0)
        AND coalesce(allowed, true) END
FROM (SELECT to_regnamespace(%(schema)s)::oid AS namespace) AS here, LATERAL (
    SELECT count(*) AS tables, bool_and(
        has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
        AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')) AS allowed
    FROM pg_class WHERE relnamespace = namespace AND relkind = 'r') AS found
"""
# Only privileged users may read names and states of standbys. Their number and the setting are readable for all.
_REPLICATION = "SELECT (SELECT count(*) FROM pg_stat_replication), current_setting('synchronous_standby_names')"
# A message in the write-ahead log, which nothing reads: its commit is synced and replicated like one of the store.
_MESSAGE = "SELECT pg_logical_emit_message(true, 'agent-shim doctor', '')"


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts about a database. `schema` is 0 if there is none; a commit of `PATIENCE_S` or longer was cancelled."""

    host: str
    port: int
    database: str
    encrypted: bool
    version: int
    schema: int
    may_write: bool
    standbys: int
    synchronous_names: str
    commit_s: float


def inspect(configured: settings.Store) -> Inspection:
    """Connect as the store does and return the facts. Blocks; raises `StoreError` and `ConfigError` naming the key."""
    try:
        with closing(connect(configured, "agent-shim doctor")) as connection:
            check_server(connection)
            return _inspect(connection)
    except psycopg.Error as error:
        raise refusal(error) from None


def _inspect(connection: psycopg.Connection[Any]) -> Inspection:
    info = connection.info
    ((may_write,),) = connection.execute(_RIGHTS, {"schema": SCHEMA}).fetchall()
    ((standbys, names),) = connection.execute(_REPLICATION).fetchall()
    return Inspection(
        host=info.host,
        port=info.port,
        database=info.dbname,
        encrypted=bool(connection.pgconn.ssl_in_use),
        version=info.server_version // 10000,
        schema=schema_version(connection) if may_write else 0,
        may_write=may_write,
        standbys=standbys,
        synchronous_names=names.strip(),
        commit_s=_commit_s(connection),
    )


def _commit_s(connection: psycopg.Connection[Any]) -> float:
    """Return the duration of the fastest of a few commits: the others may have waited for something else."""
    require_sync(connection)
    fastest = PATIENCE_S
    for _ in range(COMMITS):
        taken = _one_commit_s(connection)
        if taken >= PATIENCE_S:
            return taken
        fastest = min(fastest, taken)
    return fastest


def _one_commit_s(connection: psycopg.Connection[Any]) -> float:
    # No setting limits a COMMIT that waits for a standby. A cancelled one ends as if it had been replicated.
    timer = Timer(PATIENCE_S, connection.cancel_safe)
    connection.execute("BEGIN")
    connection.execute(_MESSAGE)
    timer.start()
    started = monotonic()
    try:
        connection.execute("COMMIT")
    finally:
        timer.cancel()
    return monotonic() - started
