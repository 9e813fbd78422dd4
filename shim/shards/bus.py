"""A replica's connection to NATS: entries with compare-and-set, and messages between replicas."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

from nats.aio.msg import Msg

from shim import settings
from shim.errors import StoreError
from shim.logs import get
from shim.store.jetstream.layout import PREFIX
from shim.store.jetstream.server import Server, translated

log = get(__name__)

LEASES = f"KV_{PREFIX}-leases"
CLUSTER = f"KV_{PREFIX}-cluster"
BACKOFF_S = 0.25
PUT_S = 1.0
KEPT_MESSAGES = 20_000
_NO_RESPONDERS = "503"


def subject_of(stream: str, key: str) -> str:
    """Where a bucket keeps a key."""
    return f"$KV.{stream.removeprefix('KV_')}.{key}"


class Listener(Protocol):
    """Who is told what comes in; always on the event loop, in order."""

    def message(self, data: bytes) -> None:
        """Another replica says something."""

    def unreachable(self, reference: str) -> None:
        """What was posted with this reference reached nobody."""

    def entry(self, key: str, body: bytes, revision: int) -> None:
        """What stood in the bucket of leases when the connection was made."""

    def up(self) -> None:
        """Connected, and everything that is said from now on is heard."""

    def down(self) -> None:
        """Not any more: what was posted and not answered may be lost."""


def streams(replicas: int, lease_s: float) -> tuple[dict[str, Any], ...]:
    """The buckets as `nats.js.api.StreamConfig` takes them."""
    common = {
        "storage": "file",
        "discard": "old",
        "num_replicas": replicas,
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }
    return (
        common | {"name": CLUSTER, "subjects": [subject_of(CLUSTER, ">")], "duplicate_window": lease_s},
        common
        | {
            "name": LEASES,
            "subjects": [subject_of(LEASES, ">")],
            "max_age": lease_s,
            "duplicate_window": lease_s,
        },
    )


class Bus(Server):
    """One connection, made anew where it was lost. `run` keeps it up; `post` never waits."""

    def __init__(self, configured: settings.Store, process: str) -> None:
        super().__init__(configured)
        self._process = process
        self._listener: Listener | None = None
        self._posted: deque[tuple[str, bytes, str]] = deque(maxlen=KEPT_MESSAGES)
        self._has_posted = asyncio.Event()
        self._lost = asyncio.Event()
        self.is_up = False

    def _options(self) -> dict[str, Any]:
        async def lost() -> None:
            self._lost.set()

        return super()._options() | {"closed_cb": lost, "disconnected_cb": lost, "name": f"agent-shim {self._process}"}

    # --- entries ------------------------------------------------------------------------------------------------------

    async def put(self, stream: str, key: str, body: bytes, revision: int) -> int:
        """Replace the entry that has this revision (0: there is none); its new one. Raises `Conflict`, `Unavailable`.

        After `Unavailable` it may have been written or not.
        """
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        return await self.publish(subject_of(stream, key), body, headers, PUT_S)

    async def get(self, stream: str, key: str) -> tuple[bytes, int] | None:
        """An entry and its revision."""
        found = await self.message(stream, subject=subject_of(stream, key))
        return None if found is None else (found.body, found.seq)

    # --- messages -----------------------------------------------------------------------------------------------------

    def post(self, process: str, messages: list[bytes], reference: str = "") -> None:
        """Send messages to a replica, in order with all others. Without a connection they are lost.

        `""` is all replicas. With a `reference` the listener is told if nobody is there to take the last one.
        """
        if not self.is_up:
            return
        subject = f"{PREFIX}.replica.{process}.in" if process else f"{PREFIX}.replica.all"
        reply = f"{PREFIX}.replica.{self._process}.lost.{reference}" if reference else ""
        for number, message in enumerate(messages, 1):
            self._posted.append((subject, message, reply if number == len(messages) else ""))
        self._has_posted.set()

    async def _send(self) -> None:
        while True:
            await self._has_posted.wait()
            self._has_posted.clear()
            client = self.connected()
            while self._posted:
                subject, message, reply = self._posted.popleft()
                with translated():
                    await client.publish(subject, message, reply=reply)

    # --- the connection -----------------------------------------------------------------------------------------------

    async def run(self, listener: Listener) -> None:
        """Keep connected until cancelled."""
        self._listener = listener
        told = ""
        while True:
            try:
                await self._stay(listener)
            except* StoreError as group:
                reason = str(group.exceptions[0])
                if reason != told:
                    log.warning("nats_lost", error=reason)
                told = reason
            else:
                told = ""
            if self.is_up:
                self.is_up = False
                self._posted.clear()
                listener.down()
            await self.close()
            await asyncio.sleep(BACKOFF_S)

    async def _stay(self, listener: Listener) -> None:
        self._lost.clear()
        await self.connect()
        client = self.connected()
        with translated():
            await client.subscribe(f"{PREFIX}.replica.{self._process}.in", cb=self._on_message)
            await client.subscribe(f"{PREFIX}.replica.{self._process}.lost.*", cb=self._on_lost)
            await client.subscribe(f"{PREFIX}.replica.all", cb=self._on_message)
        for key, body, revision in await self.entries():
            listener.entry(key, body, revision)
        self.is_up = True
        log.info("nats_connected")
        listener.up()
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(self._send())
            await self._lost.wait()
            sender.cancel()

    async def entries(self) -> list[tuple[str, bytes, int]]:
        """All that stand in the bucket of leases: key, value, revision."""
        last = await self.last_sequence(LEASES)
        found = await self.read(LEASES, last) if last else []
        return [(each.subject.removeprefix(subject_of(LEASES, "")), each.body, each.seq) for each in found]

    async def check(self) -> None:
        """Something was not answered: if the server does not answer at all, go to another one."""
        try:
            with translated():
                await self.connected().flush(timeout=1)
        except StoreError:
            self._lost.set()

    async def _on_message(self, message: Msg) -> None:
        if self._listener is not None:
            self._listener.message(message.data)

    async def _on_lost(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status")
        if status == _NO_RESPONDERS and self._listener is not None:
            self._listener.unreachable(message.subject.rpartition(".")[2])
