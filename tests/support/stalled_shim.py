"""The shim with a store whose disk has stopped answering: `python -m tests.support.stalled_shim open|close run …`.

A disk cannot be stopped in a test without leaving processes that nobody can kill. What the shim sees of one is a call
of the store that does not return.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from shim import app, launch
from shim.core.records import StoreContents
from shim.ports import CommandStore
from shim.store import CallThreadsafe
from shim.store.sqlite import SqliteStore


def _never(step: str) -> None:
    print(f"stalled: {step}", flush=True)
    threading.Event().wait()


class _StalledOpen(SqliteStore):
    def open(self) -> StoreContents:
        _never("open")
        raise AssertionError


class _StalledClose(SqliteStore):
    def close(self) -> None:
        _never("close")


class _StalledApp(app.App):
    store = SqliteStore

    def make_store(self, post: CallThreadsafe) -> CommandStore:
        return self.store(Path(self.settings.store.path), post)


if __name__ == "__main__":
    step, command, option, config = sys.argv[1:]
    assert (command, option) == ("run", "--config")
    _StalledApp.store = {"open": _StalledOpen, "close": _StalledClose}[step]
    launch.main(config, (), None, lambda: _StalledApp)
