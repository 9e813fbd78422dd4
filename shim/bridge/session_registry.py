"""The sessions of all agents: lookup, adoption, supersession, quotas and persistence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from shim.bridge.context import BridgeContext
from shim.bridge.registration import PendingRegistration
from shim.core.agent_calls import Failed, HeartbeatCall, RegisterCall, Registered, SessionTarget, TargetKind
from shim.core.call_records import RouteUsage
from shim.core.records import (
    DeleteSession,
    MoveSession,
    Operation,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    SessionKey,
    StoreContents,
)
from shim.core.sessions import Session
from shim.errors import AgentError, StoreError
from shim.log import get


class SessionPersistence:
    """Storage of sessions, aliases and tunnel states.

    Nothing is stored of a session for which `withheld(key)` returns True. A refused write is retried.
    """

    def __init__(self, ctx: BridgeContext, withheld: Callable[[SessionKey], bool]) -> None:
        self._ctx = ctx
        self._withheld = withheld
        self._unsaved: set[SessionKey] = set()

    def save_session(self, session: Session) -> None:
        """Store a session."""
        self.submit(session.key, [SaveSession(session.record())])

    def save_tunnel(self, session: Session, state: dict[str, Any]) -> None:
        """Store a session's tunnel state."""
        self.submit(session.key, [SaveTunnel(session.key, state)])

    def save_alias(self, session: Session, agent_id: str) -> None:
        """Store an agent id as an alias of a session."""
        self.submit(session.key, [SaveAlias(session.key.owner, agent_id, session.key)])

    def retry(self) -> None:
        """Retry one refused write; its success triggers the next retry."""
        while self._unsaved:
            if self.save_all(self._unsaved.pop()):
                return

    def save_all(self, key: SessionKey) -> bool:
        """Store a session with its alias and tunnel state; return False if the session was removed."""
        session = self._ctx.sessions.get(key)
        if session is None:
            return False
        operations: list[Operation] = [SaveSession(session.record())]
        if session.tunnel is not None:
            operations.append(SaveTunnel(key, session.tunnel))
        if self._ctx.sessions.alias_is(key.owner, session.agent_id, key):
            operations.append(SaveAlias(key.owner, session.agent_id, key))
        self.submit(key, operations)
        return True

    def submit(self, key: SessionKey, operations: list[Operation]) -> None:
        """Store something of a session, and the whole session later if the write is refused now."""
        if self._withheld(key):
            return
        self._ctx.store.submit(*operations, done=partial(self._saved, key))

    def _saved(self, key: SessionKey, outcome: StoreError | None) -> None:
        if outcome is not None:
            self._unsaved.add(key)
        elif self._unsaved:
            self.retry()


log = get(__name__)

MAX_UNVERIFIED_SESSIONS = 8
RETRY_AFTER_S = 60


class SessionQuota:
    """Limit on the number of sessions of an owner.

    `proven(owner)` returns True if the controller has accepted the owner's token. A token that it has not accepted
    since start-up is untrusted: at most `MAX_UNVERIFIED_SESSIONS` sessions are created for it, and they are not stored.
    """

    def __init__(self, ctx: BridgeContext, proven: Callable[[str], bool]) -> None:
        self._ctx = ctx
        self._proven = proven
        self._unproven: set[SessionKey] = set()
        self._logged_owners: set[str] = set()

    def admit(self, owner: str) -> None:
        """Raise `AgentError` 503 if the owner may not have another session."""
        proven = self._proven(owner)
        limit = self._ctx.settings.sessions.max_per_owner if proven else MAX_UNVERIFIED_SESSIONS
        if self._ctx.sessions.count_of(owner) < limit:
            self._logged_owners.discard(owner)
            return
        self._ctx.metrics.sessions_refused.inc()
        if not proven:
            raise AgentError(503, "the controller has not accepted the token yet", retry_after_s=RETRY_AFTER_S)
        if owner not in self._logged_owners:
            self._logged_owners.add(owner)
            log.error("too_many_sessions", owner=owner[:16], limit=limit, hint="raise sessions.max_per_owner")
        raise AgentError(503, "too many agents: see sessions.max_per_owner", retry_after_s=RETRY_AFTER_S)

    def adopted(self, key: SessionKey) -> None:
        """Record that a session was created for an agent that did not register here."""
        if not self._proven(key.owner):
            self._unproven.add(key)

    def persistence_deferred(self, key: SessionKey) -> bool:
        """Return True if the session may not be stored yet."""
        return key in self._unproven

    def on_token_accepted(self, owner: str) -> list[SessionKey]:
        """Return the owner's sessions that may be stored now, because its token was accepted."""
        return self._release(owner)

    def on_owner_removed(self, owner: str) -> list[SessionKey]:
        """Return the owner's sessions to delete, because its last link was removed."""
        self._logged_owners.discard(owner)
        return self._release(owner)

    def _release(self, owner: str) -> list[SessionKey]:
        found = [key for key in self._unproven if key.owner == owner]
        self._unproven.difference_update(found)
        return found


class SessionSuccession:
    """Supersession and removal of sessions.

    `moved(source, target)` is called after a session was superseded, `ended(key)` when one is removed.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        saves: SessionPersistence,
        moved: Callable[[SessionKey, SessionKey], None],
        ended: Callable[[SessionKey], None],
    ) -> None:
        self._ctx = ctx
        self._saves = saves
        self._moved = moved
        self._pending_moves: list[MoveSession] = []
        self.ended = ended

    def supersede(self, session: Session, *, across_owners: bool = True) -> None:
        """Let this session supersede all others with the same upstream cluster id, as soon as they are not fresh.

        With `across_owners` that includes other owners' sessions. The caller must have proof that the cluster belongs
        to this owner: the controller accepted a registration on the owner's link with that cluster id.
        """
        sessions = self._ctx.sessions
        for other in sessions if across_owners else sessions.of_owner(session.key.owner):
            if other is not session and other.upstream_cluster_id == session.upstream_cluster_id:
                other.superseded_by = session.key
                self._saves.save_session(other)
        self.sweep()

    def adopt_predecessors(self, session: Session) -> None:
        """Let an adopted session supersede the sessions of its owner that have its id as their upstream cluster id.

        The agent knows that id from a registration whose session was never stored: the shim was killed while the store
        failed. The session takes over the registration data of the most recent of them.
        """
        ident = session.upstream_cluster_id
        older = [o for o in self._ctx.sessions.of_owner(session.key.owner) if o.upstream_cluster_id == ident]
        older = [other for other in older if other is not session]
        if not ident or not older:
            return
        latest = max(older, key=lambda other: other.last_seen_unix)
        session.registration, session.reply = latest.registration, latest.reply
        for other in older:
            other.superseded_by = session.key
            self._saves.save_session(other)

    def sweep(self) -> None:
        """Move the superseded sessions that are no longer fresh into their successors, and retry refused writes."""
        unmoved, self._pending_moves = self._pending_moves, []
        for move in unmoved:
            self._store(move)
        now = self._ctx.now
        for session in self._ctx.sessions:
            target = session.superseded_by
            if target is None or session.fresh(now):
                continue
            successor = self._ctx.sessions.get(target)
            if successor is None:
                session.superseded_by = None
                continue
            log.info("session_superseded", session=session.key.ident, by=target.ident)
            self._ctx.sessions.move_aliases(session.key, target)
            self._ctx.sessions.remove(session)
            if successor.tunnel is None:
                successor.tunnel = session.tunnel
            self._store(MoveSession(session.key, target))
            self._moved(session.key, target)

    def _store(self, move: MoveSession) -> None:
        """Store a move, and retry it until it succeeds.

        Meanwhile the transitions of the moved commands are already written under the successor's key.
        """
        self._ctx.store.submit(move, done=partial(self._move_stored, move))

    def _move_stored(self, move: MoveSession, outcome: StoreError | None) -> None:
        if outcome is not None:
            self._pending_moves.append(move)

    def expire(self) -> None:
        """Delete sessions that were not seen for `sessions.retain_s`; their commands end as EXPIRED."""
        before = self._ctx.clock.wall_s() - self._ctx.settings.sessions.retain_s
        now = self._ctx.now
        for session in self._ctx.sessions:
            if session.last_seen_unix < before and not session.fresh(now):
                log.info("session_forgotten", session=session.key.ident)
                self._ctx.store.submit(self._end(session))

    async def forget(self, session: Session) -> None:
        """Delete a session for an operator; its commands end as EXPIRED. Raises `StoreError`."""
        await self._ctx.execute(self._end(session))

    def _end(self, session: Session) -> DeleteSession:
        """Remove a session, and return the operation that deletes its rows."""
        self.ended(session.key)
        self._ctx.sessions.remove(session)
        return DeleteSession(session.key)


SAVE_SEEN_EVERY_S = 3600.0

KEEP_AGAIN_S = 30


class SessionRegistry:
    """The sessions and what is stored of them.

    `moved(source, target)` is called after a session was superseded, `ended(key)` when one is removed.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        moved: Callable[[SessionKey, SessionKey], None],
        ended: Callable[[SessionKey], None],
        proven: Callable[[str], bool],
    ) -> None:
        self._ctx = ctx
        self.admission = SessionQuota(ctx, proven)
        self._saves = SessionPersistence(ctx, self.admission.persistence_deferred)
        self._succession = SessionSuccession(ctx, self._saves, moved, ended)
        self.usage = RouteUsage()

    def load(self, loaded: StoreContents) -> None:
        """Load the stored sessions, aliases and tunnel states."""
        for record in loaded.sessions:
            self._ctx.sessions.add(Session.from_record(record))
        for owner, agent_id, key in loaded.aliases:
            self._ctx.sessions.set_alias(owner, agent_id, key)
        for key, payload in loaded.tunnels:
            session = self._ctx.sessions.get(key)
            if session is not None:
                session.tunnel = payload

    def session_for_call(self, owner: str, target: SessionTarget, dialect: str) -> Session:
        """Return the session of a call and record the contact; create the session if its owner does not have it.

        Raises `AgentError` 503 if the owner may not have another session.
        """
        sessions = self._ctx.sessions
        key = sessions.key_of(owner, target)
        session = sessions.get(key)
        now, wall = self._ctx.now, self._ctx.clock.wall_s()
        if session is None:
            self.admission.admit(owner)
            session = Session(key, dialect)
            session.touch(now, wall)
            sessions.add(session)
            self.admission.adopted(key)
            self._ctx.metrics.sessions_adopted.inc()
            log.info("session_adopted", session=key.ident, kind=key.kind, dialect=dialect)
            self._succession.adopt_predecessors(session)
            self.save(session)
            return session
        first = session.contact_at is None
        session.touch(now, wall)
        if first:
            session.dialect = dialect
            log.info("agent_first_call", session=key.ident, dialect=dialect)
        if first or wall - session.persisted_last_seen > SAVE_SEEN_EVERY_S:
            self.save(session)
        return session

    def on_token_accepted(self, owner: str) -> None:
        """Store the sessions that were adopted before the owner's token was accepted."""
        for key in self.admission.on_token_accepted(owner):
            self._saves.save_all(key)

    def on_owner_removed(self, owner: str) -> None:
        """Delete the sessions that were adopted on a token that was never accepted."""
        for key in self.admission.on_owner_removed(owner):
            session = self._ctx.sessions.get(key)
            if session is not None:
                log.info("session_discarded", session=key.ident)
                self._succession.ended(key)
                self._ctx.sessions.remove(session)

    def seen(self, key: SessionKey) -> None:
        """Record a call that was served by the vendor's HTTP API.

        The call keeps the session from being deleted as unseen. It is no contact: the shim must not send heartbeats
        over it.
        """
        session = self._ctx.sessions.get(key)
        if session is not None:
            session.last_seen_unix = self._ctx.clock.wall_s()
            if session.last_seen_unix - session.persisted_last_seen > SAVE_SEEN_EVERY_S:
                self.save(session)

    def session_for_proxied_call(self, owner: str, target: SessionTarget, dialect: str) -> Session:
        """Return the session of a call that is served by the vendor's HTTP API; create the session if necessary.

        The call is no contact. Raises `AgentError` 503 if the owner may not have another session.
        """
        key = self._ctx.sessions.key_of(owner, target)
        session = self._ctx.sessions.get(key)
        if session is None:
            self.admission.admit(owner)
            session = Session(key, dialect)
            session.last_seen_unix = self._ctx.clock.wall_s()
            self._ctx.sessions.add(session)
            self._succession.adopt_predecessors(session)
            self.save(session)
        return session

    def record_http_registration(self, owner: str, call: RegisterCall, reply: dict[str, Any]) -> None:
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
        session.registration = {k: v for k, v in call.payload.items() if k != "cluster_id"}
        session.agent_id = call.agent_id
        session.secret = call.secret
        if reply:
            session.reply = reply
            self._ctx.sessions.set_upstream_id(session, cluster_id)
        self._set_alias(session, call.agent_id)
        self.save(session)

    def find_session(self, owner: str, target: SessionTarget) -> Session | None:
        """Return the session of a call that creates none (tunnel calls), and record the contact."""
        session = self._ctx.sessions.get(self._ctx.sessions.key_of(owner, target))
        if session is not None:
            session.touch(self._ctx.now, self._ctx.clock.wall_s())
        return session

    def heartbeat(self, owner: str, call: HeartbeatCall) -> Session:
        """Return the session of a heartbeat and record the heartbeat and the agent's id.

        Raises `AgentError` 503 if the owner may not have another session or too many large heartbeats are kept.
        """
        sessions = self._ctx.sessions
        if not sessions.has_room_for(sessions.get(sessions.key_of(owner, call.target)), call):
            raise AgentError(503, "too many large heartbeats are kept", retry_after_s=KEEP_AGAIN_S)
        session = self.session_for_call(owner, call.target, call.dialect)
        sessions.keep(session, call)
        if call.agent_id and session.agent_id and call.agent_id != session.agent_id:
            session.new_process()
        session.record_heartbeat(call, self._ctx.now)
        if call.agent_id and not self._ctx.sessions.alias_is(owner, call.agent_id, session.key):
            self._set_alias(session, call.agent_id)
        return session

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
        found = [
            s
            for s in sessions.of_owner(owner)
            if s.key.kind == kind and s.reply and s.registration.get("name") == call.name
        ]
        return max(found, key=lambda s: (s.superseded_by is None, s.last_seen_unix), default=None)

    def upstream_id(self, owner: str, call: RegisterCall, stored: Session | None) -> str:
        """Return the cluster id to register with: the controller's id for the agent's own one, or the stored one.

        Returns an empty string if the shim knows neither.
        """
        named = call.payload.get("cluster_id")
        session = self._ctx.sessions.get(SessionKey(owner, TargetKind.CLUSTER.value, named)) if named else stored
        return session.upstream_cluster_id if session is not None else ""

    def registration_answered(self, owner: str, call: RegisterCall, outcome: Registered) -> None:
        """Record the contact and the id of an agent whose registration was answered.

        The answer may have come from the store, or to the request of another agent of the same cluster.
        """
        if call.known_by_agent:
            key = SessionKey(owner, TargetKind.AGENT.value, call.agent_id)
        else:
            key = SessionKey(owner, TargetKind.CLUSTER.value, outcome.cluster_id)
        session = self._ctx.sessions.get(key)
        if session is None:
            return  # the answer belongs to another agent's session; this agent's session is created by its next call
        session.touch(self._ctx.now, self._ctx.clock.wall_s())
        self.usage.note(session.key, call.dialect, "register", session.last_seen_unix)
        session.agent_id, session.secret = call.agent_id, call.secret or session.secret
        self._set_alias(session, call.agent_id)

    # --- registration -------------------------------------------------------------------------------------------------

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
        session.standing.recover()
        session.registration = {k: v for k, v in payload.items() if k not in ("cluster_id", "k8s_service_token")}
        session.reply = reply
        agent_id = payload.get("agent_id")
        if isinstance(agent_id, str) and agent_id:
            session.agent_id = agent_id
            self._set_alias(session, agent_id)
        if call is not None:
            session.secret = call.secret
            session.new_process()
            session.dialect = call.dialect
            session.last_seen_unix = self._ctx.clock.wall_s()  # no contact: the agent may have stopped waiting long ago
            session.superseded_by = None
        if session.superseded_by is None:  # a replayed registration of an older session must not supersede newer ones
            self._succession.supersede(session, across_owners=not conflict)
        self.save(session)
        log.info("session_registered", session=session.key.ident, cluster_id=cluster_id, dialect=session.dialect)
        return outcome_of(session, cached=False)

    def _session_for(self, owner: str, call: RegisterCall, cluster_id: str) -> Session:
        if call.known_by_agent:
            key = SessionKey(owner, TargetKind.AGENT.value, call.agent_id)
        else:
            key = SessionKey(owner, TargetKind.CLUSTER.value, cluster_id)
        session = self._ctx.sessions.get(key)
        if session is None:
            session = Session(key, call.dialect)
            self._ctx.sessions.add(session)
        return session

    async def forget(self, session: Session) -> None:
        """Delete a session for an operator. Return the error if the store fails."""
        await self._succession.forget(session)

    def expire(self) -> None:
        """Delete sessions that were not seen for `sessions.retain_s`."""
        self._succession.expire()

    def sweep(self) -> None:
        """Retry refused writes and complete supersessions; called every second."""
        self._saves.retry()
        self._succession.sweep()

    # --- small things -------------------------------------------------------------------------------------------------

    def set_tunnel(self, session: Session, state: dict[str, Any]) -> bool:
        """Store the latest tunnel state; return True if it differs from the previous one."""
        changed = session.tunnel != state
        session.tunnel = state
        self._saves.save_tunnel(session, state)
        return changed

    def save(self, session: Session) -> None:
        """Store a session."""
        self._saves.submit(session.key, [SaveSession(session.record())])

    def _set_alias(self, session: Session, agent_id: str) -> None:
        owner = session.key.owner
        if self._ctx.sessions.alias_is(owner, agent_id, session.key):
            return
        before = self._ctx.sessions.set_alias(owner, agent_id, session.key)
        self._saves.save_alias(session, agent_id)
        other = self._ctx.sessions.get(before) if before is not None else None
        if other is not None and other.fresh(self._ctx.now):
            self._ctx.metrics.alias_conflicts.inc()
            log.warning("agent_id_reassigned", agent=agent_id, session=session.key.ident, was=other.key.ident)


def outcome_of(session: Session, cached: bool) -> Registered:
    """Return the answer to an agent's registration, with the cluster id that the agent knows.

    That id never changes for the agent, see docs/reference/protocol.md#16-owners-sessions-aliases.
    """
    reply = session.reply
    cluster_id = session.key.ident if session.key.kind == TargetKind.CLUSTER.value else session.upstream_cluster_id
    uuid = reply.get("cluster_uuid", cluster_id) if cluster_id == session.upstream_cluster_id else cluster_id
    return Registered(
        cluster_id=cluster_id,
        cluster_uuid=uuid,
        name=reply.get("name") or session.registration.get("name") or "",
        agent_id=session.agent_id,
        status=reply.get("status") or "registered",
        tunnel_url=reply.get("tunnel_url", ""),
        api_server=reply.get("api_server", ""),
        workspace_id=reply.get("workspace_id"),
        registered_at=reply.get("registered_at"),
        cached=cached,
    )
