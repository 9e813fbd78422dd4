"""The real shim with faults inside: `python -m tests.chaos.harness.faulty_shim [options] run --config F`.

`--crash POINT N`: it is killed by SIGKILL when the point (`schedule.CRASH_POINTS`) is reached for the N-th time.
`--clock FILE`: its wall clock is wrong by as many seconds as the file says.
`--unread-log`: nobody reads its log; the pipe and the queue before it are full from the start.
All the rest is the shim's own code.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shim import app, launch
from shim.clock import Clock
from shim.core.agent_calls import AgentCall
from shim.core.command_queue import OpenUntil
from shim.core.records import Operation, PutCommand, PutResult, StoreContents, StoreOperation
from shim.errors import StoreError
from shim.log import Formatter, Logs, RepeatFilter, as_json
from shim.ports import (
    AgentService,
    Caller,
    CallResult,
    CommandStore,
    DeliveryEvidence,
    DeliveryReceipt,
    DialFailure,
    DialRequest,
    StoreDone,
    UpstreamPort,
    WebSocket,
    WebSocketListener,
)
from shim.protocol.upstream_message import Message
from shim.redaction import Redaction
from shim.store import CallThreadsafe
from shim.store.files import StoreLock
from shim.store.sqlite import SqliteStore

_Result = TypeVar("_Result")


FLUSHED_S = 0.01
PIPE_BYTES = 4096
FILLER = "x" * 1000


class Trap:
    """Kills this process when `point` is reached for the n-th time."""

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self._left = count

    def reached(self, point: str) -> None:
        if self.due(point):
            self.spring()

    def due(self, point: str) -> bool:
        """Count a point; true if it is the one to die at."""
        if point != self.point:
            return False
        self._left -= 1
        return self._left == 0

    @staticmethod
    def spring() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class _Store(SqliteStore):
    """Dies before, in and after commits."""

    def __init__(self, path: Path, post: CallThreadsafe, trap: Trap) -> None:
        super().__init__(path, post)
        self._trap = trap
        self._inserting = False

    def _open(self, lock: StoreLock) -> tuple[sqlite3.Connection, StoreContents]:
        connection, loaded = super()._open(lock)
        connection.set_trace_callback(self._on_statement)
        return connection, loaded

    def _on_statement(self, statement: str) -> None:
        """A statement begins: at the COMMIT all is written, nothing is valid."""
        if statement.startswith("INSERT INTO commands"):
            self._inserting = True
        elif statement == "COMMIT" and self._inserting:
            self._inserting = False
            self._trap.reached("in_commit")

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        operations = (operation, *also)
        if any(isinstance(each, PutCommand) for each in operations):
            self._trap.reached("before_commit")
            done = self._then("after_commit", done)
        elif any(isinstance(each, PutResult) for each in operations):
            done = self._then("result_stored", done)
        super().submit(operation, *also, done=done)

    def _then(self, point: str, done: StoreDone[_Result] | None) -> StoreDone[_Result]:
        def on_disk(outcome: _Result | StoreError) -> None:
            if not isinstance(outcome, StoreError):
                self._trap.reached(point)
            if done is not None:
                done(outcome)

        return on_disk


class _AgentService:
    """Dies before a reply with commands is written."""

    def __init__(self, inner: AgentService, trap: Trap) -> None:
        self._inner = inner
        self._trap = trap

    def call(
        self, caller: Caller, call: AgentCall, arrived_s: float, now_s: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        answer = self._inner.call(caller, call, arrived_s, now_s)
        return answer if isinstance(answer, CallResult) else self._observed(answer)

    async def _observed(self, waiting: Coroutine[Any, Any, CallResult]) -> CallResult:
        answer = await waiting
        if answer.receipt is not None:
            self._trap.reached("before_reply")
        return answer


class _Evidence:
    """Dies after a reply with commands is written."""

    def __init__(self, inner: DeliveryEvidence, trap: Trap) -> None:
        self._trap = trap
        self._inner = inner
        self.unwritten = inner.unwritten
        self.next_request = inner.next_request
        self.connection_open = inner.connection_open
        self.connection_closed = inner.connection_closed

    def written(self, receipt: DeliveryReceipt, open_until: OpenUntil) -> None:
        self._trap.reached("after_reply")
        self._inner.written(receipt, open_until)


class _Upstream:
    """Dies when a command's frame was read, and when a result was sent."""

    def __init__(self, inner: UpstreamPort, trap: Trap) -> None:
        self._inner = inner
        self._trap = trap

    def dial(
        self, spec: DialRequest, events: WebSocketListener, done: Callable[[WebSocket | DialFailure], None]
    ) -> None:
        def dialled(outcome: WebSocket | DialFailure) -> None:
            done(outcome if isinstance(outcome, DialFailure) else _Socket(outcome, self._trap))

        self._inner.dial(spec, _Events(events, self._trap), dialled)


class _Events:
    def __init__(self, inner: WebSocketListener, trap: Trap) -> None:
        self._inner = inner
        self._trap = trap

    def on_message(self, message: Message) -> None:
        if message.type == "command":
            self._trap.reached("frame_read")
        self._inner.on_message(message)

    def on_bad_frame(self, kind: str) -> None:
        self._inner.on_bad_frame(kind)

    def on_frame(self) -> None:
        self._inner.on_frame()

    def has_room(self) -> bool:
        return self._inner.has_room()

    def on_pong(self, payload: bytes) -> None:
        self._inner.on_pong(payload)

    def on_closed(self, by_close_frame: bool, code: int, reason: str) -> None:
        self._inner.on_closed(by_close_frame, code, reason)


class _Socket:
    def __init__(self, inner: WebSocket, trap: Trap) -> None:
        self._inner = inner
        self._trap = trap

    def send(self, message: Message) -> None:
        self._inner.send(message)
        if message.type == "command_result" and self._trap.due("result_sent"):
            # `send` queues: a moment later it is in the kernel, and its pong is not back.
            asyncio.get_running_loop().call_later(FLUSHED_S, self._trap.spring)

    def ping(self, payload: bytes) -> None:
        self._inner.ping(payload)

    def close(self, code: int) -> None:
        self._inner.close(code)

    def abort(self) -> None:
        self._inner.abort()


class _SteppedClock(Clock):
    """A wall clock that somebody sets. (libfaketime would do it from outside, but it breaks waiting for the GIL.)"""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def wall_s(self) -> float:
        return super().wall_s() + float(self._file.read_text())


def leave_log_unread() -> None:
    """Put a pipe that nobody reads in the place of stderr. What the log says goes to the old stderr as well.

    The harness judges by what the log says, so it needs a second copy, which is complete.
    """
    copy = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    _unread, full = os.pipe()  # the end for reading stays open, or writing would fail instead of hang
    fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.dup2(full, 2)
    os.close(full)
    handler = logging.StreamHandler(copy)
    handler.setFormatter(Formatter(Redaction(), as_json))
    handler.setLevel(logging.INFO)
    handler.addFilter(RepeatFilter())
    logging.getLogger().addHandler(handler)


def fill_log(logs: Logs) -> None:
    """Log until pipe and queue are full. Must be called when the shim has set its log up, at the level `debug`."""
    filler = logging.getLogger("shim.filler")
    while not logs.dropped:
        filler.debug("filler", extra={"fields": {"text": FILLER}})


def doubtful(trap: Trap, clock_file: Path | None, *, unread_log: bool = False) -> type[app.App]:
    """Return the shim's app with trap, clock and full log built in."""

    class DoubtfulApp(app.App):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if unread_log:
                fill_log(args[2])

        def make_clock(self) -> Clock:
            return super().make_clock() if clock_file is None else _SteppedClock(clock_file)

        def make_store(self, post: CallThreadsafe) -> CommandStore:
            return _Store(Path(self.settings.store.path), post, trap)

        def wrap_upstream(self, upstream: UpstreamPort) -> UpstreamPort:
            return _Upstream(upstream, trap)

        def wrap_agent_service(self, agent_service: AgentService) -> AgentService:
            return _AgentService(agent_service, trap)

        def wrap_evidence(self, evidence: DeliveryEvidence) -> DeliveryEvidence:
            return _Evidence(evidence, trap)

    return DoubtfulApp


def main(args: Sequence[str]) -> NoReturn:
    """Run until the trap springs, or else until the shim ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.harness.faulty_shim")
    parser.add_argument("--crash", nargs=2, default=("", "0"), metavar=("POINT", "N"))
    parser.add_argument("--clock", type=Path, metavar="FILE")
    parser.add_argument("--unread-log", action="store_true")
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--config", required=True)
    given = parser.parse_args(args)
    point, count = given.crash
    if given.unread_log:
        leave_log_unread()
    sets = ("log.level=debug",) if given.unread_log else ()
    trap = Trap(point, int(count))
    launch.main(given.config, sets, None, lambda: doubtful(trap, given.clock, unread_log=given.unread_log))


if __name__ == "__main__":
    main(sys.argv[1:])
