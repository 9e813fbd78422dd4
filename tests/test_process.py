"""Settings of the process: which errors of the event loop are logged as errors, and how its lag is measured."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from shim.clock import Clock
from shim.metrics import Metrics
from shim.ports import Timer
from shim.process import (
    IDLE_SAMPLE_S,
    NOTICEABLE_S,
    SAMPLE_S,
    SEARCH_BLOCK_S,
    SEARCH_S,
    SEARCH_SHARE,
    WORKING_SHARE,
    GarbageSearch,
    LoopLagMeter,
    report_loop_error,
)

# As uvloop reports it: tests.chaos.harness.replicas found it in the log of a replica whose peer was cut off.
GONE = "unable to perform operation on <TCPTransport closed=True reading=False 0x55ff03746ca0>; the handler is closed"


@pytest.mark.parametrize(
    "error, protocol, logged",
    [
        (RuntimeError(GONE), True, []),
        (RuntimeError(GONE), False, ["Fatal error on SSL protocol"]),
        (RuntimeError("a defect"), True, ["Fatal error on SSL protocol"]),
        (ValueError(GONE), True, ["Fatal error on SSL protocol"]),
    ],
)
async def test_a_tls_connection_that_is_gone_is_no_error(
    caplog: pytest.LogCaptureFixture, error: Exception, protocol: bool, logged: list[str]
) -> None:
    context = {"message": "Fatal error on SSL protocol", "exception": error}
    with caplog.at_level(logging.ERROR):
        report_loop_error(asyncio.get_running_loop(), context | ({"protocol": asyncio.Protocol()} if protocol else {}))
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == logged


class FakeLoop(Clock):
    """Timers and clock of a loop whose only timer fires as late as a test wants, after as much work."""

    def __init__(self) -> None:
        self.now_s = self.used_s = self.delay_s = 0.0
        self.callback: Callable[[], None]
        self.monotonic_s = lambda: self.now_s  # type: ignore[method-assign]
        self.cpu_s = lambda: self.used_s  # type: ignore[method-assign]

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        self.delay_s, self.callback = delay, callback
        return self

    def cancel(self) -> None: ...

    def until_tick_s(self, every_s: float) -> float:
        return every_s

    def fire(self, late_s: float = 0.0, work_s: float = 0.0) -> float:
        """Return the delay of the next timer."""
        self.now_s += self.delay_s + late_s
        self.used_s += work_s
        self.callback()
        return self.delay_s


def test_the_lag_of_a_loop_is_measured_often_while_it_works_and_rarely_while_it_does_not() -> None:
    loop, registry = FakeLoop(), CollectorRegistry()
    LoopLagMeter(loop, loop, Metrics(registry)).start()
    assert loop.delay_s == SAMPLE_S
    assert loop.fire() == IDLE_SAMPLE_S
    assert loop.fire() == IDLE_SAMPLE_S
    assert loop.fire(work_s=1.01 * WORKING_SHARE * IDLE_SAMPLE_S) == SAMPLE_S
    assert loop.fire(work_s=1.01 * WORKING_SHARE * SAMPLE_S) == SAMPLE_S
    assert loop.fire() == IDLE_SAMPLE_S
    assert loop.fire(late_s=2 * NOTICEABLE_S) == SAMPLE_S, "another thread or process kept the loop from working"
    assert loop.fire(late_s=0.5) == SAMPLE_S
    assert loop.fire() == IDLE_SAMPLE_S
    assert registry.get_sample_value("agent_shim_event_loop_lag_seconds_count") == 8
    assert registry.get_sample_value("agent_shim_event_loop_lag_max_seconds") == pytest.approx(0.5)


def test_the_search_for_garbage_is_rare_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, searched = FakeLoop(), []
    took_s = 0.0
    blocks = 1000

    def collect() -> None:
        searched.append(loop.now_s)
        loop.used_s += took_s

    monkeypatch.setattr(gc, "collect", collect)
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: blocks)
    GarbageSearch(loop, loop).start()
    assert (searched, loop.delay_s) == ([], SEARCH_S)

    # Few objects: each minute. A search that takes longer than expected is paid for by the wait for the next one.
    assert loop.fire() == SEARCH_S
    took_s = 2 * SEARCH_S * SEARCH_SHARE
    blocks += 1000
    assert loop.fire() == SEARCH_S
    assert loop.fire() == pytest.approx(SEARCH_S)
    loop.fire()
    assert searched == [SEARCH_S, 2 * SEARCH_S, 4 * SEARCH_S]


def test_the_first_search_for_garbage_waits_too_if_it_will_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand agents come in the first minute, and commands for them: a search would keep all of them waiting."""
    loop, searched, blocks = FakeLoop(), [], 1000
    monkeypatch.setattr(gc, "collect", lambda: searched.append(loop.now_s))
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: blocks)
    GarbageSearch(loop, loop).start()
    blocks += 4_000_000
    wait_s = 4_000_000 * SEARCH_BLOCK_S / SEARCH_SHARE
    assert loop.fire() == pytest.approx(wait_s - SEARCH_S)
    assert searched == []
    loop.fire()
    assert searched == [pytest.approx(wait_s)]
