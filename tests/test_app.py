"""Start and stop of one shim: one list, which is undone in reverse, also if a start fails halfway."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Iterator
from contextlib import closing
from typing import Any

import aiohttp
import pytest

from shim import app
from shim.config import loader
from shim.config.settings import Settings
from shim.core.records import StoreContents
from shim.log import Logs, setup
from shim.ports import CommandStore
from shim.store import CallThreadsafe
from tests.support.memory_store import MemoryStore

PATIENCE_S = 30.0


def configured(*more: str) -> Settings:
    base = ("upstream.url=http://127.0.0.1:9", "upstream.token=t", "listen.port=0", "admin.port=0", "log.level=error")
    return loader.load(None, {}, [*base, *more])


class Recorded(MemoryStore):
    """A store that records its own life."""

    def __init__(self, post: CallThreadsafe, steps: list[str]) -> None:
        super().__init__(post)
        self._steps = steps

    def open(self) -> StoreContents:
        self._steps.append("open")
        return super().open()

    def close(self) -> None:
        self._steps.append("close")
        super().close()


class RecordedApp(app.App):
    """A shim whose store records its own life."""

    def __init__(self, settings: Settings, logs: Logs) -> None:
        super().__init__(settings, lambda: settings, logs)
        self.steps: list[str] = []

    def make_store(self, post: CallThreadsafe) -> CommandStore:
        return Recorded(post, self.steps)


@pytest.fixture
def logs() -> Iterator[Logs]:
    with closing(setup("error", "json")) as logs:
        yield logs


async def ended(running: asyncio.Task[int]) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await running


async def started(shim: RecordedApp) -> asyncio.Task[int]:
    running = asyncio.create_task(shim.run())
    async with asyncio.timeout(PATIENCE_S):
        await shim.ready.wait()
    return running


async def test_two_shims_run_in_one_process_and_stop_by_themselves(logs: Logs) -> None:
    one, two = RecordedApp(configured(), logs), RecordedApp(configured(), logs)
    running = [await started(one), await started(two)]
    assert len({*one.addresses.values(), *two.addresses.values()}) == 4
    one.stop_requested.set()
    assert await ended(running[0]) == app.EXIT_OK
    assert not running[1].done()
    two.stop_requested.set()
    assert await ended(running[1]) == app.EXIT_OK
    assert one.steps == two.steps == ["open", "close"]


@pytest.mark.parametrize("section", ["listen", "admin"])
async def test_a_port_that_is_taken_ends_the_start_before_the_store_is_opened(section: str, logs: Logs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        shim = RecordedApp(configured(f"{section}.port={taken.getsockname()[1]}"), logs)
        assert await ended(asyncio.create_task(shim.run())) == app.EXIT_INTERNAL
    assert "open" not in shim.steps, "another shim may use this store"
    assert not shim.ready.is_set()


async def test_a_defect_with_one_connection_ends_that_alone_and_one_of_a_service_ends_the_process(logs: Logs) -> None:
    async def defect() -> None:
        raise RuntimeError("a defect")

    shim = RecordedApp(configured(), logs)
    running = await started(shim)
    task = shim.spawn_isolated("connection 7", defect())
    assert task is not None
    await asyncio.wait([task], timeout=PATIENCE_S)
    assert task.exception() is None
    async with (
        asyncio.timeout(PATIENCE_S),
        aiohttp.ClientSession() as session,
        session.get(f"http://{shim.addresses['admin']}/metrics") as response,
    ):
        counted = await response.text()
    assert 'agent_shim_internal_errors_total{part="connection"} 1.0' in counted
    assert not running.done()
    shim.spawn("service", defect())
    assert await ended(running) == app.EXIT_INTERNAL


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_serves_one_connection_is_never_left_unfinished(cancelled: bool, logs: Logs) -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    shim = RecordedApp(configured(), logs)
    running = await started(shim)
    task = shim.spawn_isolated("connection", waits())
    assert task is not None
    if cancelled:
        task.cancel()  # before its first step: a coroutine that was never awaited would be a warning
    shim.stop_requested.set()
    assert shim.spawn_isolated("late", waits()) is None
    assert await ended(running) == app.EXIT_OK
    assert task.cancelled()


async def test_during_a_stop_no_task_is_started(logs: Logs) -> None:
    ran: list[str] = []

    async def task() -> None:
        ran.append("ran")

    shim = RecordedApp(configured(), logs)
    running = await started(shim)
    shim.stop_requested.set()
    coroutine: Coroutine[Any, Any, None] = task()
    assert shim.spawn("late", coroutine) is None
    assert await ended(running) == app.EXIT_OK
    assert ran == []
