"""A limit of memory for a process, as a container has one: a control group of its own (cgroup v1 or v2)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
REMOVED_WITHIN_S = 2.0


class MemoryGroup:
    """A control group. A process that `inside` starts belongs to it and pays for all memory that it touches."""

    def __init__(self, path: Path) -> None:
        first_version = path.parent == _V1
        self._path = path
        self._limit = path / ("memory.limit_in_bytes" if first_version else "memory.max")
        self._used = path / ("memory.usage_in_bytes" if first_version else "memory.current")
        self.inside = ("sh", "-c", f'echo $$ > {path}/cgroup.procs && exec "$@"', "sh")

    def used_bytes(self) -> int:
        """Return the memory that the group has now."""
        return int(self._used.read_text())

    def limit(self, limit_bytes: int) -> bool:
        """Let the kernel kill the group's process when it needs more. Returns False if it already has more."""
        try:
            self._limit.write_text(str(limit_bytes))
        except OSError:  # cgroup v1 refuses a limit below what is used
            return False
        return True


def permitted() -> str:
    """Return the reason why memory cannot be limited on this machine, empty if it can."""
    try:
        with group():
            return ""
    except OSError as error:
        return f"memory control groups are not permitted here ({error.strerror})"


@contextmanager
def group() -> Iterator[MemoryGroup]:
    """Make a group, and remove it when its processes are gone. Raises `OSError` where that is not permitted."""
    path = (_V1 if _V1.is_dir() else _V2) / f"agent-shim-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    made = MemoryGroup(path)
    try:
        made.used_bytes()  # cgroup v2 without the memory controller has no such file
        yield made
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a group. The kernel takes a moment after its last process has ended."""
    until = time.monotonic() + REMOVED_WITHIN_S
    while path.exists() and time.monotonic() < until:
        with suppress(OSError):
            path.rmdir()
            return
        time.sleep(0.01)
