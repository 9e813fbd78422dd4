"""Work that a command does not wait for, with a call that never returns."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from shim.cli.threads import DaemonThreads, run, within


def test_a_call_that_takes_too_long_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        within(0.01, never.wait)
    never.set()


def test_results_and_errors_come_back() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_a_cancelled_call_is_none() -> None:
    future = DaemonThreads().submit(threading.Event().wait, 0)
    assert future.result(60) is False


def test_a_coroutine_runs_as_with_asyncio() -> None:
    async def main() -> str:
        return "done"

    assert run(main()) == "done"


def test_neither_the_loop_nor_the_process_waits_for_a_call_that_never_returns() -> None:
    program = """
import asyncio, threading
from shim.cli.threads import run

async def main():
    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)

run(main())
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"
