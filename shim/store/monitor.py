"""Metrics and log events of the store."""

from __future__ import annotations

from collections.abc import Callable

from shim.clock import Clock
from shim.core.records import StoreContents
from shim.errors import StoreError
from shim.log import get
from shim.metrics import Metrics
from shim.store import CommitProbe

log = get(__name__)

PINNED_HINT = (
    "another program reads the database in a transaction that it does not end, and the log beside the database grows "
    "with every commit: end that program (a backup, a sqlite3 shell); the log is emptied within seconds after that"
)


def probe(
    metrics: Metrics, broken: Callable[[StoreError], None], fenced: Callable[[], None] | None = None
) -> CommitProbe:
    """Return a probe that feeds the metrics of the store.

    `broken` is called when a commit finds the database corrupt, `fenced` when another replica has taken the shard.
    """

    def committed(commit_s: float, operations: int) -> None:
        metrics.store_commit_seconds.observe(commit_s)
        metrics.store_operations.inc(operations)

    def logged(size_bytes: int, pinned: bool) -> None:
        metrics.store_log_bytes.set(size_bytes)
        metrics.store_log_pinned.set(pinned)
        if pinned:
            log.warning("store_log_pinned", dedupe_key="store.path", size_bytes=size_bytes, hint=PINNED_HINT)

    return CommitProbe(Clock().monotonic_s, committed, metrics.store_failures.inc, broken, fenced, logged)


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
