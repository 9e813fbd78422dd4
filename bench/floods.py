"""`python -m bench.floods`: how long a heartbeat and `/healthz` take while others flood both ports.

The floods are those of tests/security/test_floods.py, each against a process of its own. 100 ms are the goal. Flood and
bystanders are two processes, so that the flood's own work is not measured. They and the shim share the machine's cores:
the time in which the shim or the bystanders were ready to run and had none is not counted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from tests.chaos.harness.waiting import waited_for_cpu_s
from tests.security.test_floods import (
    BY_TLS,
    FLOODS,
    NEW_CONNECTION,
    Bystanders,
    Flood,
    by_tls,
    has_room,
    many_descriptors,
)
from tests.support.processes import world

GOAL_MS = 100.0


def running_s(*pids: int) -> float:
    """Return the time in seconds, without that in which one of the processes waited for a core."""
    return time.monotonic() - sum(waited_for_cpu_s(pid) for pid in pids)


def stand_by(shim: tuple[int, str, str], ca_file: str | None, room: bool, pipe: Connection) -> None:
    """Be the bystanders, in a process of its own, from its first message to the parent until the parent's answer."""

    async def watch() -> list[tuple[str, float]]:
        context = None if ca_file is None else ssl.create_default_context(cafile=ca_file)
        pid, url, admin = shim
        others = Bystanders(url, admin, context, room=room, clock=partial(running_s, pid, os.getpid()))
        async with asyncio.TaskGroup() as group:
            group.create_task(others.watch())
            await others.begun.wait()
            pipe.send(None)
            await asyncio.to_thread(pipe.recv)
            others.over.set()
        return others.took_s

    pipe.send(asyncio.run(watch()))


async def measure(flood: Callable[[Flood], Awaitable[None]]) -> list[tuple[str, float]]:
    """Return what the bystanders called, and the seconds that each call took."""
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        config, context = by_tls(Path(folder)) if flood in BY_TLS else ({}, None)
        ca_file = f"{folder}/ca.pem" if flood in BY_TLS else None
        async with many_descriptors(), world(Path(folder), config) as (shim, controller):
            await shim.start()
            it = Flood(shim, controller, context)
            pipe, theirs = spawning.Pipe()
            of_shim = shim.pid, shim.url, shim.admin
            others = spawning.Process(target=stand_by, args=(of_shim, ca_file, has_room(flood), theirs))
            others.start()
            theirs.close()
            await asyncio.to_thread(pipe.recv)
            await flood(it)
            pipe.send(None)
            took_s: list[tuple[str, float]] = await asyncio.to_thread(pipe.recv)
            others.join()
            it.close()
    return took_s


def main(names: Sequence[str]) -> int:
    """Measure every flood, or those that are named; exit code 1 if the 99th percentile of one is above the goal.

    The goal is not for new connections: the kernel lets them wait behind those of the flood.
    """
    above = 0
    print(f"{'flood':<36}{'calls':>7}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'new connections, max ms':>25}")
    for flood in FLOODS:
        name = getattr(flood, "__name__", "")
        if names and name not in names:
            continue
        took_s = asyncio.run(measure(flood))
        took_ms = sorted(1000 * seconds for what, seconds in took_s if what != NEW_CONNECTION)
        new_ms = max((1000 * seconds for what, seconds in took_s if what == NEW_CONNECTION), default=0.0)
        p99_ms = took_ms[min(len(took_ms) - 1, int(0.99 * len(took_ms)))]
        above += p99_ms > GOAL_MS
        middle_ms = statistics.median(took_ms)
        line = f"{len(took_ms):>7}{middle_ms:>9.1f}{p99_ms:>9.1f}{took_ms[-1]:>9.1f}{new_ms:>25.1f}"
        print(f"{name.replace('_', ' '):<36}{line}", flush=True)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
