"""One replica among others: connects the parts, and starts and stops them (docs/how-to/several-replicas.md)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from socket import gethostname
from typing import Any, TypeVar

import msgspec

from shim.agent_api.internal import ClusterListener
from shim.bridge import Bridge, BridgeContext
from shim.cluster.admin_actions import Operators
from shim.cluster.connection_pairs import Pairs
from shim.cluster.database import Database
from shim.cluster.forwarding import ReplicaForwarder
from shim.cluster.identity import make_identity
from shim.cluster.membership import Membership, new_process
from shim.cluster.metrics import ClusterMetrics
from shim.cluster.router import Fallbacks, Places, Router
from shim.cluster.shard import Shard
from shim.cluster.shard_manager import Shards
from shim.cluster.status import Operations, Overview, Recents
from shim.cluster.write_probe import DatabaseProbe
from shim.config.settings import Settings, TlsFiles
from shim.core.leases import LeasePolicy, Member
from shim.errors import StoreError, StoreUnreachable
from shim.fallback import WebSocketProxy, sunset_headers
from shim.log import get
from shim.protocol.dialects import load
from shim.protocol.http import origin_of
from shim.runtime import RuntimeContext
from shim.store import Partition, commit_probe, open_shard
from shim.store.postgres.database import prepare
from shim.store.postgres.dsn import application, conninfo

log = get(__name__)

RETRY_S = 1.0
STOP_S = 3.0
KEEPALIVE_S = 60.0

T = TypeVar("T")


class Replica:
    """Implements `composition.Composition`."""

    def __init__(self, context: RuntimeContext) -> None:
        settings = self._settings = context.settings
        self._runtime_context = context
        self._metrics = ClusterMetrics(context.metrics)
        self._tls, fingerprint = make_identity(context.clock.wall_s())
        self._policy = LeasePolicy(settings.cluster.lease_s)
        process = new_process()
        name = settings.cluster.replica or f"{gethostname()}-{process[:4]}"
        me = Member(process, name, settings.cluster.advertise, fingerprint)
        database = self._database = Database(lambda: conninfo(settings.store, application(self.membership.me.process)))
        self.shards = Shards(lambda: self.membership, self._make_shard, context.clock, context.spawn, self._metrics)
        self.membership = Membership(
            database, me, agreed(settings), self._policy, context.clock, context.timers, self.shards.ended
        )
        self.recent = Recents(self.shards.serving)
        self.addresses: dict[str, str] = {}
        self._ctx = self._bridge_context()
        self._operators = Operators(
            Operations(self.shards.bridges), self._ctx.sessions, name, self._others, context.spawn
        )
        self.subject = Overview(self._ctx, self.shards.bridges, self._about_replicas, self._operators)
        self._owner_key = b""
        self._pairs = Pairs()
        self._places = Places(settings.upstream.own_tokens)
        clock = context.clock
        self.forwarder = ReplicaForwarder(self, self._pairs, clock, self._current, self._metrics, context.spawn)
        self.agent_service = Router(self._places, self.shards.usable, self.forwarder)
        self.fallback = Fallbacks(self._current, clock, self.agent_service, self.shards.serving)
        self.websockets = WebSocketProxy(self._current, context.metrics, context.spawn, self._operators)
        context.metrics.websocket_connections.set_function(self.websockets.count)
        self._operators.bridge_of = self._bridge_of
        self._operators.owner_of = self.forwarder.owner_of
        self._listener = self._make_listener()
        self._tasks: list[asyncio.Task[None]] = []

    def _current(self) -> Settings:
        return self._settings

    def _bridge_context(self) -> BridgeContext:
        context = self._runtime_context
        return context.bridge_context(
            self._settings, DatabaseProbe(self.membership.valid, context.call_threadsafe), context.upstream
        )

    def _make_shard(self, number: int, fence: int) -> Shard:
        context, settings = self._runtime_context, self._settings
        watch = commit_probe(context.metrics, context.on_store_corrupt, lambda: self.shards.fenced(number, fence))
        partition = Partition(number, fence, self.membership.me.process)
        store = open_shard(settings.store, context.call_threadsafe, watch, partition, self._policy.refuse_after_s)
        shard = Shard(number, fence, store, context, settings, self._owner_key, self.membership.valid)
        # Shared by all shards, because the status page shows them for the whole replica.
        shard.bridge.ctx.fallback = self._ctx.fallback
        shard.bridge.ctx.refused_calls = self._ctx.refused_calls
        return shard

    def _bridge_of(self, token: str) -> Bridge | None:
        shard = self.agent_service.shard(token)
        return None if shard is None else shard.bridge

    def _others(self) -> list[Member]:
        return [each for each in self.membership.view.members.values() if each.process != self.membership.me.process]

    def _about_replicas(self) -> dict[str, Any]:
        view, me = self.membership.view, self.membership.me.process
        holders, members = view.holders(), view.members
        return {
            "replica": self.membership.me.name,
            "shards": self.shards.count,
            "owned": sorted(shard.number for shard in self.shards.serving()),
            "unowned": self.shards.count - len(holders),
            "replicas": [
                {
                    "name": member.name,
                    "self": process == me,
                    "leaving": member.leaving,
                    "shards": sum(holder == process for holder in holders.values()),
                }
                for process, member in sorted(members.items(), key=lambda item: (item[1].name, item[0]))
            ],
        }

    def _make_listener(self) -> ClusterListener:
        settings, context = self._settings, self._runtime_context
        cluster = settings.cluster
        # Close these connections after those of the agents that they are paired with.
        keepalive_s = settings.listen.keepalive_s + KEEPALIVE_S
        listen = msgspec.structs.replace(
            settings.listen, host=cluster.host, port=cluster.port, tls=TlsFiles(), keepalive_s=keepalive_s
        )
        sunset = sunset_headers(settings.sunset)
        return ClusterListener(
            listen,
            self.agent_service,
            load(),
            context.metrics,
            token=None if settings.upstream.own_tokens else context.read_token,
            static_headers=lambda: sunset,
            fallback=self.fallback,
            refused_calls=self._ctx.refused_calls,
            context=self._tls,
            secret=lambda: self._pairs.secret,
            owned=lambda token: not self.forwarder.elsewhere(token),
            operate=self._operators.carry_out,
        )

    # --- forwarding.Directory -----------------------------------------------------------------------------------------

    def place(self, token: str) -> int | None:
        """Return the shard of a caller, `None` without a token where one is needed."""
        return self._places.place(token)

    def serves(self, shard: int) -> bool:
        """Return whether this replica owns a shard and can serve it now."""
        return self.shards.usable(shard) is not None

    def owner(self, shard: int) -> Member | None:
        """Return the living replica that owns a shard."""
        return self.membership.view.owner(shard)

    def is_me(self, member: Member) -> bool:
        """Return whether `member` is this replica."""
        return member.process == self.membership.me.process

    def outdated(self) -> None:
        """Request a new read of the leases."""
        self.membership.look_soon()

    def living(self) -> frozenset[str]:
        """Return the processes of all replicas that live."""
        return frozenset(self.membership.view.members)

    async def change(self, at_most_s: float) -> None:
        """Wait for a change of the view, at most the given time."""
        await self.membership.change(at_most_s)

    @property
    def stopping(self) -> bool:
        """True while this replica stops."""
        return self.shards.stopping

    # --- composition.Composition --------------------------------------------------------------------------------------

    async def open(self, waiting: Callable[[], Awaitable[None]]) -> None:
        """Connect to the database, check the common settings, and become a member.

        While the database cannot be reached, `waiting` is called before each further attempt. Raises `StartError`,
        `ConfigError`, and `StoreError` for an error that does not end by itself.
        """
        self._listener.bind()
        await self._insist(lambda: asyncio.to_thread(prepare, self._settings.store), waiting)
        agreement = await self._insist(self.membership.agree, waiting)
        self.shards.count, self._owner_key = agreement.shards, agreement.owner_key
        self._pairs.secret = self._operators.pairs.secret = agreement.secret
        self._places.agree(agreement.owner_key, agreement.shards)
        host, port = await self._listener.start()
        self.addresses["cluster"] = f"{host}:{port}"
        address = advertised(self._settings.cluster.advertise or (f"[{host}]" if ":" in host else host), port)
        self.membership.me = replace(self.membership.me, address=address)
        await self._insist(self.membership.join, waiting)

    async def _insist(self, step: Callable[[], Awaitable[T]], waiting: Callable[[], Awaitable[None]]) -> T:
        """Repeat a step while the database cannot be reached. Raises `StoreError`, `ConfigError`.

        There is no limit: a process that ended here would be restarted later and later by its orchestrator.
        """
        logged = ""
        while True:
            try:
                return await step()
            except StoreUnreachable as error:
                if str(error) != logged:
                    logged = str(error)
                    log.warning("database_awaited", error=logged)
                await waiting()
                await asyncio.sleep(RETRY_S)

    def start(self) -> None:
        """Start to renew the membership, to take shards and to serve other replicas."""
        works = (
            *self.membership.works(),
            ("shards", self.shards.run()),
            ("forwarder", self.forwarder.run()),
            ("operators", self._operators.run()),
        )
        for name, work in works:
            task = self._runtime_context.spawn(name, work)
            if task is not None:
                self._tasks.append(task)
        log.info("replica_started", replica=self.membership.me.name, shards=self.shards.count)

    def quiesce(self) -> None:
        """Answer waiting calls, and stop taking shards."""
        self.shards.stopping = self.membership.leaving = self.subject.stopping = True
        for bridge in self.shards.bridges():
            bridge.quiesce()

    async def stop(self) -> None:
        """Release all shards, so that other replicas can take them at once."""
        try:
            async with asyncio.timeout(STOP_S):
                await self.shards.give_all()
                await self.membership.leave()
        except (TimeoutError, StoreError):
            log.warning("shards_left", hint="their leases run out by themselves")
        await self._listener.stop()

    async def close(self) -> None:
        """Close all parts of the replica."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.shards.close()
        self._pairs.close()
        self._operators.pairs.close()
        await self._database.close()

    def reload(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = self.subject.ctx.settings = settings
        self.shards.reload(settings)

    def token_changed(self) -> None:
        """Use the current upstream token for new connections."""
        for bridge in self.shards.bridges():
            bridge.token_changed()


def advertised(address: str, port: int) -> str:
    """Return the address for other replicas. The port defaults to the one that is listened on."""
    return address if re.search(r":\d+\Z", address) and not address.endswith("]") else f"{address}:{port}"


def agreed(settings: Settings) -> dict[str, Any]:
    """Return the settings that all replicas must have in common, by key."""
    return {
        "cluster.lease_s": settings.cluster.lease_s,
        "upstream.url": origin_of(settings.upstream.url),
        "upstream.share_link": settings.upstream.share_link,
        "upstream.token": "each agent's own" if settings.upstream.own_tokens else "configured",
    }
