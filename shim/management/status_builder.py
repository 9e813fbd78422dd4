"""Builder of the status, which reads the bridges of this process."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter as Counted
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET
from prometheus_client import Counter, Gauge

from shim import __version__
from shim.bridge.command_queues import unpolled_s
from shim.bridge.links import UpstreamLink
from shim.config.settings import Settings
from shim.core.call_records import FallbackCall, Why
from shim.core.command_queue import CommandQueue, QueuedCommand
from shim.core.records import CommandState, SessionKey, WriteProbe
from shim.core.sessions import MIN_GAPS, Session
from shim.errors import StoreError
from shim.management import call_status
from shim.management.health_summary import summarise
from shim.management.migration import migration, rollout
from shim.management.recent_events import RecentEvents
from shim.management.status import (
    CommandsStatus,
    ControllerStatus,
    DrainStatus,
    FallbackStatus,
    LinksStatus,
    LogStatus,
    RefusedCalls,
    SessionsStatus,
    Status,
    StoreStatus,
    WebSocketAgentsStatus,
)
from shim.management.subject import Subject
from shim.management.time_series import Sampler
from shim.ports import Clock
from shim.protocol.http import fallback_url, origin_of

HOUR_S = 3600.0
MAX_SESSIONS = 200
MAX_LINKS = 20
MAX_WAITING = 50
OWNER_CHARS = 12
SILENT_S = 3 * 86_400.0
"""Seconds after which an agent counts as gone, not as silent: longer than a long weekend."""
CASUAL_SILENT_S = 86_400.0
"""The same for an agent without a known registration or heartbeat: it may have been a single call."""
LOST_SHOWN_S = 3600.0
NOT_POLLING_S = 60.0
"""Seconds without a poll after which waiting commands are reported as a problem."""


_Section = TypeVar("_Section", bound=msgspec.Struct)


class StatusBuilder:
    """Builder of the status of one process, with what it records between `start` and `stop`.

    It is made at the start of the process. `addresses` are those on which the process listens, by name.
    """

    def __init__(
        self,
        bridge: Subject,
        addresses: Mapping[str, str],
        events: RecentEvents | None = None,
    ) -> None:
        self._bridge = bridge
        self.sampler = Sampler(bridge)
        self._events = events
        self._addresses = addresses
        self.started_unix = bridge.ctx.clock.wall_s()
        self._lost = 0
        self._lost_at: float | None = None

    @property
    def settings(self) -> Settings:
        """The present settings."""
        return self._bridge.ctx.settings

    @property
    def clock(self) -> Clock:
        """The clock of the status."""
        return self._bridge.ctx.clock

    def start(self) -> None:
        """Start to sample and to record events."""
        self.sampler.start()
        if self._events is not None:
            self._events.start()

    def stop(self) -> None:
        """Stop sampling and recording."""
        self.sampler.stop()
        if self._events is not None:
            self._events.stop()

    def take(self, not_ready: list[str]) -> Status:
        """Return the status without the time series. `not_ready` has the reasons of `/readyz`."""
        bridge, ctx, started_at = self._bridge, self._bridge.ctx, self.started_unix
        now, wall = ctx.now, ctx.clock.wall_s()
        settings, view = ctx.settings, _View(bridge, now, wall)
        by_http, listen = bool(_value(ctx.metrics.fallback_active)), self._addresses.get("listen")
        replicas = bridge.replicas()
        status = Status(
            now=wall,
            version=__version__,
            started_at=started_at,
            uptime_s=round(wall - started_at, 1),
            mode=settings.mode,
            rollout_percent=settings.rollout.percent,
            rollout_lists=bool(settings.rollout.include or settings.rollout.exclude),
            by_http=by_http,
            upstream=origin_of(settings.upstream.url),
            fallback=origin_of(fallback_url(settings)) if settings.uses_fallback else None,
            listen=listen,
            agents_url=listen and f"{'https' if settings.listen.tls.cert_file else 'http'}://{listen}",
            own_tokens=settings.upstream.own_tokens,
            token_required=bool(settings.admin.token_file),
            config_valid=bool(_value(ctx.metrics.config_valid)),
            store=self._store(),
            log=self._log(now, wall),
            not_ready=not_ready,
            objectives=self.sampler.windows.objectives(now),
            rollout=rollout(bridge, wall),
            drain=self._drain(),
            links=view.links(),
            controller=self._masked(call_status.controller(bridge, wall), ControllerStatus),
            refused=self._masked(call_status.refused_calls(ctx), RefusedCalls),
            fallback_calls=self._masked(call_status.fallback_calls(ctx, active=by_http), FallbackStatus),
            websocket_agents=self._masked(call_status.websocket_agents(bridge), WebSocketAgentsStatus),
            unregistered=call_status.unregistered(bridge, wall),
            sessions=view.sessions(),
            commands=self._commands(view, now),
            migration=migration(bridge, wall, started_at),
            events=list(self._events or ()),
            replicas=UNSET if replicas is None else replicas,
        )
        status.overall = summarise(status)
        return status

    def _masked(self, found: dict[str, Any], kind: type[_Section]) -> _Section:
        """Return a section whose texts come from agents and controller, without secrets."""
        return msgspec.convert(self._bridge.ctx.redaction.value(found), kind)

    def _store(self) -> StoreStatus:
        metrics = self._bridge.ctx.metrics
        return StoreStatus(
            log_bytes=int(_value(metrics.store_log_bytes)),
            log_pinned=bool(_value(metrics.store_log_pinned)),
            replaced=bool(_value(metrics.store_moved_aside)),
        )

    def _commands(self, view: _View, now: float) -> CommandsStatus:
        commands = view.commands()
        commands.latency = self.sampler.latency()
        commands.without_result = self.sampler.windows.without_result(now)
        commands.recent = self._recent()
        return commands

    def _log(self, now: float, wall: float) -> LogStatus:
        """Return the number of lost log lines; `lost` is 0 if the last loss is older than `LOST_SHOWN_S`."""
        lost = int(_value(self._bridge.ctx.metrics.log_lines_dropped))
        if lost > self._lost:
            self._lost, self._lost_at = lost, now
        recent = self._lost_at is not None and now - self._lost_at < LOST_SHOWN_S
        at = None if self._lost_at is None else wall - (now - self._lost_at)
        return LogStatus(lost=lost if recent else 0, lost_total=lost, last=at)

    def _drain(self) -> DrainStatus:
        drain = self._bridge.admin_actions.progress()
        return DrainStatus(
            state=drain.state.value,
            since=drain.since_unix or None,
            deadline_at=drain.deadline_unix or None,
            commands=drain.commands,
            results=drain.results,
            refused=drain.refused,
        )

    def _recent(self) -> list[dict[str, Any]]:
        return [
            {
                "id": recent.id,
                "session": recent.session.ident,
                "type": recent.type or None,
                "arrived_at": recent.arrived_unix or None,
                "event": recent.event,
                "detail": recent.detail,
                "at": recent.wall,
            }
            for recent in self._bridge.recent_commands
        ]


def _value(gauge: Counter | Gauge) -> float:
    return next(iter(gauge.collect())).samples[0].value


class _View:
    """One snapshot of a bridge at one moment."""

    def __init__(self, bridge: Subject, now: float, wall: float) -> None:
        self._bridge = bridge
        self._now = now
        self._wall = wall

    def _wall_of(self, at: float | None) -> float | None:
        return None if at is None else self._wall - (self._now - at)

    # --- links --------------------------------------------------------------------------------------------------------

    def links(self) -> LinksStatus:
        """Return counts and the links, those that are not online first."""
        links = sorted(self._bridge.links, key=lambda link: (link.online, link.name))
        return LinksStatus(
            total=len(links),
            online=sum(link.online for link in links),
            states=dict(Counted(link.state.value for link in links)),
            refused=sum(link.machine.refused for link in links),
            contended=sum(link.machine.contended for link in links),
            items=[self._link(link) for link in links[:MAX_LINKS]],
        )

    def _link(self, link: UpstreamLink) -> dict[str, Any]:
        current = link.history.current
        return {
            "name": link.name[:OWNER_CHARS],
            "state": link.state.value,
            "phase": current.phase.value,
            "since": self._wall_of(current.since_s),
            "reason": link.last_failure or current.reason or None,
            "detail": link.last_detail or None,
            "contended": link.machine.contended,
            "failures": link.machine.failures,
            "timeline": [
                {"phase": segment.phase.value, "since": self._wall_of(segment.since_s), "reason": segment.reason}
                for segment in link.history.last(self._now, HOUR_S)
            ],
        }

    # --- sessions -----------------------------------------------------------------------------------------------------

    def sessions(self) -> SessionsStatus:
        """Return counts and the agents, those with problems first."""
        found = list(self._bridge.sessions)
        by_http = self._by_http(found)
        strangers = [(key, call) for key, call in by_http.items() if self._bridge.session(key) is None]
        total = len(found) + len(strangers)
        dialects = Counted((session.dialect, session.fresh(self._now)) for session in found)
        polling = [session for session in found if session.poll_at is not None and session.fresh(self._now)]
        # Sessions are created for shown rows only: thousands of agents may have called by HTTP only.
        shown = heapq.nsmallest(MAX_SESSIONS, strangers, key=lambda each: (each[1].ok, each[1].name))
        found += [self._stranger(key, call) for key, call in shown]
        fresh = {session.key for session in found if session.key not in by_http and session.fresh(self._now)}
        unpolled = {key for key, queue in self._bridge.queues if self._not_polling(key, queue)}
        others = [session for session in found if session.key not in fresh and session.key not in by_http]
        silent = {session.key for session in others if self._silent(session)}
        order = {**dict.fromkeys(fresh, 4), **dict.fromkeys(by_http, 3), **dict.fromkeys(silent, 2)}
        order |= {key: 1 for key, call in by_http.items() if not call.ok} | dict.fromkeys(unpolled, 0)
        order |= {session.key: 1 for session in found if session.key in fresh and session.standing.trouble is not None}
        first_calls = {key: min(use.first_unix for use in uses.values()) for key, uses in self._bridge.usage}
        found = heapq.nsmallest(
            MAX_SESSIONS, found, key=lambda each: (order.get(each.key, 5), -first_calls.get(each.key, 0.0))
        )
        found.sort(key=lambda session: (order.get(session.key, 5), session.name or session.key.ident))
        why = Counted(call.why for call in by_http.values())
        why_now = Counted(call.why for call in by_http.values() if self._wall - call.wall_s < call_status.RECENT_S)
        return SessionsStatus(
            total=total,
            fresh=len(fresh),
            silent=len(silent),
            not_polling=len(unpolled),
            by_http={each.value: why[each] for each in Why},
            by_http_now={each.value: why_now[each] for each in Why},
            dialects=[
                {"dialect": dialect, "fresh": is_fresh, "number": number}
                for (dialect, is_fresh), number in sorted(dialects.items())
            ],
            paces=dict(Counted(session.hold.pace.value for session in polling)),
            items=[
                {
                    **self._session(s, s.key in fresh, s.key in unpolled),
                    "silent": s.key in silent,
                    "first_call_at": first_calls.get(s.key),
                    "http": call_status.by_http(by_http[s.key]) if s.key in by_http else None,
                }
                for s in found
            ],
        )

    def _by_http(self, sessions: list[Session]) -> dict[SessionKey, FallbackCall]:
        """Return the newest call of each agent whose newest call was sent to the vendor's HTTP API."""
        record = self._bridge.ctx.fallback
        contacts = {session.key: self._wall_of(session.contact_at) for session in sessions}
        calls = {key: call_status.http_agent(record, key, contacts.get(key), self._wall) for key in record.by_agent}
        return {key: call for key, call in calls.items() if call is not None}

    def _stranger(self, key: SessionKey, call: FallbackCall) -> Session:
        """Return a session for the row of an agent that has called by HTTP only."""
        session = Session(key, call.dialect)
        session.last_seen_unix = call.wall_s
        if call.name != key.ident:
            session.known = {"name": call.name}
        return session

    def _silent(self, session: Session) -> bool:
        casual = not session.registration and session.heartbeat is None
        limit_s = CASUAL_SILENT_S if casual else SILENT_S
        replaced = session.superseded_by is not None or session.migrated_at is not None
        return not replaced and self._wall - session.last_seen_unix < limit_s

    def _not_polling(self, key: SessionKey, queue: CommandQueue) -> bool:
        return unpolled_s(self._bridge.session(key), queue, self._now) >= NOT_POLLING_S

    def _session(self, session: Session, fresh: bool, not_polling: bool) -> dict[str, Any]:
        contact = session.contact_at
        stale_at = session.last_seen_unix if contact is None else self._wall_of(contact + session.fresh_for_s)
        status, tunnel_status = session.reported_status
        return {
            "id": session.key.ident,
            "kind": session.key.kind,
            "owner": session.key.owner[:OWNER_CHARS],
            "name": session.name or None,
            "agent_id": session.agent_id or None,
            "upstream_cluster_id": session.upstream_cluster_id or None,
            "dialect": session.dialect,
            "fresh": fresh,
            "trouble": session.standing.trouble.kind.value if fresh and session.standing.trouble else None,
            "stale_since": None if fresh else stale_at,
            "seen_at": session.last_seen_unix or None,
            "status": status or None,
            "tunnel_status": tunnel_status if session.heartbeat is not None else None,
            "heartbeat_s": session.interval_s if len(session.gaps) >= MIN_GAPS else None,
            "heartbeat_at": self._wall_of(session.heartbeat_at),
            "poll_at": self._wall_of(session.poll_at),
            "polling_now": session.held > 0,
            "hold": self._hold(session),
            "gateway": session.gateway is not None and session.gateway.up_connection is not None,
            "superseded": session.superseded_by is not None,
            "migrated": session.migrated_at is not None,
            "queue": self._queue(session.key, not_polling),
        }

    def _hold(self, session: Session) -> dict[str, Any]:
        poll = self._bridge.ctx.settings.poll
        hold = session.hold
        fixed = None if poll.hold in ("auto", "off") else float(poll.hold)
        limit_s = 0.0 if poll.hold == "off" else hold.limit_s(poll.max_hold_s) if fixed is None else fixed
        return {
            "limit_s": limit_s,
            "ceiling_s": hold.ceiling_s,
            "max_s": poll.max_hold_s,
            "learnt": poll.hold == "auto",
            "pace": hold.pace.value,
            "interval_s": hold.interval_s,
            "serial": hold.serial,
        }

    def _queue(self, key: SessionKey, not_polling: bool) -> dict[str, Any]:
        queue = self._bridge.queue(key)
        held = () if queue is None else queue.all()
        states = [live.state for live in held]
        return {
            "waiting": len(held) - states.count(CommandState.OFFERED),
            "offered": states.count(CommandState.OFFERED),
            "uncertain": states.count(CommandState.UNCERTAIN),
            "bytes": 0 if queue is None else queue.size_bytes,
            "oldest_at": None if queue is None else self._wall_of(queue.waiting_since),
            "not_polling": not_polling,
        }

    # --- commands -----------------------------------------------------------------------------------------------------

    def commands(self) -> CommandsStatus:
        """Return counts over all agents, and the commands that wait longest."""
        bridge = self._bridge
        held = [(key, live) for key, queue in bridge.queues for live in queue.all()]
        states = Counted(live.state for _, live in held)
        held.sort(key=lambda each: each[1].since)
        arrived = min((live.record.arrived_unix for _, live in held), default=self._wall)
        return CommandsStatus(
            waiting=len(held) - states[CommandState.OFFERED],
            offered=states[CommandState.OFFERED],
            uncertain=states[CommandState.UNCERTAIN],
            bytes=sum(queue.size_bytes for _, queue in bridge.queues),
            oldest_s=max(0.0, self._wall - arrived),
            results=bridge.results,
            held_polls=bridge.held_polls,
            held_tunnels=bridge.held_tunnels,
            items=[self._command(key, live) for key, live in held[:MAX_WAITING]],
        )

    def _command(self, key: SessionKey, live: QueuedCommand) -> dict[str, Any]:
        return {
            "id": live.record.id,
            "type": live.record.type,
            "session": key.ident,
            "state": live.state.value,
            "since": self._wall_of(live.since),
            "attempts": live.attempts,
            "reason": live.reason or None,
            "expires_at": self._wall_of(live.expires_at),
        }


# --- readiness --------------------------------------------------------------------------------------------------------

STORE_PROBE_S = 2.0
MAX_PROBE_BYTES = 65_536
"""Size of a large command. A shim that can store it is ready, although a larger one may be refused."""


class Health:
    """Readiness check for `/readyz`. It depends on the upstream only with `admin.ready_requires_upstream`."""

    def __init__(self, bridge: Subject) -> None:
        self._bridge = bridge
        self._probe: asyncio.Future[bool] | None = None
        self._probed_at = float("-inf")
        self._probed_bytes = 0
        self._writable = False

    async def reasons_not_ready(self) -> list[str]:
        """Return the reasons why the shim is not ready, empty if it is."""
        reasons = []
        if self._bridge.stopping:
            reasons.append("stopping")
        if self._bridge.admin_actions.draining:
            reasons.append("draining")
        if not await self.store_writable():
            reasons.append("the store cannot be written")
        requires_upstream = self._bridge.ctx.settings.admin.ready_requires_upstream
        if requires_upstream and not any(link.online for link in self._bridge.links):
            reasons.append("no upstream link is online")
        return reasons

    async def store_writable(self) -> bool:
        """Return True if a synced write succeeds. At most one write is done in 2 s, however many callers ask.

        After the store has refused a command or a result, the write is as large as that was: a nearly full disk has
        room for small writes long after it has none for commands.
        """
        ctx = self._bridge.ctx
        size_bytes = min(ctx.refused_bytes, MAX_PROBE_BYTES)
        if ctx.now - self._probed_at < STORE_PROBE_S and size_bytes <= self._probed_bytes:
            return self._writable
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            self._probed_bytes = size_bytes
            ctx.store.submit(WriteProbe(ctx.clock.wall_s(), size_bytes), done=self._probe_done)
        try:
            async with asyncio.timeout(STORE_PROBE_S):
                return await asyncio.shield(self._probe)
        except TimeoutError:
            return False

    def _probe_done(self, outcome: StoreError | None) -> None:
        ctx = self._bridge.ctx
        self._writable = outcome is None
        self._probed_at = ctx.now
        if self._writable and min(ctx.refused_bytes, MAX_PROBE_BYTES) <= self._probed_bytes:
            ctx.refused_bytes = self._probed_bytes = 0
        probe, self._probe = self._probe, None
        if probe is not None and not probe.done():
            probe.set_result(self._writable)
