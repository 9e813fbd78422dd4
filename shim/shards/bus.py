"""A replica's connection to NATS: entries with compare-and-set, what others write, and messages between replicas."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from shim import settings
from shim.errors import StoreError
from shim.logs import get
from shim.ports import Clock
from shim.store.jetstream.layout import PREFIX
from shim.store.jetstream.server import Server, translated

log = get(__name__)

LEASES = f"KV_{PREFIX}-leases"
CLUSTER = f"KV_{PREFIX}-cluster"
BACKOFF_S = 0.25
ANSWER_S = 2.0
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
        """A lease or a membership was written."""

    def up(self) -> None:
        """Connected, and everything that is written from now on is seen."""

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

    def __init__(self, configured: settings.Store, process: str, clock: Clock, silence_s: float) -> None:
        super().__init__(configured)
        self._process = process
        self._clock = clock
        self._silence_s = silence_s
        self._listener: Listener | None = None
        self._posted: deque[tuple[str, bytes, str]] = deque(maxlen=KEPT_MESSAGES)
        self._has_posted = asyncio.Event()
        self._lost = asyncio.Event()
        self._heard_at = 0.0
        self._watches = 0
        self._watched: Subscription | None = None
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

        With a `reference` the listener is told if nobody is there to take the last one.
        """
        if not self.is_up:
            return
        subject = f"{PREFIX}.replica.{process}.in"
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
        self._watched = None
        await self.connect()
        client = self.connected()
        with translated():
            await client.subscribe(f"{PREFIX}.replica.{self._process}.in", cb=self._on_message)
            await client.subscribe(f"{PREFIX}.replica.{self._process}.lost.*", cb=self._on_lost)
            await client.subscribe(f"{PREFIX}.replica.all", cb=self._on_message)
        await self._watch()
        self.is_up = True
        log.info("nats_connected")
        listener.up()
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(self._send())
            guard = tasks.create_task(self._guard())
            await self._lost.wait()
            sender.cancel()
            guard.cancel()

    async def _guard(self) -> None:
        """Entries are renewed all the time, ours among them: a watch that says nothing is broken."""
        while True:
            await asyncio.sleep(self._silence_s / 2)
            if self._clock.monotonic_s() - self._heard_at > self._silence_s:
                await self._watch()

    async def _watch(self) -> None:
        """See every entry there is, and each that is written from now on."""
        client = self.connected()
        self._watches += 1
        self._heard_at = self._clock.monotonic_s()
        inbox = f"{PREFIX}.replica.{self._process}.watch.{self._watches}"
        config = ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=AckPolicy.NONE,
            filter_subject=subject_of(LEASES, ">"),
            inactive_threshold=30.0,
            mem_storage=True,
            num_replicas=1,
        )
        with translated():
            if self._watched is not None:
                await self._watched.unsubscribe()
            self._watched = await client.subscribe(inbox, cb=self._on_entry)
            await client.jetstream(timeout=ANSWER_S).add_consumer(LEASES, config)

    async def _on_message(self, message: Msg) -> None:
        if self._listener is not None:
            self._listener.message(message.data)

    async def _on_lost(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status")
        if status == _NO_RESPONDERS and self._listener is not None:
            self._listener.unreachable(message.subject.rpartition(".")[2])

    async def _on_entry(self, message: Msg) -> None:
        try:
            revision = message.metadata.sequence.stream
        except (nats.errors.Error, ValueError):
            return  # not from JetStream
        self._heard_at = self._clock.monotonic_s()
        if self._listener is not None:
            key = message.subject.removeprefix(subject_of(LEASES, ""))
            self._listener.entry(key, message.data, revision)

    def drop(self) -> None:
        """This connection answers nothing: go to another server."""
        self._lost.set()
