"""The demo's processes, started as a user starts them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_LOOK_S = 0.02
_TAIL_LINES = 12


class ChildFailed(Exception):
    """A process ended that should not have; the text names it and its exit code."""


class ChildProcess:
    """`agent-shim <args>` with a ready file and a log file in `folder`; it may be killed and started again.

    Another program is another class: its `_command`, and what `_ready` finds once it is there.
    """

    def __init__(self, name: str, folder: Path, stop_s: float = 6) -> None:
        """`stop_s` is how long a stop may take."""
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
        """Its addresses once it serves."""
        del pid
        if not self._ready_file.exists():
            return None
        found: dict[str, str] = json.loads(self._ready_file.read_text())
        return found

    async def start(self, args: Sequence[str]) -> dict[str, str]:
        """Start it and return its addresses, once it serves. Raises `ChildFailed` if it ends instead."""
        command = self._command(args)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for the demo, which stops its children in order.
            process = self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        while (ready := self._ready(process.pid)) is None:
            if process.returncode is not None:
                raise ChildFailed(f"the {self.name} {self.fate}")
            await asyncio.sleep(_LOOK_S)
        return ready

    @property
    def fate(self) -> str:
        """Whether it lives, in words."""
        if self._process is None:
            return "was never started"
        code = self._process.returncode
        return "is running" if code is None else f"ended with exit code {code}"

    async def kill(self) -> None:
        """`kill -9`."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop it as an orchestrator does: SIGTERM, and SIGKILL if it takes too long."""
        try:
            async with asyncio.timeout(self._stop_s):
                await self._end(signal.SIGTERM)
        except TimeoutError:
            await self._end(signal.SIGKILL)

    async def guard(self) -> None:
        """Wait for the end of the process that runs now. Raises `ChildFailed` if it was not killed or stopped by us."""
        process = self._process
        if process is not None:
            await process.wait()
            if process is not self._expected:
                raise ChildFailed(f"the {self.name} {self.fate}")

    def tail(self) -> list[str]:
        """The last lines of its log."""
        with suppress(OSError):
            return self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return []

    async def _end(self, number: signal.Signals) -> None:
        process = self._expected = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(number)
            await process.wait()


def _environment() -> dict[str, str]:
    """Ours without a user's shim configuration, and without a proxy before loopback."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHIM_")}
    return kept | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
