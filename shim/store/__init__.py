"""Where commands, results and sessions outlive the process: the implementations of `ports.CommandStore`."""

from __future__ import annotations

from pathlib import Path

from shim import settings
from shim.ports import CommandStore
from shim.store import schema
from shim.store.delivery import Post
from shim.store.files import advice
from shim.store.sqlite import SqliteStore
from shim.store.writer import CommitProbe

__all__ = ["CommitProbe", "Post", "advice", "check_database", "open_store"]

IN_MEMORY = ":memory:"
CHECK_S = 1.0


def check_database(path: Path) -> None:
    """Raise `StoreVersionError` for the database of a newer shim, `StoreError` for one that is not ours.

    Leaves no trace; a shim may be at work on it.
    """
    schema.check_untouched(path, CHECK_S)


def open_store(configured: settings.Store, post: Post, probe: CommitProbe | None = None) -> CommandStore:
    """The store that the configuration asks for; its `open()` is still to be called.

    `post` hands a callable to the event loop from any thread (`loop.call_soon_threadsafe`); every `done` comes through
    it. A path of `:memory:` keeps everything in this process only.
    """
    if configured.path == IN_MEMORY:
        from shim.store.memory import MemoryStore  # noqa: PLC0415 - only those who use it pay for it

        return MemoryStore(post)
    return SqliteStore(Path(configured.path), post, probe)
