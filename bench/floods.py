"""`python -m bench.floods`: how long a heartbeat and `/healthz` take while others flood both ports.

The floods are those of tests/security/test_floods.py, each against a process of its own. 100 ms are the goal. Flood and
bystanders are two processes, so that the flood's own work is not measured. Both run on this machine: the figures mean
something only on one with cores to spare.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import ssl
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.security.test_floods import BY_TLS, FLOODS, Bystanders, Flood, by_tls, has_room, many_descriptors
from tests.support.processes import world

GOAL_MS = 100.0


def stand_by(url: str, admin: str, ca_file: str | None, room: bool, pipe: Connection) -> None:
    """Be the bystanders, in a process of its own, from its first message to the parent until the parent's answer."""

    async def watch() -> list[float]:
        context = None if ca_file is None else ssl.create_default_context(cafile=ca_file)
        others = Bystanders(url, admin, context, room=room)
        async with asyncio.TaskGroup() as group:
            group.create_task(others.watch())
            await others.begun.wait()
            pipe.send(None)
            await asyncio.to_thread(pipe.recv)
            others.over.set()
        return others.took_s

    pipe.send(asyncio.run(watch()))


async def measure(flood: Callable[[Flood], Awaitable[None]]) -> list[float]:
    """Return the milliseconds that each call of the bystanders took, in order of size."""
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        config, context = by_tls(Path(folder)) if flood in BY_TLS else ({}, None)
        ca_file = f"{folder}/ca.pem" if flood in BY_TLS else None
        async with many_descriptors(), world(Path(folder), config) as (shim, controller):
            await shim.start()
            it = Flood(shim, controller, context)
            pipe, theirs = spawning.Pipe()
            others = spawning.Process(target=stand_by, args=(shim.url, shim.admin, ca_file, has_room(flood), theirs))
            others.start()
            theirs.close()
            await asyncio.to_thread(pipe.recv)
            await flood(it)
            pipe.send(None)
            took_s: list[float] = await asyncio.to_thread(pipe.recv)
            others.join()
            it.close()
    return sorted(1000 * each for each in took_s)


def main(names: Sequence[str]) -> int:
    """Measure every flood, or those that are named; exit code 1 if the 99th percentile of one is above the goal."""
    above = 0
    print(f"{'flood':<44}{'calls':>7}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for flood in FLOODS:
        name = getattr(flood, "__name__", "")
        if names and name not in names:
            continue
        took_ms = asyncio.run(measure(flood))
        p99_ms = took_ms[min(len(took_ms) - 1, int(0.99 * len(took_ms)))]
        above += p99_ms > GOAL_MS
        middle_ms = statistics.median(took_ms)
        line = f"{len(took_ms):>7}{middle_ms:>9.1f}{p99_ms:>9.1f}{took_ms[-1]:>9.1f}"
        print(f"{name.replace('_', ' '):<44}{line}", flush=True)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
