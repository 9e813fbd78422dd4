"""A process that deletes directories, and ends the PostgreSQL servers in them, when its parent is gone.

A parent that is killed cannot do that itself: its servers would run on, and their files would fill `/tmp`. The process
reads the directories from its standard input, whose end shows that the parent has ended, however it did.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, cast

END_S = 10.0


def delete_afterwards(directory: Path) -> None:
    """Have a directory deleted after this process, with the servers whose data are in it. It may be gone by then."""
    pipe = _start(os.getpid())
    pipe.write(f"{directory}\n")
    pipe.flush()


@cache
def _start(parent: int) -> IO[str]:
    """Start the process of the given parent, which is this one: a fork has a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-I", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the parent
    )
    pipe = cast("IO[str]", process.stdin)

    def end() -> None:
        """Let the process do its work, and wait for it."""
        if os.getpid() == parent:
            pipe.close()
            process.wait()

    atexit.register(end)
    return pipe


def _server(pid_file: Path) -> list[int]:
    """Return the main process of a server and its children; nothing if it does not run."""
    with suppress(OSError, ValueError, IndexError):
        main = int(pid_file.read_text().split()[0])
        if Path(f"/proc/{main}/comm").read_text().strip() in ("postgres", "postmaster"):
            return [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]
    return []


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_server(pid_file: Path) -> None:
    """End a server, which may be paused, at once; kill it if it does not end."""
    if pids := _server(pid_file):
        _send(pids[:1], signal.SIGQUIT)  # without a checkpoint; it removes its shared memory
        _send(pids, signal.SIGCONT)
        until_s = time.monotonic() + END_S
        while _server(pid_file) and time.monotonic() < until_s:
            time.sleep(0.02)
        _send(_server(pid_file), signal.SIGKILL)


def main() -> None:
    """Read directories until the parent is gone, then delete those that are left."""
    for directory in [Path(line.rstrip("\n")) for line in sys.stdin]:
        for pid_file in directory.glob("*/postmaster.pid"):
            _end_server(pid_file)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
