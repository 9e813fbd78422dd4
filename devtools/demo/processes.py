"""The demo's child processes, started as a user starts them."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

_LOOK_S = 0.02
_TAIL_LINES = 12
# From the last byte of a process that was killed to the news of its end in this process, on a busy machine.
_NEWS_S = 2
_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child process ended unexpectedly; the text contains its name and exit code."""


class ChildProcess:
    """`agent-shim <args>` with a ready file and a log file in `folder`; it may be killed and started again.

    A subclass runs another program: it overrides `_command`, `_options`, and `_ready` for its addresses.
    """

    _stop_signal = signal.SIGTERM

    def __init__(self, name: str, folder: Path, stop_s: float = 6) -> None:
        """Prepare a child process; `stop_s` limits the duration of a stop."""
        self.name = name
        self._stop_s = stop_s
        self._expected: asyncio.subprocess.Process | None = None
        self.log = folder / f"{name}.log"
        self._ready_file = folder / f"{name}.ready.json"
        self._process: asyncio.subprocess.Process | None = None

    def _command(self, args: Sequence[str]) -> Sequence[str]:
        self._ready_file.unlink(missing_ok=True)
        return (sys.executable, "-m", "shim", *args, "--ready-file", str(self._ready_file))

    def _ready(self, pid: int) -> dict[str, str] | None:
        """Return the addresses of the process once it serves, or None."""
        del pid
        if not self._ready_file.exists():
            return None
        found: dict[str, str] = json.loads(self._ready_file.read_text())
        return found

    def _options(self) -> dict[str, Any]:
        """Return how the process is created: directory and user."""
        return {}

    async def start(self, args: Sequence[str]) -> dict[str, str]:
        """Start the process and return its addresses once it serves. Raises `ChildFailed` if it ends instead."""
        command = self._command(args)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches only the demo, which stops its children in order.
            process = self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_ends_with_us(self._stop_signal),
                **self._options(),
            )
        while (ready := self._ready(process.pid)) is None:
            if process.returncode is not None:
                raise ChildFailed(f"the {self.name} {self.fate}")
            await asyncio.sleep(_LOOK_S)
        return ready

    @property
    def fate(self) -> str:
        """Describe if the process runs or how it ended."""
        if self._process is None:
            return "was never started"
        code = self._process.returncode
        return "is running" if code is None else f"ended with exit code {code}"

    async def kill(self) -> None:
        """Kill the process with `kill -9`."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop the process as an orchestrator does: its stop signal, then SIGKILL after the time limit."""
        try:
            async with asyncio.timeout(self._stop_s):
                await self._end(self._stop_signal)
        except TimeoutError:
            await self._end(signal.SIGKILL)

    async def guard(self) -> None:
        """Wait for the end of the process. Raises `ChildFailed` unless this object killed or stopped it."""
        process = self._process
        if process is not None:
            await process.wait()
            if process is not self._expected:
                raise ChildFailed(f"the {self.name} {self.fate}")

    async def died(self) -> bool:
        """Return True if the process has ended, or ends within moments, and not by `kill` or `stop`."""
        process = self._process
        if process is None or process is self._expected:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(_NEWS_S):
                await process.wait()
        return process.returncode is not None

    def tail(self) -> list[str]:
        """Return the last lines of the log."""
        with suppress(OSError):
            return self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return []

    async def _end(self, number: signal.Signals) -> None:
        process = self._expected = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
            await process.wait()


def _ends_with_us(number: signal.Signals) -> Callable[[], None] | None:
    """Return what a new child calls so that it gets a signal when this process ends, also by `kill -9`.

    Returns None where the system has no such request; there only an orderly end stops the children.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    return None if prctl is None else partial(_request_signal, prctl, number, os.getpid())


def _request_signal(prctl: Callable[[int, int], int], number: int, parent: int) -> None:
    prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent has ended before the request
        os._exit(1)


def _environment() -> dict[str, str]:
    """Return this process's environment without a shim configuration of the user and without proxies for loopback."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHIM_")}
    return kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
