"""The bridge itself: the wiring of its parts and the interface for the agent API."""

from __future__ import annotations

from collections.abc import Iterator

from shim.bridge.admin_actions import AdminActions
from shim.bridge.agent_calls import AgentCallHandler
from shim.bridge.command_queues import CommandQueues
from shim.bridge.context import DEFAULT_OWNER, BridgeContext, EventQueue, TimerGroup
from shim.bridge.delivery import CommandDelivery
from shim.bridge.event_handlers import EventHandlers
from shim.bridge.gateway_redirect import GatewayConnections
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.http_fallback import HttpFallbackBridge
from shim.bridge.link_pool import LinkPool
from shim.bridge.long_polls import LongPolls
from shim.bridge.outbox import Outbox, Rejections
from shim.bridge.registration import Registrations
from shim.bridge.scheduler import TICK_S, PeriodicTask, PeriodicTasks
from shim.bridge.session_registry import SessionRegistry
from shim.bridge.upstream_messages import UpstreamMessageHandler
from shim.bridge.websocket_agents import WebSocketAgents
from shim.core.records import CheckStore, Prune, SessionKey, StoreContents
from shim.core.sessions import Sessions


class Bridge:
    """All parts of the bridge. `calls` serves agents' calls, `delivery` receives the evidence of their replies.

    State changes only synchronously, on the event loop. A call that has to wait is a coroutine.
    """

    def __init__(self, ctx: BridgeContext) -> None:
        self._timers = ctx.timers = TimerGroup(ctx.timers, ctx.clock)
        ctx.events = EventQueue(ctx.timers, ctx.metrics)
        self.ctx = ctx
        self.links = LinkPool(ctx)
        self.registrations = Registrations(ctx)
        self.session_registry = SessionRegistry(ctx, self._moved, self._ended, self.links.token_accepted)
        self.gateways = GatewayConnections(ctx, self.links.shared)
        self.outbox = Outbox(ctx, self.links.connection_for_key)
        self.queues = CommandQueues(ctx, self.outbox)
        rejections = Rejections(ctx, self.outbox)
        self.delivery = CommandDelivery(ctx, self.queues, self.outbox, rejections)
        self.heartbeats = HeartbeatForwarder(ctx, self.registrations, self.links)
        self.long_polls = LongPolls(ctx, self.links, self.session_registry, self.delivery, self.heartbeats)
        messages = UpstreamMessageHandler(
            ctx, self.links, self.registrations, self.session_registry, self.delivery, rejections, self.long_polls
        )
        self.links.shared.receive = self.gateways.receive = messages.handle
        self.links.has_unsent_results = self.outbox.unsent_for
        EventHandlers(
            ctx,
            self.links,
            self.gateways,
            self.registrations,
            self.session_registry,
            self.outbox,
            self.heartbeats,
        ).install()
        self.admin_actions = AdminActions(
            ctx, self.queues, self.outbox, self.delivery, self.registrations, self.session_registry
        )
        self.http_fallback = HttpFallbackBridge(ctx, self.links, self.session_registry, self.queues, self.delivery)
        self.calls = AgentCallHandler(
            ctx, self.links, self.session_registry, self.registrations, self.outbox, self.long_polls, self.heartbeats
        )
        self.websocket_agents = WebSocketAgents(ctx, self.links.owner_of)
        self._upkeep = PeriodicTasks(ctx, self._periodic_tasks())

    def _periodic_tasks(self) -> tuple[PeriodicTask, ...]:
        return (
            (TICK_S, self.links.sweep),
            (TICK_S, self.queues.sweep),
            (TICK_S, self.session_registry.sweep),
            (TICK_S, self.heartbeats.settle),
            (TICK_S, self.gateways.sweep),
            (TICK_S, self.queues.warn_unpolled),
            (TICK_S, self.heartbeats.sweep),
            (TICK_S, self.links.check_idle),
            (TICK_S, self.registrations.sweep),
            (30, self._look_after_store),
            (60, self._save_holds),
            (600, self._forget_old),
        )

    @property
    def sessions(self) -> Sessions:
        """The sessions of all agents."""
        return self.ctx.sessions

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, loaded: StoreContents) -> None:
        """Load the stored state and dial at once if a token is configured."""
        self.ctx.owner_key = loaded.key
        self.session_registry.load(loaded)
        self.outbox.has_stored_entries(loaded.outbox_owners)
        self.queues.load(loaded.commands)
        for key, command_id, request_id in loaded.quarantined_commands:
            if key is not None and command_id:
                self.outbox.report_failure(
                    key,
                    self.ctx.sessions.get(key),
                    command_id,
                    request_id,
                    code="malformed",
                    error="the stored command could not be read",
                )
        upstream = self.ctx.settings.upstream
        wanted = self.ctx.settings.mode != "http" or bool(loaded.outbox_owners)
        if wanted and not upstream.own_tokens and upstream.share_link:
            self.links.get(DEFAULT_OWNER, DEFAULT_OWNER, "").ensure_connected(self.ctx.now)
        self._upkeep.start()

    def quiesce(self) -> None:
        """Answer every waiting call: held polls with an empty list, registrations with 503."""
        self.registrations.end_all()
        self.long_polls.end_all()
        self.delivery.end_all()
        for _ in self._save_holds():
            pass

    def stop(self) -> None:
        """Answer every waiting call and close all links. The caller closes the store afterwards.

        Events that happened before are handled first: a result that the controller has confirmed is not sent again.
        """
        self.quiesce()
        self.ctx.events.handle_all()
        self.admin_actions.stop()
        self.gateways.stop()
        self.links.stop()
        self._timers.close()

    def _look_after_store(self) -> None:
        self.ctx.store.submit(CheckStore())

    def _save_holds(self) -> Iterator[None]:
        for session in self.ctx.sessions:
            yield
            if session.holds_changed and self.ctx.sessions.get(session.key) is session:
                self.session_registry.persistence.save_session(session)

    def _forget_old(self) -> None:
        self.session_registry.expire()
        commands = self.ctx.settings.commands
        kept_s = max(commands.retain_s, commands.dedupe_s)
        self.ctx.store.submit(Prune(self.ctx.clock.wall_s() - kept_s))

    def token_changed(self) -> None:
        """Dial every link again with the new configured token."""
        self.links.token_changed()
        self.gateways.token_changed()

    # --- sessions that move or end ------------------------------------------------------------------------------------

    def _moved(self, source: SessionKey, target: SessionKey) -> None:
        self.gateways.forget(source)
        self.heartbeats.forget(source)
        self.session_registry.usage.forget(source)
        self.delivery.move(source, target)
        self.outbox.move(source, target)

    def _ended(self, key: SessionKey) -> None:
        self.gateways.forget(key)
        self.heartbeats.forget(key)
        self.session_registry.usage.forget(key)
        self.queues.end_session(key)
