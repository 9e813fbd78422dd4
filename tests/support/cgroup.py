"""A memory cgroup of its own for a process, as a container runtime makes one for a container with a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class MemoryCgroup:
    """A cgroup with a limit; `entering` wraps a command so that its process is in it from the start."""

    def __init__(self, folder: Path, *, v1: bool) -> None:
        self._folder = folder
        self._v1 = v1

    def entering(self, *command: str) -> tuple[str, ...]:
        """Return the command that enters the cgroup and then becomes `command`."""
        return ("/bin/sh", "-c", ENTER, str(self._folder), *command)

    @property
    def peak_bytes(self) -> int:
        """Return the most that was in use, page cache included; 0 where the kernel does not tell."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        with suppress(OSError):
            return int((self._folder / name).read_text())
        return 0

    @property
    def kills(self) -> int:
        """Return how many processes the kernel has killed for exceeding the limit."""
        name = "memory.oom_control" if self._v1 else "memory.events"
        fields = dict(line.split() for line in (self._folder / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup | None]:
    """Make a cgroup with this limit, without swap; `None` where there is no controller or no right to."""
    v1 = (V1 / "cgroup.procs").exists()
    name = f"agent-shim-test-{os.getpid()}-{os.urandom(3).hex()}"
    own = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    parent = V1 if v1 else V2 / next((path for _, kind, path in own if not kind), "/").lstrip("/")
    folder = parent / name
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        limit = folder / ("memory.limit_in_bytes" if v1 else "memory.max")
        swap = folder / ("memory.memsw.limit_in_bytes" if v1 else "memory.swap.max")
        try:
            limit.write_text(str(limit_bytes))
        except OSError:
            yield None
            return
        with suppress(OSError):  # not every kernel counts swap
            swap.write_text(str(limit_bytes) if v1 else "0")
        yield MemoryCgroup(folder, v1=v1)
    finally:
        folder.rmdir()
