"""An event loop whose clock jumps to the next timer as soon as nothing is ready: hours of protocol in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shim.ports import Timer

T = TypeVar("T")

START_S = 1000.0
WALL_AT_START_S = 1_795_555_683.0  # 2026-11-24T21:28:03Z
MAX_JUMPS = 1_000_000
OUTSIDE_S = 60.0


class Hang(BaseException):
    """Raised if no event is left, or far too many have happened: the test waits for something that never comes."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until the next timer, puts the loop's clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S
        self.jumps = 0
        self.outside: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if self.outside():
            # A thread is at work for the test; what it does takes no virtual time.
            found = super().select(OUTSIDE_S)
            if not found:
                raise Hang(f"work outside the loop took more than {OUTSIDE_S} s")
            return found
        if timeout is None:
            raise Hang("no timer, no callback: nothing will ever happen")
        self.jumps += 1
        if self.jumps > MAX_JUMPS:
            raise Hang(f"{MAX_JUMPS} timers fired")
        self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector event loop in virtual time; `outside` tells whether a thread is at work that will wake the loop."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-6  # a jump may miss its timer by a rounding error

    def time(self) -> float:
        return self._jumping.now_s

    @property
    def jumps(self) -> int:
        """Return how often the loop has waited for a timer."""
        return self._jumping.jumps

    @property
    def outside(self) -> Callable[[], bool]:
        return self._jumping.outside

    @outside.setter
    def outside(self, busy: Callable[[], bool]) -> None:
        self._jumping.outside = busy


class FakeClock:
    """A clock that the test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def monotonic_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return self.now

    def until_tick_s(self, every_s: float) -> float:
        return every_s


class VirtualClock:
    """A `ports.Clock` on a loop's time. `wall_offset_s` steps the wall clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wall_offset_s = 0.0

    def monotonic_s(self) -> float:
        return self._loop.time()

    def until_tick_s(self, every_s: float) -> float:
        left_s = every_s - (self._loop.time() - START_S) % every_s
        return left_s if left_s > every_s / 2 else left_s + every_s

    def cpu_s(self) -> float:
        """Return 0: the machine's work takes no virtual time."""
        return 0.0

    def wall_s(self) -> float:
        return WALL_AT_START_S + self.wall_offset_s + self._loop.time() - START_S


def run_virtual(coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a virtual loop of its own, as `asyncio.run` does."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coro)


class FakeTimers:
    """Timers that the test fires."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        self.calls.append((delay, callback))
        return self

    def cancel(self) -> None:
        self.calls.clear()
