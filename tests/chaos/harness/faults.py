"""Effects of the faults of the schedule. Each fault ends what it began, also when it is cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.harness import events as ev
from tests.chaos.harness.agents import Part
from tests.chaos.harness.schedule import CRASH_POINTS, Planned
from tests.chaos.harness.supervisors import EXIT_STORE_VERSION, ControllerKeeper, Note, ShimKeeper
from tests.chaos.harness.waiting import last, true_within
from tests.support import memory
from tests.support.disks import fill, read_only
from tests.support.name_server import NameServer
from tests.support.network import TwoHosts

RETRY_AFTER_S = 2
MAX_CRASH_COUNT = 4
OVERSIZE_BYTES = 2_000_000
FILLER = "filler"
FUTURE = 999
ROOM_BYTES = 4 << 20
REMOUNT_S = 10.0
RECONNECT_BEFORE_S = 6.0


@dataclass(slots=True)
class Stage:
    """Everything that faults can be done to. `clock_file` says by how much a doubtful shim's clock is wrong."""

    shim: ShimKeeper
    controller: ControllerKeeper
    parts: list[Part]
    database: Path
    pace: float
    note: Note
    clock_file: Path
    network: TwoHosts | None = None
    names: NameServer | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def fault(self, name: str, detail: str = "") -> Iterator[None]:
        """Note when it begins and ends."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.note(ev.Fault(time.monotonic(), name, begins=True, detail=detail))
        try:
            yield
        finally:
            self.note(ev.Fault(time.monotonic(), name, begins=False))

    def set_clock(self, step_s: float) -> None:
        """Let the shim's wall clock be wrong by this."""
        temporary = self.clock_file.with_suffix(".new")
        temporary.write_text(f"{step_s:+.0f}\n")
        temporary.replace(self.clock_file)
        self.note(ev.WallClock(time.monotonic(), time.time() - time.monotonic() + step_s))


Injury = Callable[[Stage, Planned], Awaitable[None]]


# --- the controller ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _controller_fault(stage: Stage, **fault: Any) -> AsyncIterator[None]:
    """A fault of the development controller while the block lasts. It dies with the controller, too."""
    answer = await stage.controller.control("POST", "/control/faults", fault)
    try:
        yield
    finally:
        for ident in (answer or {}).get("ids", []):
            await asyncio.shield(stage.controller.control("DELETE", f"/control/faults/{ident}"))


def _drops(how: str = "close") -> dict[str, Any]:
    return {"kind": "drop", "how": how}


def _controller(*, dropping: str = "", **fault: Any) -> Injury:
    """A fault of the controller's for as long as planned; with `dropping` it ends the connections first."""

    async def injure(stage: Stage, planned: Planned) -> None:
        with stage.fault(planned.kind):
            async with _controller_fault(stage, **fault):
                if dropping:
                    await stage.controller.control("POST", "/control/faults", _drops(dropping))
                await last(planned.lasts_s)

    return injure


def _drop(how: str) -> Injury:
    async def injure(stage: Stage, planned: Planned) -> None:
        with stage.fault(planned.kind):
            await stage.controller.control("POST", "/control/faults", _drops(how))
        await last(planned.lasts_s)

    return injure


def _controller_dies(number: signal.Signals, *, forgets: bool = False) -> Injury:
    async def injure(stage: Stage, planned: Planned) -> None:
        with stage.fault(planned.kind):
            await stage.controller.end(number)
            try:
                if forgets:
                    stage.controller.state.unlink(missing_ok=True)
                await last(planned.lasts_s)
            finally:
                await asyncio.shield(stage.controller.start())

    return injure


# --- the network ------------------------------------------------------------------------------------------------------


async def _network(stage: Stage, planned: Planned) -> None:
    assert stage.network is not None
    port, roll = stage.controller.port, planned.roll
    ways = {
        "cut": lambda hosts: hosts.cut(port),
        "reset": lambda hosts: hosts.reset(port),
        "loss": lambda hosts: hosts.loss(port, 0.05 + 0.2 * roll),
        "latency": lambda hosts: hosts.latency(port, 20 + 200 * roll),
        "narrow": lambda hosts: hosts.narrow(int(64 + 200 * roll)),
    }
    with stage.fault(planned.kind), ways[planned.kind](stage.network):
        await last(planned.lasts_s)


async def _dns_hangs(stage: Stage, planned: Planned) -> None:
    """The name server answers nothing, and the connection is reset: a lookup is what the next one begins with."""
    assert stage.names is not None
    with stage.fault(planned.kind):
        stage.names.hangs = True
        try:
            await stage.controller.control("POST", "/control/faults", _drops("rst"))
            await last(planned.lasts_s)
        finally:
            stage.names.hangs = False


# --- the shim ---------------------------------------------------------------------------------------------------------


async def _kill(stage: Stage, planned: Planned) -> None:
    with stage.fault(planned.kind):
        await stage.shim.kill()
    await last(planned.lasts_s)


async def _sigterm(stage: Stage, planned: Planned) -> None:
    with stage.fault(planned.kind):
        await stage.shim.stop()
    await last(planned.lasts_s)


async def _crash(stage: Stage, planned: Planned) -> None:
    """Restart the shim with a trap; if nothing springs it in time, it is killed there."""
    point = planned.kind.removeprefix("crash_")
    deaths = stage.shim.deaths
    with stage.fault(planned.kind):
        stage.shim.arm("--crash", point, str(1 + int(planned.roll * MAX_CRASH_COUNT)))
        await stage.shim.kill()
        if not await true_within(planned.lasts_s, lambda: stage.shim.deaths >= deaths + 2):
            await stage.shim.kill()


async def _clock(stage: Stage, planned: Planned) -> None:
    """A life in which the wall clock steps there and back, by up to six hours either way."""
    with stage.fault(planned.kind):
        stage.shim.arm("--clock", str(stage.clock_file))
        await stage.shim.kill()
        try:
            for step_s in (1 + planned.roll * 21_600, -planned.roll * 21_600):
                stage.set_clock(step_s)
                await last(planned.lasts_s / 2)
        finally:
            stage.set_clock(0)


async def _paused(stage: Stage, planned: Planned) -> None:
    with stage.fault(planned.kind), stage.shim.paused():
        await last(planned.lasts_s)


async def _unread_log(stage: Stage, planned: Planned) -> None:
    """A life whose log nobody reads, with the pipe and the queue before it full; it must also end by itself."""
    with stage.fault(planned.kind):
        stage.shim.arm("--unread-log")
        await stage.shim.kill()
        await last(planned.lasts_s)
        await stage.shim.stop()


async def _memory_limit(stage: Stage, planned: Planned) -> None:
    """A life in a memory group that has little more than the life needs at its start: the kernel may kill it."""
    with stage.fault(planned.kind), memory.group() as group:
        stage.shim.arm(within=group.inside)
        await stage.shim.kill()
        until, lives = time.monotonic() + planned.lasts_s, stage.shim.deaths
        await true_within(planned.lasts_s, lambda: stage.shim.serving.is_set() or stage.shim.deaths > lives)
        group.limit(group.used_bytes() + int(planned.roll * ROOM_BYTES))
        await last(until - time.monotonic())
        stage.shim.arm()
        if stage.shim.deaths == lives:
            await stage.shim.kill()


# --- the store --------------------------------------------------------------------------------------------------------


async def _disk_full(stage: Stage, planned: Planned) -> None:
    filler = stage.database.with_name(FILLER)
    with stage.shim.in_trouble(), stage.fault(planned.kind):
        try:
            fill(filler)
            await last(planned.lasts_s)
        finally:
            filler.unlink(missing_ok=True)


async def _locked(stage: Stage, planned: Planned) -> None:
    """Another process (a backup, a curious person) holds the database's write lock."""
    connection = sqlite3.connect(stage.database, timeout=0, isolation_level=None)
    with stage.shim.in_trouble(), stage.fault(planned.kind), closing(connection):
        until = time.monotonic() + planned.lasts_s
        await true_within(planned.lasts_s, lambda: _begin(connection))
        await last(until - time.monotonic())


def _begin(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True


async def _pinned_wal(stage: Stage, planned: Planned) -> None:
    """Another process keeps a read transaction open: the write-ahead log cannot be reused, and grows."""
    connection = sqlite3.connect(stage.database, timeout=0, isolation_level=None)
    with stage.fault(planned.kind), closing(connection):
        until = time.monotonic() + planned.lasts_s
        await true_within(planned.lasts_s, lambda: _read(connection))
        await last(until - time.monotonic())


def _read(connection: sqlite3.Connection) -> bool:
    """Begin a read transaction and leave it open. False if the database is moved aside or cannot be read now."""
    try:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.Error:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        return False
    return True


async def _read_only(stage: Stage, planned: Planned) -> None:
    """The shim comes back on a read-only file system, again and again."""
    with ExitStack() as stack, stage.shim.in_trouble(), stage.fault(planned.kind):
        with stage.shim.down():
            await stage.shim.kill()
            await stage.shim.gone()
            assert await true_within(REMOUNT_S, lambda: _made_read_only(stage.database.parent, stack))
        await last(planned.lasts_s)


def _made_read_only(folder: Path, stack: ExitStack) -> bool:
    """Make a mounted folder read-only until the stack ends. False as long as a file is open for writing there."""
    try:
        stack.enter_context(read_only(folder))
    except subprocess.CalledProcessError:
        return False
    return True


async def _newer_schema(stage: Stage, planned: Planned) -> None:
    """A newer shim has had the database: this one must end with its own exit code, and leave the file alone."""
    with stage.shim.in_trouble(EXIT_STORE_VERSION), stage.fault(planned.kind):
        with stage.shim.down():
            await stage.shim.kill()
            await stage.shim.gone()
            known = _demand_reader(stage.database, FUTURE)
        if known is None:
            return
        before = _digest(stage.database)
        try:
            await last(planned.lasts_s)
        finally:
            with stage.shim.down():
                await asyncio.shield(stage.shim.gone())
                if _digest(stage.database) != before:
                    stage.note(ev.Defect(time.monotonic(), "the shim has changed the database of a newer one"))
                _demand_reader(stage.database, known)


def _demand_reader(database: Path, version: int) -> int | None:
    """Set the oldest version that may read the database; returns the one before, `None` if there is no database."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
        (known,) = connection.execute("SELECT value FROM meta WHERE key = 'min_reader_version'").fetchone()
        connection.execute("UPDATE meta SET value = ? WHERE key = 'min_reader_version'", (version,))
        connection.commit()
        return int(known)
    return None


def _digest(database: Path) -> str:
    return hashlib.sha256(database.read_bytes()).hexdigest()


async def _destroyed(stage: Stage, planned: Planned) -> None:
    """Kill the shim and damage its database before it comes back."""
    with stage.fault(planned.kind):
        with stage.shim.down():
            await stage.shim.kill()
            if stage.database.exists():
                damage(stage.database, planned.kind, random.Random(planned.roll))
        with suppress(TimeoutError):
            async with asyncio.timeout(planned.lasts_s):
                await stage.shim.serving.wait()


def damage(database: Path, kind: str, rng: random.Random) -> None:
    """Overwrite or cut off so much that no part of SQLite can take it for sound."""
    wal = database.with_name(database.name + "-wal")
    size_bytes = database.stat().st_size
    if kind == "truncated":
        wal.unlink(missing_ok=True)
        os.truncate(database, rng.choice((size_bytes // 2, 4096, 100)))
        return
    wal.unlink(missing_ok=True)
    with database.open("r+b") as file:
        for offset in range(0 if rng.random() < 0.5 else 4096, size_bytes, 4096):
            file.seek(offset)
            file.write(rng.randbytes(64))


# --- agents -----------------------------------------------------------------------------------------------------------


def _agent_dies(before: Callable[[Part], None], *, factor: float = 1.0) -> Injury:
    async def injure(stage: Stage, planned: Planned) -> None:
        living = [part for part in stage.parts if part.agent is not None] or stage.parts
        part = living[int(planned.roll * len(living))]
        with stage.fault(planned.kind, part.cast.name):
            revive = await part.die()
            try:
                before(part)
                await last(planned.lasts_s * factor)
            finally:
                revive()

    return injure


async def _agent_is_away(stage: Stage, planned: Planned) -> None:
    """Dead for longer than any contact vouches for it; then a reconnect asks the shim who is alive."""
    living = [part for part in stage.parts if part.agent is not None]
    part = living[int(planned.roll * len(living))]
    with stage.fault(planned.kind, part.cast.name):
        revive = await part.die()
        try:
            await last(planned.lasts_s - RECONNECT_BEFORE_S)
            await stage.controller.control("POST", "/control/faults", _drops("rst"))
            await last(RECONNECT_BEFORE_S)
        finally:
            revive()


INJURIES: dict[str, Injury] = {
    "controller_killed": _controller_dies(signal.SIGKILL),
    "controller_restarted": _controller_dies(signal.SIGTERM),
    "controller_forgetful": _controller_dies(signal.SIGKILL, forgets=True),
    "refuse_401": _controller(kind="refuse", status=401, dropping="close"),
    "refuse_403": _controller(kind="refuse", status=403, dropping="rst"),
    "refuse_429": _controller(kind="refuse", status=429, retry_after_s=RETRY_AFTER_S, dropping="close"),
    "refuse_503": _controller(kind="refuse", status=503, dropping="close"),
    "refuse_503_later": _controller(kind="refuse", status=503, retry_after_s=RETRY_AFTER_S, dropping="abort"),
    "accept_then_close": _controller(kind="accept_then_close", dropping="close"),
    "hang_handshake": _controller(kind="hang_handshake", dropping="rst"),
    "half_open": _controller(kind="silent"),
    "stalled": _controller(kind="stalled"),
    "drop_close": _drop("close"),
    "drop_rst": _drop("rst"),
    "result_lost": _controller(kind="drop", on="command_result", how="rst", discard=True, count=3),
    "result_cut": _controller(kind="drop", on="command_result", how="abort", count=3),
    "register_unanswered": _controller(kind="no_register_answer", count=3, dropping="close"),
    "register_in_progress": _controller(kind="register_in_progress", times=2, interval_s=0.2, dropping="close"),
    "register_closes": _controller(kind="close_after_register", count=2, dropping="close"),
    "not_registered": _controller(kind="not_registered", count=20),
    "no_acks": _controller(kind="no_heartbeat_acks"),
    "new_ids": _controller(kind="new_cluster_ids", count=2, dropping="close"),
    "gateway": _controller(kind="gateway", dropping="close"),
    "slow": _controller(kind="slow", latency_s=0.05, bytes_per_s=20_000),
    "delay": _controller(kind="delay", delay_s=0.7),
    "duplicate": _controller(kind="duplicate", times=3, types=[]),
    "reorder": _controller(kind="reorder", window=3, hold_s=0.5, types=[]),
    "garbage": _controller(kind="garbage"),
    "oversize": _controller(kind="oversize", size_bytes=OVERSIZE_BYTES, count=2),
    "binary": _controller(kind="binary_frames"),
    **dict.fromkeys(("cut", "reset", "loss", "latency", "narrow"), _network),
    "dns_hangs": _dns_hangs,
    "kill": _kill,
    "sigterm": _sigterm,
    "clock": _clock,
    "paused": _paused,
    "unread_log": _unread_log,
    "memory_limit": _memory_limit,
    **{f"crash_{point}": _crash for point in CRASH_POINTS},
    "disk_full": _disk_full,
    "locked": _locked,
    "pinned_wal": _pinned_wal,
    "read_only": _read_only,
    "newer_schema": _newer_schema,
    "corrupted": _destroyed,
    "truncated": _destroyed,
    "agent_dies": _agent_dies(lambda part: None),
    "agent_new_pod": _agent_dies(Part.new_pod, factor=0.2),
    "agent_forgets_id": _agent_dies(Part.forget_id, factor=0.2),
    "agent_is_away": _agent_is_away,
}
