"""The PostgreSQL database of `store.url`: the way to it, its version, rights, commits and standbys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shim.cli.doctor.report import Finding, failed, passed, warned
from shim.config import settings
from shim.errors import ConfigError, StoreError
from shim.hosts import is_this_machine

if TYPE_CHECKING:
    from shim.store.postgres.inspection import Inspection

NEWEST = 18
SLOW_S = 0.1
_PAGE = "docs/how-to/several-replicas.md#the-database"


def examine_database(store: settings.Store) -> Iterator[Finding]:
    """Connect as the shim does, and yield what stands between it and its store. Nothing is changed."""
    try:
        from shim.store.postgres import inspection
    except ModuleNotFoundError as error:
        text = f"store.url needs agent-shim[postgres]: {error.name} is not installed"
        yield failed("store", text, "pip install 'agent-shim[postgres]'; the image has it")
        return
    try:
        found = inspection.inspect(store)
    except (StoreError, ConfigError) as error:
        yield failed("store", str(error), f"{_PAGE} says what the database must be")
        return
    yield _way(found)
    yield _version(found)
    yield _rights(found)
    yield _commit(found, inspection.PATIENCE_S)
    yield _replication(found)


def _way(found: Inspection) -> Finding:
    where = f"database {found.database} on {found.host}:{found.port}"
    if found.encrypted:
        return passed("store", f"{where}, over TLS")
    if is_this_machine(found.host):
        return passed("store", f"{where}, on this machine without TLS")
    return warned("store", f"{where}, without TLS", "take store.allow_insecure away: commands can be read on the way")


def _version(found: Inspection) -> Finding:
    if found.version > NEWEST:
        return warned(
            "database", f"PostgreSQL {found.version} is newer than this shim", f"14 to {NEWEST} are supported"
        )
    schema = f"schema version {found.schema}" if found.schema else "no schema yet: the shim makes it"
    return passed("database", f"PostgreSQL {found.version}, {schema}")


def _rights(found: Inspection) -> Finding:
    if found.may_write:
        return passed("rights", "the user may make and write the schema agent_shim")
    todo = "GRANT CREATE ON DATABASE to it, or make a schema agent_shim that this user owns, with all tables in it"
    return failed("rights", "the user may not make or write the schema agent_shim", todo)


def _commit(found: Inspection, patience_s: float) -> Finding:
    if found.commit_s >= patience_s:
        text = f"a commit did not end in {patience_s:g} s: it waits for a standby ({found.synchronous_names})"
        todo = "start the standby, or take it out of synchronous_standby_names: until then no command is stored"
        return failed("commit", text, todo)
    text = f"a commit takes {found.commit_s * 1000:.1f} ms"
    if found.commit_s > SLOW_S:
        return warned("commit", text, "each command waits for one: a database near by, on faster disks")
    return passed("commit", text)


def _replication(found: Inspection) -> Finding:
    if found.synchronous_names:
        return passed("replication", f"commits wait for standbys: {found.synchronous_names}")
    if found.standbys:
        text = f"servers that replicate from it: {found.standbys}; no commit waits for them"
        todo = "a failover loses acknowledged commands: name a standby in synchronous_standby_names"
        return warned("replication", text, todo)
    return passed("replication", "no standby: what is acknowledged is on one server's disk")
