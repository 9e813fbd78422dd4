"""Durable storage of commands, results and sessions: the implementations of `ports.CommandStore`."""

from __future__ import annotations

import os
from pathlib import Path

from shim.config import settings
from shim.core.records import StoreContents
from shim.errors import StoreError
from shim.log import get
from shim.metrics import Metrics
from shim.ports import CommandStore
from shim.store import files, schema
from shim.store.database import Partition
from shim.store.files import advice
from shim.store.sqlite import InMemoryStore, SqliteStore
from shim.store.writer import UNOBSERVED, CallThreadsafe, CommitProbe, commit_probe

__all__ = [
    "CallThreadsafe",
    "CommitProbe",
    "Partition",
    "advice",
    "check_database",
    "check_files",
    "commit_probe",
    "log_store_warnings",
    "open_shard",
    "open_store",
]

log = get(__name__)

IN_MEMORY = ":memory:"
CHECK_S = 1.0


def check_database(path: Path) -> None:
    """Raise `StoreVersionError` for a database that needs a newer shim, `StoreError` for another application's.

    A text file is an error, too. Nothing is written, so a running shim may have the database open. Raises `OSError`.
    """
    check_files(path)
    path = Path(os.path.realpath(path))
    files.require_no_text(path)
    schema.check_untouched(path, CHECK_S)


def check_files(path: Path) -> None:
    """Raise `StoreError` if a file of the store exists and is not a regular file. No file is opened."""
    try:
        files.require_regular_files(Path(os.path.realpath(path)))
    except OSError as error:
        raise StoreError(f"the file at store.path cannot be used: {error.strerror}") from error


def open_store(
    configured: settings.Store, call_threadsafe: CallThreadsafe, probe: CommitProbe = UNOBSERVED
) -> CommandStore:
    """Make the store that the configuration asks for. The caller calls its `open()`.

    `call_threadsafe` schedules a callable on the event loop from any thread (`loop.call_soon_threadsafe`). The store
    calls every `done` callback through it. The path `:memory:` selects a store that keeps everything in this process.
    """
    if configured.url:
        raise StoreError("store.url: a database is opened shard by shard")
    if configured.path == IN_MEMORY:
        return InMemoryStore(call_threadsafe, probe)
    return SqliteStore(Path(configured.path), call_threadsafe, probe)


def open_shard(
    configured: settings.Store,
    call_threadsafe: CallThreadsafe,
    probe: CommitProbe,
    partition: Partition,
    patience_s: float,
) -> CommandStore:
    """Make the store of one shard in the database at `store.url`. The caller calls its `open()`.

    `call_threadsafe` is as in `open_store`. Raises `StoreError` if the extra `agent-shim[postgres]` is not installed.
    """
    try:
        from shim.store.postgres.engine import PostgresStore  # noqa: PLC0415 - an extra; its import costs memory
    except ModuleNotFoundError as error:
        raise StoreError(f"store.url needs the extra agent-shim[postgres]: {error.name} is not installed") from error
    return PostgresStore(configured, call_threadsafe, probe, partition, patience_s)


def log_store_warnings(loaded: StoreContents, metrics: Metrics) -> None:
    """Log and count problems that were found when the database was opened."""
    for warning in loaded.warnings:
        log.warning("store_warning", warning=warning)
    if loaded.quarantined:
        metrics.store_quarantined.inc(loaded.quarantined)
        log.error("store_rows_quarantined", rows=loaded.quarantined)
    if loaded.moved_aside:
        metrics.store_moved_aside.inc()
        log.error(
            "store_moved_aside",
            path=loaded.moved_aside,
            hint="the database was corrupt: commands and results that were only in it are lost; agents are adopted",
        )
