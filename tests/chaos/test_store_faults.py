"""The real shim on a disk that is full, locked, read-only, cut off, corrupt or of the future.

Rules: docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from devtools.agents import (
    AgentProfile,
    Callbacks,
    CallOutcome,
    Command,
    Event,
    EventKind,
    Identity,
    LegacyAgent,
    Result,
)
from devtools.controller.client import ControlError
from shim.clock import Clock
from tests.chaos.harness.faults import damage
from tests.chaos.harness.waiting import last
from tests.support import disks
from tests.support.processes import TOKEN, Controller, Shim, free_port, world

FAST: dict[str, Any] = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": "off"}}
NAME = "agent-shim.db"
DEADLINE_S = 30.0
ROOM_BYTES, LARGE_BYTES = 32_768, 60_000
VERSION_EXIT, FAULT_EXIT = 78, 70


class Hands:
    """An agent that a test moves by hand, and what it got."""

    def __init__(self, shim: Shim) -> None:
        self.events: list[Event] = []
        self.output = ""
        who = Identity(agent_id="pod-1", cluster_name="prod", token=TOKEN)
        callbacks = Callbacks(event=self.events.append, execute=self._execute)
        self.agent = LegacyAgent(shim.url, who, AgentProfile(), Clock(), callbacks)

    async def _execute(self, command: Command) -> Result:
        return Result(output=self.output or f"done {command.id}")

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def commands(self) -> list[str]:
        return [
            event.command.id for event in self.events if event.what is EventKind.COMMAND and event.command is not None
        ]


@asynccontextmanager
async def living(folder: Path) -> AsyncIterator[tuple[Shim, Controller, Hands]]:
    """A shim with its database in `folder/store`, on a port that stays when it is started again."""
    store = {"path": str(folder / "store" / NAME)}
    async with world(folder, {**FAST, "store": store, "listen": {"port": free_port()}}) as (shim, controller):
        await shim.start()
        hands = Hands(shim)
        try:
            assert await hands.agent.register()
            assert await hands.agent.heartbeat()
            yield shim, controller, hands
        finally:
            hands.agent.close()
            await last(0)


async def push(controller: Controller, hands: Hands, command_id: str, **more: Any) -> None:
    """Push a command as soon as a connection of the controller's speaks for the agent."""
    spec = {"id": command_id, "type": "work", "cluster_id": hands.agent.cluster_id, **more}
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(ControlError):
                await controller.api.push(spec)
                return
            await last(0.1)


async def result(controller: Controller, command_id: str) -> dict[str, Any]:
    path = f"/control/commands/{command_id}?wait=result&timeout_s={DEADLINE_S}"
    found = await controller.control("GET", path)
    payload: dict[str, Any] = found["results"][0]["payload"]
    return payload


async def admin(shim: Shim, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(shim.admin + path) as response:
        return response.status, await response.text()


async def metric(shim: Shim, name: str) -> float:
    """The sum over all labels."""
    _, text = await admin(shim, "/metrics")
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((name + " ", name + "{"))
    )


async def ready(shim: Shim) -> bool:
    return (await admin(shim, "/readyz"))[0] == 200


async def until_ready(shim: Shim, wanted: bool) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await ready(shim) is not wanted:
            await last(0.2)


# --- trouble that passes ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the test's own, where the shim has its store."""
    store = tmp_path / "store"
    store.mkdir()
    with disks.mounted(store, 16) as permitted:
        if not permitted:
            pytest.skip("a file system of its own is not permitted here")
        yield store


async def test_a_full_disk_refuses_commands_and_stops_nothing_else(tmp_path: Path, small_disk: Path) -> None:
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "before")
        await shim.event("command_queued", command="before")
        disks.fill(small_disk / "filler")

        await push(controller, hands, "refused")
        assert (await result(controller, "refused"))["code"] == "store_unavailable"
        assert await hands.agent.heartbeat()
        assert await hands.agent.poll() is not None  # what was queued goes out from memory
        assert hands.commands == ["before"]
        assert (hands.last.what, hands.last.status) == (EventKind.RESULT, 503)  # never a 2xx for what is not stored
        await until_ready(shim, False)

        (small_disk / "filler").unlink()
        await until_ready(shim, True)
        await push(controller, hands, "after")
        await shim.event("command_queued", command="after")
        assert await hands.agent.poll() is not None
        assert (await result(controller, "after"))["output"] == "done after"
        assert hands.commands == ["before", "after"]
        assert await shim.stop() == 0


@pytest.mark.parametrize("refused", ["command", "result"])
async def test_a_disk_with_room_for_small_writes_only_is_told_until_larger_ones_fit(
    tmp_path: Path, small_disk: Path, refused: str
) -> None:
    """What readiness writes is small: it fits long after a command of normal size does not."""
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "before")
        await shim.event("command_queued", command="before")
        filler = small_disk / "filler"
        disks.fill(filler)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - ROOM_BYTES)

        if refused == "command":
            await push(controller, hands, "refused", payload={"text": "x" * LARGE_BYTES})
            assert (await result(controller, "refused"))["code"] == "store_unavailable"
        else:
            hands.output = "x" * LARGE_BYTES
            assert await hands.agent.poll() is not None
            assert (hands.last.what, hands.last.status) == (EventKind.RESULT, 503)
        for _ in range(2):  # what is written for the first answer leaves no less room than there was
            assert await ready(shim) is False
        status = json.loads((await admin(shim, "/status.json"))[1])
        assert "store_unwritable" in {problem["code"] for problem in status["overall"]["problems"]}

        filler.unlink()
        await until_ready(shim, True)
        await push(controller, hands, "after", payload={"text": "x" * LARGE_BYTES})
        await shim.event("command_queued", command="after")
        assert await shim.stop() == 0


async def test_another_process_that_locks_the_database_delays_and_refuses_and_is_survived(tmp_path: Path) -> None:
    async with living(tmp_path) as (shim, controller, hands):
        with closing(sqlite3.connect(tmp_path / "store" / NAME, timeout=20, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await push(controller, hands, "refused")
            assert await hands.agent.heartbeat()  # not kept waiting by the disk
            assert await hands.agent.poll() == []
            assert (await result(controller, "refused"))["code"] == "store_unavailable"
            await until_ready(shim, False)
            other.execute("ROLLBACK")
        await until_ready(shim, True)
        await push(controller, hands, "after")
        await shim.event("command_queued", command="after")
        assert [command.id for command in await hands.agent.poll() or []] == ["after"]
        assert await shim.stop() == 0


# --- databases that cannot be used ------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "store").glob(f"{NAME}*")}


@pytest.mark.parametrize("kind, roll", [("corrupted", 1), ("truncated", 3)])
async def test_a_destroyed_database_is_moved_aside_loudly_and_agents_are_adopted_again(
    tmp_path: Path, kind: str, roll: int
) -> None:
    database = tmp_path / "store" / NAME
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "gone")
        await shim.event("command_queued", command="gone")
        await shim.kill()
        damage(database, kind, random.Random(roll))

        after = len(shim.lines)
        await shim.start()
        said = await shim.event("store_moved_aside", after)
        assert said["level"] == "error"
        assert Path(said["path"]).name in digest(tmp_path)
        assert await metric(shim, "agent_shim_store_moved_aside_total") == 1
        assert await metric(shim, 'agent_shim_health_problem{problem="store_replaced"}') == 1
        assert await ready(shim)
        assert await hands.agent.heartbeat()  # it holds its cluster id and never registers again
        assert await shim.event("session_adopted", after, session=hands.agent.cluster_id)
        await push(controller, hands, "new")
        await shim.event("command_queued", after, command="new")
        assert [command.id for command in await hands.agent.poll() or []] == ["new"]
        assert (await result(controller, "new"))["success"] is True
        assert await shim.stop() == 0


async def test_an_emptied_database_beside_its_log_is_no_new_one(tmp_path: Path) -> None:
    """SQLite would delete the log of an empty file, and everything that was accepted with it."""
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "gone")
        await shim.event("command_queued", command="gone")
        await shim.kill()
        os.truncate(tmp_path / "store" / NAME, 0)
        assert (tmp_path / "store" / f"{NAME}-wal").stat().st_size > 0
        after = len(shim.lines)
        await shim.start()
        assert (await shim.event("store_moved_aside", after))["level"] == "error"
        assert await shim.stop() == 0


async def test_the_database_of_a_newer_shim_is_left_alone_and_said_so_with_78(tmp_path: Path) -> None:
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "kept")
        await shim.event("command_queued", command="kept")
        assert await shim.stop() == 0
        with closing(sqlite3.connect(tmp_path / "store" / NAME)) as database:
            database.execute("UPDATE meta SET value = 999 WHERE key = 'min_reader_version'")
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = digest(tmp_path)
        await shim.launch()
        assert await shim.wait() == VERSION_EXIT
        assert digest(tmp_path) == before
        assert await shim.event("store_version") is not None


async def test_a_read_only_database_ends_the_start_and_says_why(tmp_path: Path, small_disk: Path) -> None:
    async with living(tmp_path) as (shim, controller, hands):
        await push(controller, hands, "kept")
        await shim.event("command_queued", command="kept")
        assert await shim.stop() == 0
        with disks.read_only(small_disk):
            after = len(shim.lines)
            await shim.launch()
            assert await shim.wait() == FAULT_EXIT
            said = await shim.event("stopped_by_fault", after)
            assert "store" in said["error"] or "database" in said["error"]
        await shim.start()
        assert [command.id for command in await hands.agent.poll() or []] == ["kept"]
        assert await shim.stop() == 0
        assert hands.last.outcome is CallOutcome.OK


async def test_a_database_that_breaks_while_it_is_used_ends_the_process_and_the_next_starts_anew(
    tmp_path: Path,
) -> None:
    async with living(tmp_path) as (shim, controller, hands):
        database = tmp_path / "store" / NAME
        with closing(sqlite3.connect(database)) as other:  # makes the shim look at the file again
            other.execute("INSERT INTO meta (key, value) VALUES ('note', 'from outside')")
            other.commit()
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            with database.open("r+b") as file:
                for offset in range(4096, database.stat().st_size, 4096):
                    file.seek(offset)
                    file.write(bytes(64))
            # whether the controller is still told `store_unavailable` depends on which end comes first
            await push(controller, hands, "refused")
            assert await shim.wait() == FAULT_EXIT
        assert "SQLITE_CORRUPT" in (await shim.event("stopped_by_fault"))["error"]
        after = len(shim.lines)
        await shim.start()
        assert await shim.event("store_moved_aside", after)
        assert await hands.agent.heartbeat()
        assert await shim.stop() == 0
