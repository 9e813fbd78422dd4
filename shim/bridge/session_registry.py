"""The sessions of all agents: lookup, adoption, supersession, quotas, and the legacy routes that each agent uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from shim.bridge.context import BridgeContext
from shim.bridge.registration import PendingRegistration
from shim.bridge.session_persistence import STORE_WAIT_S, SessionPersistence
from shim.core.agent_calls import Failed, HeartbeatCall, RegisterCall, Registered, SessionTarget, TargetKind
from shim.core.bounds import FREE_KEPT_BYTES
from shim.core.call_records import MAX_AGENTS, Route
from shim.core.records import (
    DeleteSession,
    MoveSession,
    SaveSession,
    SessionKey,
    StoreContents,
)
from shim.core.sessions import Session, recency
from shim.errors import AgentError
from shim.log import get

log = get(__name__)

MAX_UNVERIFIED_SESSIONS = 8
RETRY_AFTER_S = 60
SAVE_SEEN_EVERY_S = 3600.0
KEEP_AGAIN_S = 30


class RouteUse(msgspec.Struct):
    """Calls of one route by one agent since this process started."""

    count: int
    first_unix: float
    last_unix: float
    route: Route = ("", "")


class RouteUsage:
    """Counter of calls by agent and legacy route. Beyond `max_agents` the agent that was added first is dropped."""

    def __init__(self, max_agents: int = MAX_AGENTS) -> None:
        self._max_agents = max_agents
        self._agents: dict[SessionKey, list[RouteUse]] = {}  # lists, because an agent uses too few routes for a dict
        self._routes: dict[Route, Route] = {}

    def note(self, key: SessionKey, dialect: str, operation: str, wall: float) -> None:
        """Count a call. Every request calls this, so it must be fast."""
        uses = self._agents.get(key)
        if uses is None:
            uses = self._add(key)
        route = (dialect, operation)
        for use in uses:
            if use.route == route:
                use.count += 1
                use.last_unix = wall
                return
        uses.append(RouteUse(1, wall, wall, self._routes.setdefault(route, route)))

    def forget(self, key: SessionKey) -> None:
        """Drop a session that was deleted or has another key now."""
        self._agents.pop(key, None)

    def __iter__(self) -> Iterator[tuple[SessionKey, dict[Route, RouteUse]]]:
        return iter([(key, {use.route: use for use in uses}) for key, uses in self._agents.items()])

    def _add(self, key: SessionKey) -> list[RouteUse]:
        if len(self._agents) >= self._max_agents:
            del self._agents[next(iter(self._agents))]
        uses = self._agents[key] = []
        return uses


class SessionRegistry:
    """The sessions and what is stored of them.

    `moved(source, target)` is called after a session was superseded, `ended(key)` when one is removed.
    `token_accepted(owner)` returns True if the controller has accepted the owner's token. A token that it has not
    accepted since start-up is untrusted: at most `MAX_UNVERIFIED_SESSIONS` sessions are created for it, and they are
    not stored.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        moved: Callable[[SessionKey, SessionKey], None],
        ended: Callable[[SessionKey], None],
        token_accepted: Callable[[str], bool],
    ) -> None:
        self._ctx = ctx
        self._moved = moved
        self._ended = ended
        self._superseded: dict[SessionKey, None] = {}  # an ordered set: moves in the order of registrations
        self._token_accepted = token_accepted
        self._logged_owners: set[str] = set()
        self.persistence = SessionPersistence(ctx)
        self.usage = RouteUsage()

    def load(self, loaded: StoreContents) -> None:
        """Load the stored sessions, aliases and tunnel states."""
        for record in loaded.sessions:
            self._ctx.sessions.add(Session.from_record(record))
            if record.superseded_by:
                self._superseded[record.key] = None
        for owner, agent_id, key in loaded.aliases:
            self._ctx.sessions.set_alias(owner, agent_id, key)
        for key, payload in loaded.tunnels:
            session = self._ctx.sessions.get(key)
            if session is not None:
                self._ctx.sessions.keep_tunnel(session, payload, len(msgspec.json.encode(payload)))

    # --- calls of agents ----------------------------------------------------------------------------------------------

    def session_for_call(self, owner: str, target: SessionTarget, dialect: str, operation: str, now: float) -> Session:
        """Return the session of a call and record the contact; create the session if its owner does not have it.

        Raises `AgentError` 503 if the owner may not have another session.
        """
        session = self._ctx.sessions.find_target(owner, target)
        wall = self._ctx.clock.wall_s()
        if session is None:
            key = self._ctx.sessions.key_of(owner, target)
            session = self._adopt(key, dialect)
            if not self._token_accepted(owner):
                self.persistence.defer(key)
            session.touch(now, wall)
            self._ctx.metrics.sessions_adopted.inc()
            log.info("session_adopted", session=key.ident, kind=key.kind, dialect=dialect)
            self.persistence.save_session(session)
            self.usage.note(key, dialect, operation, wall)
            return session
        first = session.contact_at is None
        session.touch(now, wall)
        if first:
            session.dialect = dialect
            log.info("agent_first_call", session=session.key.ident, dialect=dialect)
        if first or wall - session.persisted_last_seen > SAVE_SEEN_EVERY_S:
            self.persistence.save_session(session)
        self.usage.note(session.key, dialect, operation, wall)
        return session

    def heartbeat(self, owner: str, call: HeartbeatCall, now: float) -> Session:
        """Return the session of a heartbeat and record the heartbeat and the agent's id.

        Raises `AgentError` 503 if the owner may not have another session or too many large heartbeats are kept.
        """
        sessions = self._ctx.sessions
        if call.size_bytes > FREE_KEPT_BYTES and not sessions.has_room_for(
            sessions.find_target(owner, call.target), call
        ):
            raise AgentError(503, "too many large heartbeats are kept", retry_after_s=KEEP_AGAIN_S)
        session = self.session_for_call(owner, call.target, call.dialect, "heartbeat", now)
        if call.size_bytes > FREE_KEPT_BYTES or session.kept_bytes:
            sessions.keep(session, call)
        if call.agent_id and session.agent_id and call.agent_id != session.agent_id:
            session.new_process()
        session.record_heartbeat(call, now)
        if call.agent_id and not sessions.alias_is(owner, call.agent_id, session.key):
            self._set_alias(session, call.agent_id)
            self.persistence.save_alias(session, call.agent_id)
        return session

    def find_session(self, owner: str, target: SessionTarget, now: float) -> Session | None:
        """Return the session of a call that creates none (tunnel calls), and record the contact."""
        session = self._ctx.sessions.find_target(owner, target)
        if session is not None:
            session.touch(now, self._ctx.clock.wall_s())
        return session

    # --- calls that the vendor's HTTP API serves ----------------------------------------------------------------------

    def seen(self, key: SessionKey) -> None:
        """Record a call that was served by the vendor's HTTP API.

        The call keeps the session from being deleted as unseen. It is no contact: the shim must not send heartbeats
        over it.
        """
        session = self._ctx.sessions.get(key)
        if session is not None:
            session.last_seen_unix = self._ctx.clock.wall_s()
            if session.last_seen_unix - session.persisted_last_seen > SAVE_SEEN_EVERY_S:
                self.persistence.save_session(session)

    def session_for_proxied_call(self, owner: str, target: SessionTarget, dialect: str) -> Session:
        """Return the session of a call that is served by the vendor's HTTP API; create the session if necessary.

        The call is no contact. Raises `AgentError` 503 if the owner may not have another session.
        """
        session = self._ctx.sessions.find_target(owner, target)
        if session is None:
            session = self._adopt(self._ctx.sessions.key_of(owner, target), dialect)
            session.last_seen_unix = self._ctx.clock.wall_s()
            self.persistence.save_session(session)
        return session

    async def record_http_registration(self, owner: str, call: RegisterCall, reply: dict[str, Any]) -> None:
        """Store the data of an agent that registered by HTTP, for the time when it is served by the WebSocket.

        `reply` is the result of `controller_replies.register_reply`, empty if the API's reply was not usable.
        """
        cluster_id = reply.get("cluster_id", "")
        if not cluster_id and not call.known_by_agent:
            return
        session = self._session_for(owner, call, cluster_id)
        session.last_seen_unix = self._ctx.clock.wall_s()
        session.superseded_by = None
        self.usage.note(session.key, call.dialect, "register", session.last_seen_unix)
        self._ctx.sessions.set_registration(session, {k: v for k, v in call.payload.items() if k != "cluster_id"})
        session.agent_id = call.agent_id
        session.secret = call.secret
        if reply:
            session.reply = reply
            self._ctx.sessions.set_upstream_id(session, cluster_id)
        self._save_together(session, self._supersede_former(session, self._set_alias(session, call.agent_id)))
        await self.persistence.answered()

    # --- registrations ------------------------------------------------------------------------------------------------

    def stored_for(self, owner: str, call: RegisterCall) -> Session | None:
        """Return the session with a stored registration of the same identity, or None.

        The identity is the cluster name, or for a dialect that identifies agents by id, the agent id and then the
        cluster name.
        """
        sessions = self._ctx.sessions
        if call.known_by_agent:
            exact = sessions.get(SessionKey(owner, TargetKind.AGENT.value, call.agent_id))
            if exact is not None and exact.reply:
                return exact
        kind = (TargetKind.AGENT if call.known_by_agent else TargetKind.CLUSTER).value
        found = [s for s in sessions.registered_as(owner, call.name) if s.key.kind == kind and s.reply]
        return max(found, key=lambda s: (s.superseded_by is None, s.last_seen_unix), default=None)

    def upstream_id(self, owner: str, call: RegisterCall, stored: Session | None) -> str:
        """Return the cluster id to register with: the controller's id for the agent's own one, or the stored one.

        Returns an empty string if the shim knows neither.
        """
        named = call.payload.get("cluster_id")
        session = self._ctx.sessions.get(SessionKey(owner, TargetKind.CLUSTER.value, named)) if named else stored
        return session.upstream_cluster_id if session is not None else ""

    async def registration_answered(self, owner: str, call: RegisterCall, outcome: Registered, within_s: float) -> None:
        """Record the contact and the id of an agent whose registration was answered, and wait until they are stored.

        A store that does not answer delays that by at most `STORE_WAIT_S`, and by at most `within_s`.
        The answer may have come from the store, or to the request of another agent of the same cluster.
        """
        session = self._ctx.sessions.get(_key_of(owner, call, outcome.cluster_id))
        if session is None:
            return  # the answer belongs to another agent's session; this agent's session is created by its next call
        session.touch(self._ctx.now, self._ctx.clock.wall_s())
        self.usage.note(session.key, call.dialect, "register", session.last_seen_unix)
        session.agent_id, session.secret = call.agent_id, call.secret or session.secret
        if not outcome.cached and outcome.cluster_id == session.upstream_cluster_id:
            self._claim(session)
        if not self._ctx.sessions.alias_is(owner, call.agent_id, session.key):
            self._set_alias(session, call.agent_id)
            self.persistence.save_all(session.key)
        await self.persistence.answered(min(STORE_WAIT_S, within_s))

    def register(
        self, job: PendingRegistration, reply: dict[str, Any], *, conflict: bool = False
    ) -> Registered | Failed:
        """Store the session of a registration that the controller answered, and return the answer to the agent.

        `reply` is the result of `controller_replies.register_reply`. With `conflict` the answer was an error with the
        id of an existing cluster (409). The id shows which cluster the agent belongs to. It does not prove that the
        agent's token may use it, so no other owner's session is superseded.
        """
        call, payload, cluster_id = job.call, job.payload, reply["cluster_id"]
        if job.session is not None and self._ctx.sessions.get(job.session.key) is not job.session:
            job.session = None  # the session was superseded or deleted while the controller was answering
        if job.session is None:
            if call is None:
                return Failed(404, "the session is gone")
            job.session = self._session_for(job.link.owner, call, cluster_id)
        session = job.session
        session.link = job.link
        self._ctx.sessions.set_upstream_id(session, cluster_id)
        session.standing.registered()
        kept = {k: v for k, v in payload.items() if k not in ("cluster_id", "k8s_service_token")}
        self._ctx.sessions.set_registration(session, kept)
        session.reply = reply
        agent_id = payload.get("agent_id")
        former: Session | None = None
        older: list[Session] = []
        if isinstance(agent_id, str) and agent_id:
            session.agent_id = agent_id
            former = self._set_alias(session, agent_id)
        left_at = self._left_at(session, job)
        if call is not None:
            older = self._supersede_former(session, former)
            session.secret = call.secret
            session.new_process()
            session.dialect = call.dialect
            session.last_seen_unix = self._ctx.clock.wall_s()  # no contact: the agent may have stopped waiting long ago
            session.superseded_by = None
        if session.superseded_by is None:
            # A replay, which no agent has sent, must not supersede the session of an agent that lives; nor must a late
            # answer to an agent that has left. Only of the same owner: it does not show that another may use the id.
            owner = session.key.owner
            late = self._another_called(session, left_at, job.answered_from)
            same = self._ctx.sessions.with_upstream_id(cluster_id, owner) if call is None or late else [session]
            latest = max(same, key=lambda other: (other.superseded_by is None, recency(other)))
            older += self._supersede(latest, owner if conflict or late else None)
        self._save_together(session, older)
        self._move_superseded()
        log.info("session_registered", session=session.key.ident, cluster_id=cluster_id, dialect=session.dialect)
        return session.registered(cached=False)

    def _left_at(self, session: Session, job: PendingRegistration) -> float | None:
        """Return when the agent of an answered registration was last known to live; None if it lives now."""
        if job.call is None:
            return session.contact_at
        called = job.abandoned_at is not None and (session.contact_at or 0.0) >= job.abandoned_at
        if not called or session.superseded_by is not None:
            return job.abandoned_at
        # If it was answered from the store, the older pod is known, and whoever else has called since then is newer.
        return None if job.answered_from is None else session.contact_at

    def _another_called(self, session: Session, left_at: float | None, older: Session | None) -> bool:
        """Return True if another agent of the cluster has called after that of the session had left.

        That of `older`, which registered before it, does not count: both pods call during a rolling update.
        """
        same = self._ctx.sessions.with_upstream_id(session.upstream_cluster_id)
        others = [each for each in same if each is not session and each is not older]
        return left_at is not None and any((each.contact_at or 0.0) > left_at for each in others)

    def _session_for(self, owner: str, call: RegisterCall, cluster_id: str) -> Session:
        key = _key_of(owner, call, cluster_id)
        session = self._ctx.sessions.get(key)
        if session is None:
            session = Session(key, call.dialect)
            self._ctx.sessions.add(session)
        return session

    # --- new sessions, and sessions that follow others ----------------------------------------------------------------

    def admit(self, owner: str) -> None:
        """Raise `AgentError` 503 if the owner may not have another session."""
        accepted = self._token_accepted(owner)
        limit = self._ctx.settings.sessions.max_per_owner if accepted else MAX_UNVERIFIED_SESSIONS
        if self._ctx.sessions.count_of(owner) < limit:
            self._logged_owners.discard(owner)
            return
        self._ctx.metrics.sessions_refused.inc()
        if not accepted:
            raise AgentError(503, "the controller has not accepted the token yet", retry_after_s=RETRY_AFTER_S)
        if owner not in self._logged_owners:
            self._logged_owners.add(owner)
            log.error("too_many_sessions", owner=owner[:16], limit=limit, hint="raise sessions.max_per_owner")
        raise AgentError(503, "too many agents: see sessions.max_per_owner", retry_after_s=RETRY_AFTER_S)

    def _adopt(self, key: SessionKey, dialect: str) -> Session:
        """Return a new session for an agent that did not register here. Raises `AgentError` 503 beyond the quota.

        It supersedes the sessions of its owner that have its id as their upstream cluster id, and takes over the
        registration data of the most recent of them. The agent knows that id from a registration whose session was
        never stored: the shim was killed while the store failed.
        """
        self.admit(key.owner)
        session = Session(key, dialect)
        self._ctx.sessions.add(session)
        older = self._supersede(session, key.owner)
        for other in older:
            self.persistence.save_session(other)
        if older:
            latest = max(older, key=lambda other: other.last_seen_unix)
            self._ctx.sessions.set_registration(session, latest.registration)
            session.reply = latest.reply
        return session

    def _supersede(self, session: Session, owner: str | None) -> list[Session]:
        """Let a session supersede the others with its upstream cluster id, of one owner or of all. Return them."""
        same = self._ctx.sessions.with_upstream_id(session.upstream_cluster_id, owner)
        found = [other for other in same if other is not session]
        for other in found:
            self._follow(other, session)
        return found

    def _save_together(self, session: Session, older: list[Session]) -> None:
        """Store a session and those that follow it now, or none of them."""
        self.persistence.save_all(*dict.fromkeys((session.key, *(other.key for other in older))))

    def _claim(self, session: Session) -> None:
        """Let a session supersede the others with its id: its agent has the controller's answer now.

        When that came late, the agent had left, and those of agents that called meanwhile did not give way.
        """
        same = self._ctx.sessions.with_upstream_id(session.upstream_cluster_id)
        others = [other for other in same if other is not session and other.superseded_by != session.key]
        if others and session.superseded_by is None:
            self._save_together(session, self._supersede(session, None))
            self._move_superseded()

    def _supersede_former(self, session: Session, former: Session | None) -> list[Session]:
        """Let a session supersede the one that had its agent's id, if both have the same name.

        Returns the superseded session, if there is one: the caller stores it together with its successor.

        The agent lost its cluster id and registered, and the controller gave it another one. Nobody else would fetch
        what waits for the agent under its former id. An equal name is not enough, because two clusters may have it.
        The former session is over at once: what waits in it was stored before what comes now, and is delivered first.
        """
        if former is None or not session.name or former.name != session.name:
            return []
        self._follow(former, session)
        former.forget_contact()
        return [former]

    def _follow(self, older: Session, successor: Session) -> None:
        """Record that a session is superseded by another one."""
        older.superseded_by = successor.key
        self._superseded[older.key] = None

    def sweep(self) -> None:
        """Complete supersessions and retry refused writes; called every few seconds."""
        # Move first: once the successor's alias is stored, no agent id leads to commands that are not moved, and a
        # restart would not find them.
        self._move_superseded()
        self.persistence.retry()

    def _move_superseded(self) -> None:
        """Move the superseded sessions that are no longer fresh into their successors."""
        now = self._ctx.now
        following: dict[SessionKey, list[Session]] = {}
        for key in list(self._superseded):
            session = self._ctx.sessions.get(key)
            if session is None or session.superseded_by is None:
                del self._superseded[key]
            else:
                following.setdefault(session.superseded_by, []).append(session)
        for session in [each for sessions in following.values() for each in sessions if not each.fresh(now)]:
            successor = self._ctx.sessions.get(session.superseded_by) if session.superseded_by is not None else None
            if successor is None:
                session.superseded_by = None
                continue
            # Those that follow the session go on to its successor. Two may follow each other after a kill, if the disk
            # had refused one of their writes.
            led = [other for other in following.pop(session.key, []) if other.moved_to is None]
            for other in led:
                other.superseded_by = successor.key if other is not successor else None
            following.setdefault(successor.key, []).extend(led)
            self._move(session, successor, led)

    def _move(self, session: Session, successor: Session, led: list[Session]) -> None:
        """Move a session into its successor; `led` have followed the session, and follow the successor now."""
        log.info("session_superseded", session=session.key.ident, by=successor.key.ident)
        self._ctx.sessions.move_aliases(session.key, successor.key)
        self._ctx.sessions.remove(session)
        session.moved_to = successor
        if successor.tunnel is None and session.tunnel is not None:
            self._ctx.sessions.keep_tunnel(successor, session.tunnel, session.tunnel_bytes + FREE_KEPT_BYTES)
        # In one transaction: a restart after the move would not find what the others follow, or who has the commands.
        saved = (SaveSession(each.record()) for each in (successor, *led) if not self.persistence.is_deferred(each.key))
        self._ctx.store.submit(MoveSession(session.key, successor.key), *saved)
        self._moved(session.key, successor.key)

    # --- sessions that end --------------------------------------------------------------------------------------------

    def on_token_accepted(self, owner: str) -> None:
        """Store the sessions that were adopted before the owner's token was accepted."""
        for key in self.persistence.release(owner):
            self.persistence.save_all(key)

    def on_owner_removed(self, owner: str) -> None:
        """Delete the sessions that were adopted on a token that was never accepted; its last link was removed."""
        self._logged_owners.discard(owner)
        for key in self.persistence.release(owner):
            session = self._ctx.sessions.get(key)
            if session is not None:
                log.info("session_discarded", session=key.ident)
                self._ended(key)
                self._ctx.sessions.remove(session)

    def expire(self) -> None:
        """Delete sessions that were not seen for `sessions.retain_s`; their commands end as EXPIRED."""
        before = self._ctx.clock.wall_s() - self._ctx.settings.sessions.retain_s
        now = self._ctx.now
        for session in self._ctx.sessions:
            if session.last_seen_unix < before and not session.fresh(now):
                log.info("session_forgotten", session=session.key.ident)
                self._ctx.store.submit(self._remove(session))

    async def forget(self, session: Session) -> None:
        """Delete a session for an operator; its commands end as EXPIRED. Raises `StoreError`."""
        await self._ctx.execute(self._remove(session))

    def _remove(self, session: Session) -> DeleteSession:
        """Remove a session, and return the operation that deletes its rows."""
        self._ended(session.key)
        self._ctx.sessions.remove(session)
        return DeleteSession(session.key)

    # --- small things -------------------------------------------------------------------------------------------------

    def set_tunnel(self, session: Session, state: dict[str, Any]) -> bool | None:
        """Store the latest tunnel state; return True if it differs from the previous one.

        Returns None if it cannot be kept, because all agents' states together would be too large.
        """
        changed = session.tunnel != state
        if not self._ctx.sessions.keep_tunnel(session, state, len(msgspec.json.encode(state))):
            return None
        self.persistence.save_tunnel(session, state)
        return changed

    def _set_alias(self, session: Session, agent_id: str) -> Session | None:
        """Let an agent id lead to a session; return the other one to which it led before. The caller stores it."""
        owner = session.key.owner
        if self._ctx.sessions.alias_is(owner, agent_id, session.key):
            return None
        before = self._ctx.sessions.set_alias(owner, agent_id, session.key)
        other = self._ctx.sessions.get(before) if before is not None else None
        if other is not None and other.fresh(self._ctx.now):
            self._ctx.metrics.alias_conflicts.inc()
            log.warning("agent_id_reassigned", agent=agent_id, session=session.key.ident, was=other.key.ident)
        return other


def _key_of(owner: str, call: RegisterCall, cluster_id: str) -> SessionKey:
    """Return the key of the session that a registration creates or updates."""
    if call.known_by_agent:
        return SessionKey(owner, TargetKind.AGENT.value, call.agent_id)
    return SessionKey(owner, TargetKind.CLUSTER.value, cluster_id)
