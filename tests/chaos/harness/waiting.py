"""The harness lives in real time: faults last, agents pace themselves, another process's state is looked at again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.harness import events as ev

LOOK_S = 0.02
LATE_S = 0.005


async def last(seconds: float) -> None:
    """Let real time pass."""
    await asyncio.sleep(max(0.0, seconds))


async def true_within(seconds: float, true: Callable[[], bool]) -> bool:
    """Wait until something outside this process is true, and return False if it is not in time."""
    until = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < until:
        await last(LOOK_S)
    return found


async def watch_oneself(note: Callable[[ev.AnyEvent], None]) -> None:
    """Note how late this process is, as every process is on a busy machine."""
    while True:
        due = time.monotonic() + LOOK_S
        await last(LOOK_S)
        late_s = time.monotonic() - due
        if late_s > LATE_S:
            note(ev.Late(time.monotonic(), late_s))


def waited_for_cpu_s(pid: int) -> float:
    """Seconds that the process's main thread was ready to run and had no processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
