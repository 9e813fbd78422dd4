"""Reload of the configuration while the shim runs: after a change of its file, or on request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from shim.config.files import FileWatcher
from shim.config.settings import Settings
from shim.errors import ConfigError

WATCH_S = 5.0


class ConfigReloader:
    """Reader of changed configuration.

    `load` reads the configuration. `apply` receives the new settings, `reject` the faults of a file that cannot be
    used. `until_tick_s` is that of the clock. `files` has recorded the file before it was read for the first time, so
    that no change is missed.
    """

    def __init__(
        self,
        load: Callable[[], Settings],
        files: FileWatcher,
        path: str | None,
        apply: Callable[[Settings], None],
        reject: Callable[[list[str]], None],
        stopping: asyncio.Event,
        until_tick_s: Callable[[float], float],
    ) -> None:
        self._until_tick_s = until_tick_s
        self._load = load
        self._files = files
        self._path = path
        self._apply = apply
        self._reject = reject
        self._stopping = stopping
        self._reloading = False
        self._requested = False

    def changed(self, token_file: str) -> set[str]:
        """Return which of `config` and `token` are other files than at the previous call."""
        return self._files.changed({"config": self._path, "token": token_file})

    def request(self) -> None:
        """Reload at the next call of `reload`, or when the reading that is under way has ended."""
        self._requested = True

    async def watch(self, token_file: Callable[[], str], token_changed: Callable[[], None]) -> None:
        """Reload after a change of the configuration or token file, Kubernetes' symlink swap included."""
        if self._requested:
            await self.reload()
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_tick_s(WATCH_S)):
                    await self._stopping.wait()
            changed = self.changed(token_file())
            if "config" in changed:
                await self.reload()
            if "token" in changed:
                token_changed()

    async def reload(self) -> None:
        """Read the configuration again and apply the keys that can change at run time.

        A file with faults changes nothing.

        The file is read in a thread, because parsing a large one takes a second. A request during the reading is served
        by the same reading, unless the file has changed since it began.
        """
        if self._reloading:
            return
        self._reloading = True
        try:
            changed = True
            while changed and not self._stopping.is_set():
                self._requested = False
                self._files.changed({"config": self._path})
                await self._read()
                changed = self._requested and bool(self._files.changed({"config": self._path}))
        finally:
            self._reloading = False

    async def _read(self) -> None:
        try:
            fresh = await asyncio.to_thread(self._load)
        except ConfigError as error:
            self._reject([str(fault) for fault in error.faults])
        except Exception as error:  # noqa: BLE001 - no file may stop a running shim
            self._reject([f"the configuration could not be read: {type(error).__name__}"])
        else:
            self._apply(fresh)
