"""The bridge between agents' calls and upstream messages: wires its parts together and offers them to the frontend."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from functools import lru_cache
from itertools import count
from typing import Any

from shim.bridge.connection import Connection
from shim.bridge.context import DEFAULT_OWNER, Context
from shim.bridge.delivery import Delivery, Offering
from shim.bridge.gateway import Gateways, Leg
from shim.bridge.inbound import LINK_KIND, Inbound
from shim.bridge.links import LinkRunner, LinkSet
from shim.bridge.outbox import Outbox
from shim.bridge.presence import Presence
from shim.bridge.registrations import Job, Registrations
from shim.bridge.roster import Roster, outcome_of
from shim.core import link as l
from shim.core.calls import (
    Accepted,
    AgentCall,
    Commands,
    Failed,
    HealthCall,
    Healthy,
    HeartbeatCall,
    Outcome,
    PollCall,
    RegisterCall,
    ResultCall,
    StatusCall,
    TunnelInfo,
    TunnelInfoCall,
    TunnelPollCall,
    TunnelState,
)
from shim.core.records import AddTrace, Loaded, Prune, PutResult, SessionKey, TraceEntry
from shim.core.sessions import Session
from shim.core.timestamps import rfc3339
from shim.errors import AgentError, StoreError
from shim.logs import get
from shim.messages import Message
from shim.ports import Answer, Client, Lease

log = get("bridge")

SWEEP_S = 1.0
HOUSEKEEPING_S = 600.0
UNPOLLED_WARNING_S = 600.0
STORE_RETRY_AFTER_S = 5


class _LinkSource:
    """`inbound.Source` for a link's own connection."""

    def __init__(self, bridge: Bridge, runner: LinkRunner) -> None:
        self._bridge = bridge
        self._runner = runner
        self.owner = runner.owner
        self.link_name = runner.name

    def sessions(self) -> Iterable[Session]:
        return self._bridge.sessions_of(self._runner)

    def gateway_offered(self, session: Session, url: str) -> None:
        self._bridge.gateways.offered(session, self._runner, url)

    def introduce(self, session: Session) -> None:
        self._bridge.presence.introduce(session)


class _LegSource(_LinkSource):
    """`inbound.Source` for a gateway connection, which carries one session."""

    def __init__(self, bridge: Bridge, leg: Leg) -> None:
        super().__init__(bridge, leg.runner)
        self._leg = leg

    def sessions(self) -> Iterable[Session]:
        return (self._leg.session,)


class Bridge:
    """Implements `ports.Switchboard`. Every change happens synchronously on the event loop; only answers are awaited."""

    def __init__(self, ctx: Context) -> None:
        serials = count(1)
        self.ctx = ctx
        self.links = LinkSet(ctx, self, serials)
        self.registrations = Registrations(ctx, self)
        self.outbox = Outbox(ctx, self._route, self._result_closed)
        self.delivery = Delivery(ctx, self.outbox)
        self.roster = Roster(ctx)
        self.gateways = Gateways(
            ctx, serials, self._gateway_up, self._gateway_down, self._gateway_message, self.connection_fenced
        )
        self.presence = Presence(ctx, self.registrations, self.runner_of, self.gateways.connection_of)
        self.inbound = Inbound(ctx, self.registrations, self.roster, self.delivery, self.outbox)
        self.roster.moved = self._moved
        self.roster.ended = self._ended
        self.stopping = False
        self._owner_of = lru_cache(maxsize=4096)(self._hash_owner)
        self._link_of: dict[SessionKey, str] = {}
        self._sources: dict[LinkRunner, _LinkSource] = {}
        self._housekept_at = ctx.now

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, loaded: Loaded) -> None:
        """Take in what the store holds; with a configured token dial at once."""
        self.ctx.owner_key = loaded.key
        self.roster.load(loaded)
        self.outbox.loaded(loaded.outbox_owners)
        self.delivery.load(loaded.commands)
        for key, command_id, request_id in loaded.quarantined_commands:
            if key is not None and command_id:
                self.outbox.report(
                    key,
                    self.ctx.sessions.get(key),
                    command_id,
                    request_id,
                    code="malformed",
                    error="the stored command could not be read",
                )
        upstream = self.ctx.settings.upstream
        if not upstream.own_tokens and upstream.share_link:
            self.links.get(DEFAULT_OWNER, DEFAULT_OWNER, "").wanted()
        self.ctx.timers.call_later(SWEEP_S, self._sweep)

    def stop(self) -> None:
        """Answer held polls, close links. The store is closed by its owner, after this."""
        self.stopping = True
        self.delivery.end_all()
        self.gateways.stop()
        self.links.stop()

    def _sweep(self) -> None:
        if self.stopping:
            return
        now = self.ctx.now
        self.roster.sweep_superseded()
        self.gateways.sweep(now)
        for key, queue in self.delivery.queues():
            session = self.ctx.sessions.get(key)
            if session is not None:
                self._warn_unpolled(session, len(queue), now)
        if now - self._housekept_at >= HOUSEKEEPING_S:
            self._housekept_at = now
            self.roster.expire()
            commands = self.ctx.settings.commands
            kept_s = max(commands.retain_s, commands.dedupe_s)
            self.ctx.store.submit([Prune(self.ctx.clock.wall_s() - kept_s)])
        self.ctx.timers.call_later(SWEEP_S, self._sweep)

    def _warn_unpolled(self, session: Session, waiting: int, now: float) -> None:
        since = max(session.first_waiting_at or now, session.poll_at or 0.0)
        if not session.waiting_reported and now - since >= UNPOLLED_WARNING_S:
            session.waiting_reported = True
            log.warning(
                "commands_not_polled",
                session=session.key.ident,
                commands=waiting,
                hint="this agent has not polled for 10 minutes; stock agents never fetch commands",
            )

    # --- ports.Switchboard --------------------------------------------------------------------------------------------

    async def call(self, client: Client, call: AgentCall, arrived_s: float) -> Answer:
        """Carry out an agent's call (`ports.Switchboard.call`)."""
        owner = self.owner_of(client.token)
        if owner is None and not isinstance(call, HealthCall):
            return Answer(Failed(401, "a Bearer token is required"))
        owner = owner or ""
        try:
            match call:
                case HeartbeatCall():
                    return Answer(self._heartbeat(owner, client, call))
                case PollCall():
                    return await self._poll(owner, client, call)
                case RegisterCall():
                    return Answer(await self._register(owner, client, call, arrived_s))
                case ResultCall():
                    return Answer(await self._result(owner, client, call))
                case StatusCall():
                    return Answer(self._status(owner, client, call))
                case TunnelPollCall():
                    return Answer(self._tunnel_poll(owner, client, call))
                case TunnelInfoCall():
                    return Answer(self._tunnel_info(owner, call))
                case HealthCall():
                    return Answer(Healthy())
        except AgentError as error:
            return Answer(Failed(error.status, str(error), error.retry_after_s))

    def written(self, lease: Lease) -> None:
        """The whole reply was handed to the kernel."""
        assert isinstance(lease, Offering)
        self.delivery.written(lease)

    def unwritten(self, lease: Lease) -> None:
        """It was not."""
        assert isinstance(lease, Offering)
        self.delivery.unwritten(lease)

    def next_request(self, connection: int) -> None:
        """Another request arrived on a connection that carried an offer."""
        self.delivery.next_request(connection)

    def connection_closed(self, connection: int, clean: bool) -> None:
        """A connection that carried an offer is gone."""
        self.delivery.connection_closed(connection, clean)

    # --- owners and routes --------------------------------------------------------------------------------------------

    def owner_of(self, token: str) -> str | None:
        """Whose sessions a caller sees (protocol.md §1.6); `None` without a token where one is needed."""
        if not self.ctx.settings.upstream.own_tokens:
            return DEFAULT_OWNER
        return self._owner_of(token) if token else None

    def _hash_owner(self, token: str) -> str:
        return hmac.digest(self.ctx.owner_key, token.encode("utf-8", "surrogatepass"), "sha256").hex()

    def runner_of(self, session: Session) -> LinkRunner | None:
        """The link that a session's traffic takes (before any gateway)."""
        return self.links.find(self._link_name(session))

    def _link_name(self, session: Session) -> str:
        name = self._link_of.get(session.key)
        return name if name is not None else self.links.name_for(session.key.owner, str(session.key))

    def _link_for(self, session: Session, client: Client) -> LinkRunner:
        runner = self.links.get(session.key.owner, self._link_name(session), client.token)
        runner.wanted()
        return runner

    def sessions_of(self, runner: LinkRunner) -> list[Session]:
        """The sessions whose link this is."""
        return [s for s in self.ctx.sessions.of_owner(runner.owner) if self._link_name(s) == runner.name]

    def _route(self, key: SessionKey) -> Connection | None:
        if key.kind == LINK_KIND:
            runner = self.links.find(key.ident)
            return runner.up_connection if runner is not None else None
        session = self.ctx.sessions.get(key)
        return self.presence.route(session) if session is not None else self._any_connection(key.owner)

    def _any_connection(self, owner: str) -> Connection | None:
        """For results of a session that is gone."""
        return next((r.up_connection for r in self.links if r.owner == owner and r.up_connection), None)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _heartbeat(self, owner: str, client: Client, call: HeartbeatCall) -> Outcome:
        session = self.roster.heartbeat(owner, call)
        runner = self._link_for(session, client)
        self.presence.called(session)
        return self._verdict(runner)

    def _verdict(self, runner: LinkRunner) -> Outcome:
        if runner.machine.refused:
            return Failed(401, "the controller refuses the token")
        down = runner.state in (l.LinkState.WAITING, l.LinkState.STOPPED)
        if down and self.ctx.settings.heartbeat.when_link_down == "fail":
            return Failed(503, "the controller cannot be reached", retry_after_s=STORE_RETRY_AFTER_S)
        return Accepted()

    def _status(self, owner: str, client: Client, call: StatusCall) -> Outcome:
        session = self.roster.called(owner, call.target, call.dialect)
        self._link_for(session, client)
        self.presence.called(session)
        self.presence.status(session, call.body)
        return Accepted()

    async def _register(self, owner: str, client: Client, call: RegisterCall, arrived_s: float) -> Outcome:
        stored = self.roster.stored_for(owner, call)
        identity = call.agent_id if call.known_by_agent else call.name
        name = self._link_name(stored) if stored is not None else self.links.name_for(owner, identity)
        runner = self.links.get(owner, name, client.token)
        runner.wanted()
        if stored is not None and stored.upstream_cluster_id:
            call.payload.setdefault("cluster_id", stored.upstream_cluster_id)

        def cached() -> Outcome | None:
            known = self.roster.stored_for(owner, call)
            if known is None:
                return None
            known.contact(self.ctx.now, self.ctx.clock.wall_s())
            return outcome_of(known, cached=True)

        return await self.registrations.register(runner, call, cached, arrived_s)

    async def _result(self, owner: str, client: Client, call: ResultCall) -> Outcome:
        session = self.roster.called(owner, call.target, call.dialect)
        self._link_for(session, client)
        wall = self.ctx.clock.wall_s()
        payload: dict[str, Any] = {
            "command_id": call.command_id,
            "cluster_id": session.upstream_cluster_id,
            "agent_id": session.agent_id,
            **call.body,
        }
        payload.setdefault("timestamp", rfc3339(wall))
        stored: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        key = session.key

        def done(outcome: list[Any] | StoreError) -> None:
            # Also after the agent hung up: what is on disk is on its way.
            failed = isinstance(outcome, StoreError)
            if not isinstance(outcome, StoreError):
                self._result_stored(key, call.command_id, outcome[0])
            if not stored.done():
                stored.set_result(not failed)

        trace = AddTrace(key, (call.command_id,), TraceEntry(wall, "result", f"success {call.body.get('success')}"))
        self.ctx.store.submit([PutResult(key, call.command_id, payload, wall), trace], done)
        self.presence.called(session)
        if await stored:
            return Accepted()
        return Failed(503, "the result cannot be stored now", retry_after_s=STORE_RETRY_AFTER_S)

    def _result_stored(self, key: SessionKey, command_id: str, outcome: Any) -> None:
        self.ctx.metrics.results.labels(
            "repeat" if outcome.entry is None else "known" if outcome.known else "unknown"
        ).inc()
        log.info("result_stored", command=command_id, session=key.ident, known=outcome.known)
        if outcome.entry is not None:
            self.outbox.added(outcome.entry)
        self.delivery.answered(key, command_id)

    def _result_closed(self, key: SessionKey, command_id: str) -> None:
        log.info("result_closed", command=command_id, session=key.ident)

    async def _poll(self, owner: str, client: Client, call: PollCall) -> Answer:
        session = self.roster.called(owner, call.target, call.dialect)
        session.poll_at = self.ctx.now
        self._link_for(session, client)
        hold_s = self._hold_s(session)
        poll = self.delivery.poll(session.key, client.connection, hold=hold_s > 0)
        if poll.offered.done():
            self.presence.called(session)
        else:
            await self._wait(session, poll, hold_s)
        offering = poll.offered.result()
        commands = offering.commands if offering is not None else ()
        poll.offering = None
        return Answer(Commands(commands, self.ctx.settings.poll.frequency_s), offering)

    async def _wait(self, session: Session, poll: Any, hold_s: float) -> None:
        """Wait for the poll's answer: the disk's, if an offer is on its way, else up to `hold_s` for a command."""
        timer = None
        self.presence.hold_started(session)
        try:
            if poll.offering is None:
                timer = self.ctx.timers.call_later(hold_s, lambda: self.delivery.end_poll(session.key, poll))
            await poll.offered
        except asyncio.CancelledError:
            self.delivery.abandon(session.key, poll)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self.presence.hold_ended(session)

    def _hold_s(self, session: Session) -> float:
        hold = self.ctx.settings.poll.hold
        if self.stopping or not isinstance(hold, (int, float)):
            return 0.0
        return min(float(hold), self.ctx.settings.poll.max_hold_s)

    def _tunnel_poll(self, owner: str, client: Client, call: TunnelPollCall) -> Outcome:
        session = self.roster.known(owner, call.target)
        frequency_s = self.ctx.settings.poll.frequency_s
        if session is None:
            return TunnelState(None, frequency_s)
        self._link_for(session, client)
        self.presence.called(session)
        return TunnelState(session.tunnel, frequency_s)

    def _tunnel_info(self, owner: str, call: TunnelInfoCall) -> Outcome:
        session = self.roster.known(owner, call.target)
        if session is None or not session.reply:
            return Failed(404, "not registered")
        return TunnelInfo(outcome_of(session, cached=False))

    # --- registrations.RegistrationListener ---------------------------------------------------------------------------

    def registered(self, job: Job, reply: dict[str, Any], connection: Connection) -> Outcome:
        """The controller accepted a registration."""
        session = self.roster.register(job.runner.owner, job.call, job.session, job.payload, reply)
        job.session = session
        self._link_of[session.key] = job.runner.name
        return outcome_of(session, cached=False)

    def told(self, session: Session, connection: Connection) -> None:
        """The controller has just been told about this session."""
        self.presence.told(session, connection)

    # --- links.LinkListener -------------------------------------------------------------------------------------------

    def link_opened(self, runner: LinkRunner) -> None:
        """Replay the registration of every fresh session."""
        now = self.ctx.now
        identity = self.presence.identity()
        todo: list[tuple[Session, dict[str, Any]]] = []
        for session in self.sessions_of(runner):
            if session.fresh(now) and (session.registration or session.key.kind == "agent"):
                payload = session.register_payload(identity)
                if payload is not None:
                    todo.append((session, payload))
        self.registrations.replay(runner, todo)

    def link_online(self, runner: LinkRunner) -> None:
        """Results that were held back, then the newest heartbeats."""
        self.outbox.online(runner.owner)
        self.presence.online(runner, self.sessions_of(runner))

    def link_offline(self, runner: LinkRunner, connection: Connection) -> None:
        """What was awaited on the connection will not come."""
        self.registrations.link_lost(runner)
        self.outbox.offline(connection)

    def link_refused(self, runner: LinkRunner) -> None:
        """The token is refused."""
        log.error("token_refused", link=runner.name[:16], hint="check upstream.token and its permissions")
        self.registrations.link_refused(runner)

    def link_needed(self, runner: LinkRunner) -> bool:
        """Whether a fresh session speaks over it (one that moved to its gateway does not), or a result was never sent."""
        now = self.ctx.now
        if any(s.fresh(now) and self.gateways.connection_of(s.key) is None for s in self.sessions_of(runner)):
            return True
        return self.outbox.unsent_for(runner.owner)

    def connection_message(self, connection: Connection, message: Message, runner: LinkRunner) -> None:
        """A message on a link's connection."""
        source = self._sources.get(runner)
        if source is None:
            source = self._sources[runner] = _LinkSource(self, runner)
        self.inbound.handle(connection, message, source)

    def connection_fenced(self, connection: Connection, seqs: tuple[int, ...]) -> None:
        """The controller has these results."""
        self.outbox.fenced(seqs)

    # --- gateways -----------------------------------------------------------------------------------------------------

    def _gateway_up(self, leg: Leg) -> None:
        self.outbox.online(leg.session.key.owner)
        self.presence.called(leg.session, force=True)

    def _gateway_down(self, leg: Leg, connection: Connection) -> None:
        self.outbox.offline(connection)
        if not self.stopping and leg.session.fresh(self.ctx.now):
            leg.session.told_on = 0
            leg.runner.wanted()
            self.presence.introduce(leg.session)

    def _gateway_message(self, connection: Connection, message: Message, leg: Leg) -> None:
        self.inbound.handle(connection, message, _LegSource(self, leg))

    # --- sessions that move or end ------------------------------------------------------------------------------------

    def _moved(self, source: SessionKey, target: SessionKey) -> None:
        self._link_of.pop(source, None)
        self.gateways.forget(source)
        self.presence.forget(source)
        self.delivery.move(source, target)

    def _ended(self, key: SessionKey) -> None:
        self._link_of.pop(key, None)
        self.gateways.forget(key)
        self.presence.forget(key)
        self.delivery.end_session(key)
