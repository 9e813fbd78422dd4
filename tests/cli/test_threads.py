"""Work that a command does not wait for, with a call that never returns."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from shim.cli.threads import DaemonThreads, run, until_interrupted, within


def test_a_call_that_takes_too_long_is_left_alone() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        within(0.01, never.wait)
    never.set()


def test_results_and_errors_come_back() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def _ctrl_c_before(function: str) -> Callable[[FrameType, str, Any], None]:
    """A profiler that presses Ctrl-C before the first call of a function of C, so that the call does not happen."""

    def press(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == function:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    return press


@pytest.mark.parametrize("function", ["acquire", "_acquire_restore"])
def test_ctrl_c_ends_a_wait_at_any_moment(function: str) -> None:
    ended = []
    with until_interrupted():
        try:
            sys.setprofile(_ctrl_c_before(function))
            within(0.05, threading.Event().wait)
        except BaseException as error:
            ended.append(type(error))
            raise
        finally:
            sys.setprofile(None)
    assert ended == [RuntimeError if function == "_acquire_restore" else KeyboardInterrupt]


def test_what_ctrl_c_did_not_cause_is_raised() -> None:
    with pytest.raises(RuntimeError, match="another"), until_interrupted():
        raise RuntimeError("another")


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
