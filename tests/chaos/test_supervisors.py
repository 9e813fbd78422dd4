"""What the keeper of the shim takes for a defect."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.harness import events as ev
from tests.chaos.harness.supervisors import STARVED_S, KeptShim, ShimKeeper

GIVES_UP = """
import json, signal, sys
print(json.dumps({"event": "serving", "listen": "127.0.0.1:1", "admin": "127.0.0.1:2"}), flush=True)
signal.sigwait({signal.SIGTERM})
print(json.dumps({"event": "stop_failed", "level": "error", "error": "TimeoutError"}), flush=True)
"""


async def stopped(folder: Path, waited_s: Sequence[float]) -> list[ev.AnyEvent]:
    """Stop a process that gives up a step; what was noted. `waited_s` is what it waited for a processor by then."""
    noted: list[ev.AnyEvent] = []
    told = iter(waited_s)
    blocks_sigterm = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})\n{GIVES_UP}"
    shim = KeptShim(folder, {})
    keeper = ShimKeeper(
        shim, folder / "c", noted.append, (sys.executable, "-c", blocks_sigterm), lambda pid: next(told)
    )
    running = asyncio.create_task(keeper.run())
    try:
        async with asyncio.timeout(60):
            await keeper.stop()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await shim.__aexit__(None, None, None)
    return noted


@pytest.mark.parametrize("starved_s, defects", [(0.0, 1), (STARVED_S + 0.1, 0)])
async def test_a_step_of_a_stop_that_is_given_up_is_a_defect_unless_the_machine_took_the_time(
    tmp_path: Path, starved_s: float, defects: int
) -> None:
    noted = await stopped(tmp_path, [7.0, 7.0 + starved_s])
    assert [event for event in noted if isinstance(event, ev.Stopped)]
    assert len([event for event in noted if isinstance(event, ev.Defect)]) == defects
