"""The harness lives in real time: faults last, agents pace themselves, another process's state is looked at again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
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
