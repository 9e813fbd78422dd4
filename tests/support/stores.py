"""A synchronous client of a command store, and records to put into it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from shim.core.records import (
    CommandRecord,
    CommandState,
    MarkCommands,
    Operation,
    PutCommand,
    SessionKey,
    SessionRecord,
    StoreContents,
    StoreOperation,
    TraceEntry,
)
from shim.errors import StoreError
from shim.ports import CommandStore
from shim.store import CallThreadsafe
from shim.store.sqlite import SqliteStore

_Result = TypeVar("_Result")

TIMEOUT_S = 30.0
KEY = SessionKey("default", "cluster", "c-1")
OTHER = SessionKey("default", "agent", "a-1")
STRANGER = SessionKey("0f0f", "cluster", "c-1")


class StoreClient:
    """Stands in for the event loop: what the store posts is run by the test's thread, when it waits."""

    def __init__(self, make: Callable[[CallThreadsafe], CommandStore]) -> None:
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.store = make(self._posted.put)

    def open(self) -> StoreContents:
        return self.store.open()

    def submit(self, *operations: Operation) -> list[Any]:
        """Submit, and return the list that will hold the outcome: the first operation's result, or a `StoreError`."""
        outcome: list[Any] = []
        self.store.submit(*operations, done=outcome.append)
        return outcome

    def wait(self, outcome: list[Any]) -> Any:
        """Run posted calls until the outcome has arrived."""
        while not outcome:
            self._posted.get(timeout=TIMEOUT_S)()
        return outcome[0]

    def run(self, *operations: Operation) -> Any:
        """Submit operations as one unit and return the result of the first. Raises `StoreError`."""
        outcome = self.wait(self.submit(*operations))
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def one(self, operation: StoreOperation[_Result]) -> _Result:
        """Submit one operation and return its result. Raises `StoreError`."""
        result: _Result = self.run(operation)
        return result

    def drain(self) -> None:
        """Run what has been posted so far."""
        while not self._posted.empty():
            self._posted.get()()

    def close(self) -> None:
        self.store.close()


class Stores:
    """Opens SQLite stores that do not wait long for locks, and closes them all in the end."""

    def __init__(self) -> None:
        self._clients: list[StoreClient] = []

    def client(self, path: Path) -> StoreClient:
        """A client of a store that is yet to be opened."""
        self._clients.append(StoreClient(lambda post: SqliteStore(path, post, busy_timeout_s=0.05)))
        return self._clients[-1]

    def open(self, path: Path) -> tuple[StoreClient, StoreContents]:
        client = self.client(path)
        return client, client.open()

    def loaded(self, path: Path) -> StoreContents:
        """Open the store, close it again, and return its contents."""
        client, loaded = self.open(path)
        client.close()
        return loaded

    def fill(self, path: Path, commands: int) -> None:
        """Put so many commands with the ids `0` and up, and close."""
        client, _ = self.open(path)
        client.run(*(put(str(n), payload={"x": "x" * 200}) for n in range(commands)))
        client.close()

    def close(self) -> None:
        for client in self._clients:
            client.close()


def until(condition: Callable[[], Any]) -> None:
    """Wait until another thread or process has made something true."""
    until_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def command(command_id: str, session: SessionKey = KEY, **fields: Any) -> CommandRecord:
    defaults: dict[str, Any] = {
        "type": "exec",
        "payload": {"cmd": ["true"], "n": 1, "é": None},
        "created_at": "2026-11-23T05:08:13Z",
        "arrived_unix": 100.0,
        "expires_unix": 200.0,
        "request_id": f"r-{command_id}",
        "size_bytes": 21,
    }
    return CommandRecord(session=session, id=command_id, **(defaults | fields))


def put(command_id: str, session: SessionKey = KEY, offered: TraceEntry | None = None, **fields: Any) -> PutCommand:
    return PutCommand(command(command_id, session, **fields), offered)


def mark(
    ids: str | tuple[str, ...], state: CommandState, unix: float = 110.0, attempts: int = 0, session: SessionKey = KEY
) -> MarkCommands:
    """The change of one or more commands to a state, traced under the state's name."""
    names = (ids,) if isinstance(ids, str) else ids
    return MarkCommands(session, names, state, TraceEntry(unix, state.value), attempts)


def session(key: SessionKey = KEY, **fields: Any) -> SessionRecord:
    defaults: dict[str, Any] = {
        "dialect": "clusters_agent",
        "agent_id": "pod-1",
        "upstream_cluster_id": "up-1",
        "last_seen_unix": 100.5,
        "registration": {"name": "prod"},
        "reply": {"cluster_id": "up-1"},
        "hold": {"held_s": 5.0},
    }
    return SessionRecord(key=key, **(defaults | fields))


# What no store can keep: an object that JSON cannot express, and text that is not Unicode.
POISON = (put("poison", payload={"x": object()}), put("poison-\ud800"))
