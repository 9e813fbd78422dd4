"""The parts of a process that serve agents: what one bridge and one bridge per shard have in common, and the former."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shim.admin import RecentCommand, RecentCommandsStore, Subject
from shim.bridge import Bridge, BridgeContext
from shim.clock import Clock
from shim.config.settings import Settings
from shim.core.records import StoreContents
from shim.core.sessions import Sessions
from shim.errors import StoreError
from shim.fallback import FallbackPolicy, WebSocketProxy
from shim.metrics import Metrics
from shim.ports import AgentService, AgentWebSockets, CommandStore, Fallback, Forwarder, Timers, UpstreamPort
from shim.redaction import Redaction
from shim.store import CallThreadsafe
from shim.store.monitor import log_store_warnings

Spawn = Callable[[str, Coroutine[Any, Any, None]], Any]


@dataclass(frozen=True, slots=True)
class RuntimeContext:
    """What the composition gets of the process. `broken` ends it: the store is damaged."""

    settings: Settings
    clock: Clock
    timers: Timers
    rng: Callable[[], float]
    new_id: Callable[[], str]
    post: CallThreadsafe
    spawn: Spawn
    metrics: Metrics
    upstream: UpstreamPort
    read_token: Callable[[], str]
    broken: Callable[[StoreError], None]
    redaction: Redaction = field(default_factory=Redaction)

    def context(
        self, settings: Settings, store: CommandStore, upstream: UpstreamPort, owner_key: bytes = b""
    ) -> BridgeContext:
        """The surroundings of one bridge."""
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
        )


class ClosableFallback(Fallback, Protocol):
    """The way by the vendor's HTTP API."""

    def active(self) -> bool:
        """Whether calls go that way because of the mode, or of a link that is down."""

    async def close(self) -> None:
        """Close the connections to the vendor's API."""


class Runtime(Protocol):
    """Calls come in this order: `open`, `start`, …, `quiesce`, `stop`, `close`. The parts are there once it is open."""

    @property
    def subject(self) -> Subject:
        """What the admin port shows."""

    @property
    def recent(self) -> Iterable[RecentCommand]:
        """What happened last to commands."""

    @property
    def switchboard(self) -> AgentService:
        """What the frontend calls."""

    @property
    def addresses(self) -> Mapping[str, str]:
        """Further addresses that this process listens on, by name; there once it is open."""

    @property
    def forwarder(self) -> Forwarder | None:
        """Sends calls on to other replicas; `None` where there are none."""

    @property
    def fallback(self) -> ClosableFallback:
        """The other way."""

    @property
    def websockets(self) -> AgentWebSockets:
        """The way of agents that speak WebSocket by themselves."""

    async def open(self) -> None:
        """Make sure of the store. Raises `StoreError`, `ConfigError`."""

    def start(self) -> None:
        """Begin to work."""

    def quiesce(self) -> None:
        """Answer what waits."""

    async def stop(self) -> None:
        """End the work; what is submitted is still stored."""

    async def close(self) -> None:
        """Close the store."""

    def reload(self, settings: Settings) -> None:
        """Go on with these settings."""

    def token_changed(self) -> None:
        """The upstream token is another one."""


class SingleRuntime:
    """Implements `composition.Composition`."""

    def __init__(self, around: RuntimeContext, store: CommandStore) -> None:
        self._metrics = around.metrics
        self.recent = RecentCommandsStore(store)
        self.subject = self.switchboard = Bridge(around.context(around.settings, self.recent, around.upstream))
        self.fallback = FallbackPolicy(self.subject)
        self.addresses: dict[str, str] = {}
        self.forwarder = None
        self.websockets = WebSocketProxy(lambda: self.subject.ctx.settings, around.metrics, around.spawn, self.subject)
        around.metrics.websocket_connections.set_function(self.websockets.count)
        self._loaded: StoreContents | None = None
        self._opening = False

    async def open(self) -> None:
        """See `composition.Composition`."""
        self._opening = True
        try:
            self._loaded = await asyncio.to_thread(self.recent.open)
        except Exception:
            self._opening = False
            raise
        self._opening = False
        log_store_warnings(self._loaded, self._metrics)

    def start(self) -> None:
        """See `composition.Composition`."""
        if self._loaded is not None:
            self.subject.start(self._loaded)
            self._loaded = None

    def quiesce(self) -> None:
        """See `composition.Composition`."""
        self.subject.quiesce()

    async def stop(self) -> None:
        """See `composition.Composition`."""
        self.subject.stop()

    async def close(self) -> None:
        """See `composition.Composition`. A store that is still being opened is left to the end of the process."""
        if not self._opening:
            await asyncio.to_thread(self.recent.close)

    def reload(self, settings: Settings) -> None:
        """See `composition.Composition`."""
        self.subject.ctx.settings = settings

    def token_changed(self) -> None:
        """See `composition.Composition`."""
        self.subject.token_changed()
