"""One replica among others: connects, starts and stops the parts, and returns the status of all replicas.

Usage: docs/how-to/several-replicas.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from socket import gethostname
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from shim.agent_api import Backends
from shim.agent_api.internal import OPERATOR, ClusterListener
from shim.bridge import Bridge, BridgeContext
from shim.cluster.admin_actions import ClusterAdmin, ReplicaClient
from shim.cluster.connection_pool import ConnectionPool, make_identity
from shim.cluster.database import Database
from shim.cluster.forwarding import ReplicaForwarder
from shim.cluster.membership import Membership, new_process
from shim.cluster.router import ClusterFallback, Router
from shim.cluster.shard import Shard
from shim.cluster.shard_manager import ShardLocator, ShardManager
from shim.config.settings import Settings, TlsFiles
from shim.core.records import Operation, StoreContents, StoreOperation
from shim.core.shards import LeasePolicy, Member
from shim.errors import StoreError, StoreUnreachable
from shim.fallback import WebSocketProxy, sunset_headers
from shim.hosts import host_and_port
from shim.log import get
from shim.management.subject import Subject
from shim.metrics import ClusterMetrics
from shim.ports import StoreDone
from shim.protocol.dialects import load
from shim.protocol.http import origin_of
from shim.runtime import RuntimeContext
from shim.store import CallThreadsafe, Partition, commit_probe, open_shard
from shim.store.postgres.database import prepare
from shim.store.postgres.dsn import application, conninfo

log = get(__name__)

RETRY_S = 1.0
STOP_S = 3.0
KEEPALIVE_S = 60.0
_Result = TypeVar("_Result")


def replicas_status(membership: Membership, shards: ShardManager) -> dict[str, Any]:
    """Return all replicas as this one sees them, for the status page."""
    view, me = membership.view, membership.me
    holders = view.holders()
    return {
        "replica": me.name,
        "shards": shards.count,
        "owned": sorted(shard.number for shard in shards.serving()),
        "unowned": shards.count - len(holders),
        "replicas": [
            {
                "name": member.name,
                "self": process == me.process,
                "leaving": member.leaving,
                "shards": sum(holder == process for holder in holders.values()),
            }
            for process, member in sorted(view.members.items(), key=lambda item: (item[1].name, item[0]))
        ],
    }


class DatabaseProbe:
    """A `ports.CommandStore` for the readiness probe of a replica, which may own no shard.

    `answers` returns whether the database answers.
    """

    def __init__(self, answers: Callable[[], bool], call_threadsafe: CallThreadsafe) -> None:
        self._answers = answers
        self._call_threadsafe = call_threadsafe

    def open(self) -> StoreContents:
        """Return empty contents."""
        return StoreContents(b"")

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        """Report success if the database answers, and an error otherwise."""
        del operation, also
        if done is not None:
            fault: Any = None if self._answers() else StoreError("the database does not answer")
            self._call_threadsafe(partial(done, fault))

    def close(self) -> None:
        """Do nothing."""


class Replica:
    """`runtime.Runtime` of one replica among others."""

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
        self.membership = Membership(
            database, me, agreed(settings), self._policy, context.clock, context.timers, self._lease_lost
        )
        self.shards = ShardManager(
            self.membership, self._make_shard, self._opened, context.clock, context.spawn, self._metrics
        )
        self.addresses: dict[str, str] = {}
        self._owner_key = b""
        self._pool = ConnectionPool()
        self._locator = ShardLocator(self.shards, self.membership, own_tokens=settings.upstream.own_tokens)
        self._ctx = self._bridge_context()
        self._admin_pool = ConnectionPool(OPERATOR)
        client = ReplicaClient(self.membership, self._admin_pool)
        about = partial(replicas_status, self.membership, self.shards)
        self.subject = Subject(self._ctx, self.shards.bridges, about, client.ask_others)
        self._admin = ClusterAdmin(self.subject, client, self.membership, self._locator, context.spawn_isolated)
        self.agent_service = self.evidence = Router(self._locator, self._current)
        self.forwarder = ReplicaForwarder(
            self._locator,
            self.membership,
            self._pool,
            context.clock,
            self._metrics,
            lambda: self._settings.commands.evidence_s,
        )
        self.fallback = ClusterFallback(self._locator, self.shards, self._current, context.clock)
        self.websockets = WebSocketProxy(
            self._current, context.metrics, context.spawn_isolated, self._admin.websocket_event
        )
        context.metrics.websocket_connections.set_function(self.websockets.count)
        self._listener = self._make_listener()
        self._tasks: list[asyncio.Task[None]] = []

    def _current(self) -> Settings:
        return self._settings

    def _lease_lost(self, reason: str) -> None:
        self.shards.lease_lost(reason)
        self._admin.lease_lost()

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

    def _opened(self, bridge: Bridge) -> None:
        self.subject.admin_actions.include(bridge)

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
            Backends(self.agent_service, self.evidence, self.fallback),
            load(),
            context.metrics,
            token=None if settings.upstream.own_tokens else context.token_for_agents,
            static_headers=lambda: sunset,
            refused_calls=self._ctx.refused_calls,
            context=self._tls,
            secret=lambda: self._pool.secret,
            owned=lambda token: not self._locator.is_elsewhere(token),
            operate=self._admin.carry_out,
        )

    # --- runtime.Runtime --------------------------------------------------------------------------------------

    async def open(self, waiting: Callable[[], Awaitable[None]]) -> None:
        """Connect to the database, check the common settings, and become a member.

        While the database cannot be reached, `waiting` is called before each further attempt. Raises `StartError`,
        `ConfigError`, and `StoreError` for an error that does not end by itself.
        """
        await self._listener.bind()
        await self._retry(lambda: asyncio.to_thread(prepare, self._settings.store), waiting)
        agreement = await self._retry(self.membership.agree, waiting)
        self.shards.count, self._owner_key = agreement.shards, agreement.owner_key
        self._pool.secret = self._admin_pool.secret = agreement.secret
        self._locator.agree(agreement.owner_key, agreement.shards)
        host, port = await self._listener.start()
        self.addresses["cluster"] = host_and_port(host, port)
        address = advertised(self._settings.cluster.advertise or (f"[{host}]" if ":" in host else host), port)
        self.membership.me = replace(self.membership.me, address=address)
        await self._retry(self.membership.join, waiting)

    async def _retry(self, step: Callable[[], Awaitable[_Result]], waiting: Callable[[], Awaitable[None]]) -> _Result:
        """Repeat a step while the database cannot be reached. Raises `StoreError`, `ConfigError`.

        There is no limit: a process that ended here would be restarted later and later by its orchestrator.
        """
        logged = ""
        while True:
            try:
                return await step()
            except StoreUnreachable as error:
                # Probes are answered from here on, so that whoever reads the line may ask.
                await waiting()
                if str(error) != logged:
                    logged = str(error)
                    log.warning("database_awaited", error=logged)
                await asyncio.sleep(RETRY_S)

    def start(self) -> None:
        """Start to renew the membership, to acquire shards and to serve other replicas."""
        tasks = (
            *self.membership.tasks(),
            ("shards", self.shards.run()),
            ("forwarder", self.forwarder.run()),
            ("drains", self._admin.run()),
        )
        for name, task_body in tasks:
            task = self._runtime_context.spawn(name, task_body)
            if task is not None:
                self._tasks.append(task)
        log.info("replica_started", replica=self.membership.me.name, shards=self.shards.count)

    def quiesce(self) -> None:
        """Answer waiting calls, and stop acquiring shards."""
        self.membership.leaving = self.subject.stopping = True
        for bridge in self.shards.bridges():
            bridge.quiesce()

    async def stop(self) -> None:
        """Release all shards, so that other replicas can take them at once."""
        try:
            async with asyncio.timeout(STOP_S):
                await self.shards.release_all()
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
        self._pool.close()
        self._admin_pool.close()
        await self._database.close()

    def reload(self, settings: Settings) -> None:
        """Apply new settings."""
        self._settings = self.subject.ctx.settings = settings
        self.fallback.reload()
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
