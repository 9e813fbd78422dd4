"""Where commands, results and sessions outlive the process: the implementations of `ports.CommandStore`."""

from __future__ import annotations

from pathlib import Path

from shim import settings
from shim.errors import StoreError
from shim.ports import CommandStore
from shim.store import schema
from shim.store.delivery import Post
from shim.store.sqlite import SqliteStore
from shim.store.writer import CommitProbe

__all__ = ["CommitProbe", "Post", "check_database", "open_store"]

IN_MEMORY = ":memory:"
CHECK_S = 1.0


def check_database(path: Path) -> None:
    """Raise `StoreVersionError` for the database of a newer shim, `StoreError` for one that is not ours.

    Leaves no trace; a shim may be at work on it.
    """
    schema.check_untouched(path, CHECK_S)


def open_store(
    configured: settings.Store, post: Post, probe: CommitProbe | None = None, shard: str = ""
) -> CommandStore:
    """The store that the configuration asks for; its `open()` is still to be called.

    `post` hands a callable to the event loop from any thread (`loop.call_soon_threadsafe`); every `done` comes through
    it. A path of `:memory:` keeps everything in this process only. Raises `StoreError` where `store.url` is set and the
    extra that it needs is not installed. `shard` names one of several stores on the same NATS account.
    """
    if configured.url:
        return _nats_store(configured, post, probe, shard)
    if configured.path == IN_MEMORY:
        from shim.store.memory import MemoryStore  # noqa: PLC0415 - only those who use it pay for it

        return MemoryStore(post)
    return SqliteStore(Path(configured.path), post, probe)


def _nats_store(configured: settings.Store, post: Post, probe: CommitProbe | None, shard: str) -> CommandStore:
    try:
        from shim.store.jetstream import Layout, NatsStore  # noqa: PLC0415 - an extra, and memory that only gateways pay for
    except ModuleNotFoundError as error:
        raise StoreError(f"store.url needs the extra agent-shim[nats]: {error.name} is not installed") from error
    return NatsStore(configured, post, probe, Layout.of_shard(shard))
