"""Runtime parts that serve agents: their interface, and the implementation with one bridge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from shim.bridge import Bridge, BridgeContext
from shim.bridge.context import NoteStep
from shim.clock import Clock
from shim.config.settings import Settings
from shim.core.records import StoreContents
from shim.core.sessions import Sessions
from shim.errors import StoreError
from shim.fallback import FallbackPolicy, WebSocketProxy
from shim.management.subject import Subject
from shim.metrics import Metrics
from shim.ports import (
    AgentService,
    CommandStore,
    DeliveryEvidence,
    Fallback,
    Forwarder,
    Timers,
    UpstreamPort,
)
from shim.redaction import Redaction
from shim.store import CallThreadsafe, log_store_warnings
from shim.upstream.dialler import Spawn


class RuntimeContext(msgspec.Struct, frozen=True):
    """Dependencies of a runtime. `on_store_corrupt` stops the process after the store was found corrupt.

    `read_token` returns the upstream token for a dial, `token_for_agents` the one that agents must send.
    `spawn` runs a service, whose failure ends the process, and `spawn_isolated` what serves one connection or one call.
    `note_step` is called with each step in the trace of commands: session, commands, and what happened.
    """

    settings: Settings
    clock: Clock
    timers: Timers
    rng: Callable[[], float]
    new_id: Callable[[], str]
    call_threadsafe: CallThreadsafe
    spawn: Spawn
    spawn_isolated: Spawn
    metrics: Metrics
    upstream: UpstreamPort
    read_token: Callable[[], str]
    token_for_agents: Callable[[], str]
    on_store_corrupt: Callable[[StoreError], None]
    redaction: Redaction = msgspec.field(default_factory=Redaction)
    note_step: NoteStep | None = None

    def bridge_context(
        self, settings: Settings, store: CommandStore, upstream: UpstreamPort, owner_key: bytes = b""
    ) -> BridgeContext:
        """Return the dependencies of one bridge."""
        return BridgeContext(
            settings=settings,
            clock=self.clock,
            timers=self.timers,
            rng=self.rng,
            new_id=self.new_id,
            store=store,
            upstream=upstream,
            metrics=self.metrics,
            read_token=self.read_token,
            sessions=Sessions(),
            owner_key=owner_key,
            redaction=self.redaction,
            note_step=self.note_step,
        )


class Runtime(Protocol):
    """The parts that serve agents. Call `open`, `start`, …, `quiesce`, `stop`, `close` in this order.

    The properties are valid once it is open.
    """

    @property
    def subject(self) -> Subject:
        """The bridge or bridges shown on the admin port."""

    @property
    def agent_service(self) -> AgentService:
        """The service that the agents' server calls."""

    @property
    def evidence(self) -> DeliveryEvidence:
        """The receiver of delivery evidence that the agents' server calls."""

    @property
    def addresses(self) -> Mapping[str, str]:
        """Further addresses on which this process listens, by name."""

    @property
    def forwarder(self) -> Forwarder | None:
        """Client for other replicas, `None` without replicas."""

    @property
    def fallback(self) -> Fallback:
        """Server of calls by the vendor's HTTP API."""

    @property
    def websockets(self) -> WebSocketProxy:
        """Proxy for agents that connect by WebSocket."""

    async def open(self, waiting: Callable[[], Awaitable[None]]) -> None:
        """Open the store. `waiting` is called while it cannot be reached. Raises `StoreError`, `ConfigError`."""

    def start(self) -> None:
        """Start serving the sessions of the store."""

    def quiesce(self) -> None:
        """Answer all held polls."""

    async def stop(self) -> None:
        """Stop the bridges. Submitted operations are still stored."""

    async def close(self) -> None:
        """Close the store."""

    def reload(self, settings: Settings) -> None:
        """Apply new settings."""

    def token_changed(self) -> None:
        """Use the new upstream token."""


class SingleRuntime:
    """Runtime with one bridge and its own store."""

    def __init__(self, context: RuntimeContext, store: CommandStore) -> None:
        self._metrics = context.metrics
        self._store = store
        self.bridge = Bridge(context.bridge_context(context.settings, store, context.upstream))
        self.subject = Subject.of(self.bridge)
        self.agent_service, self.evidence = self.bridge.calls, self.bridge.delivery
        self.fallback = FallbackPolicy(self.bridge)
        self.addresses: dict[str, str] = {}
        self.forwarder = None
        record = self.bridge.websocket_agents.record
        self.websockets = WebSocketProxy(
            lambda: self.bridge.ctx.settings, context.metrics, context.spawn_isolated, record
        )
        context.metrics.websocket_connections.set_function(self.websockets.count)
        self._loaded: StoreContents | None = None
        self._opening = False

    async def open(self, waiting: Callable[[], Awaitable[None]]) -> None:
        """Open the store in a thread. A file is not waited for."""
        self._opening = True
        try:
            self._loaded = await asyncio.to_thread(self._store.open)
        except Exception:
            self._opening = False
            raise
        self._opening = False
        log_store_warnings(self._loaded, self._metrics)

    def start(self) -> None:
        """Start the bridge with the contents of the store."""
        if self._loaded is not None:
            self.bridge.start(self._loaded)
            self._loaded = None

    def quiesce(self) -> None:
        """Answer all held polls."""
        self.subject.stopping = True
        self.bridge.quiesce()

    async def stop(self) -> None:
        """Stop the bridge."""
        self.bridge.stop()

    async def close(self) -> None:
        """Close the store, unless it is still being opened in its thread: the end of the process ends that."""
        if not self._opening:
            await asyncio.to_thread(self._store.close)

    def reload(self, settings: Settings) -> None:
        """Apply new settings."""
        self.bridge.ctx.settings = settings
        self.fallback.reload()

    def token_changed(self) -> None:
        """Use the new upstream token."""
        self.bridge.token_changed()
