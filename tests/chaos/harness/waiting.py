"""The harness lives in real time: faults last, agents pace themselves, another process's state is looked at again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.02


async def last(seconds: float) -> None:
    """Let real time pass."""
    await asyncio.sleep(max(0.0, seconds))


async def true_within(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether something outside this process, which can tell nobody, becomes true in time."""
    until = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < until:
        await last(LOOK_S)
    return found


def waited_for_cpu_s(pid: int) -> float:
    """Seconds that the process's main thread was ready to run and had no processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


class Starved:
    """For how long some processes, of which any may end, had no processor since this was made."""

    def __init__(self, *pids: int) -> None:
        self._since_s = {pid: waited_for_cpu_s(pid) for pid in pids}
        self._for_s = dict.fromkeys(pids, 0.0)

    @property
    def for_s(self) -> float:
        """Seconds, those of all processes together."""
        self._look()
        return sum(self._for_s.values())

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self._look()
            await last(LOOK_S)

    def _look(self) -> None:
        for pid, since_s in self._since_s.items():
            with suppress(OSError):  # it is gone: what was seen last holds
                self._for_s[pid] = waited_for_cpu_s(pid) - since_s
