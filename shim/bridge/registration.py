"""Registrations that wait for the controller's reply: an agent's own, a replay, or one of an adopted agent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from shim.bridge.context import BridgeContext
from shim.bridge.links import UpstreamLink
from shim.bridge.upstream_connection import UpstreamConnection
from shim.core import link_state as ev
from shim.core.agent_calls import Failed, Outcome, RegisterCall, Registered, TargetKind
from shim.core.link_state import LinkState
from shim.core.sessions import Session
from shim.protocol.upstream_message import Message

RegistrationKey = tuple[str, ...]
FindStored = Callable[[], Session | None]

CACHED_AFTER_S = 5.0
REPLAY_WINDOW = 32
ANSWER_S = 10.0
UNCLAIMED_S = 600.0
ABANDONED_S = 60.0
LOST_S = 60.0
AGAIN_S = 10.0
RETRY_AFTER_S = 5
REFUSED_S = 900.0
"""Time for which a refusal is shown: an agent that exits because of one is restarted every few minutes."""
MAX_REFUSED = 100

REFUSED = Failed(401, "the controller refuses the token")


def identity_of(session: Session) -> RegistrationKey:
    """Return the identity of a session's registration.

    The identity is (owner, `agent`, agent id) for a dialect that identifies agents by id, else (owner, `name`, cluster
    name). An adopted session without a known name is identified by its session key.
    """
    name = session.registered_name
    if session.key.kind == "agent" or not name:
        return tuple(session.key)
    return session.key.owner, "name", name


def identity_of_call(owner: str, call: RegisterCall) -> RegistrationKey:
    """Return the identity of an agent's own registration, as `identity_of` does for a session."""
    return (owner, "agent", call.agent_id) if call.known_by_agent else (owner, "name", call.name)


class PendingRegistration(msgspec.Struct, eq=False):
    """One registration that the controller has not answered.

    `session` is set if the shim itself registers, or has answered the agent from the store. `answered_from` is the
    session whose stored registration answered the agent, which may be that of a cluster's old pod. `sent_on` is the
    serial of the connection that carries it, 0 if none does. `sent_at` and `abandoned_at` are monotonic seconds.
    """

    identity: RegistrationKey
    link: UpstreamLink
    payload: dict[str, Any]
    secret: str
    call: RegisterCall | None = None
    session: Session | None = None
    answered_from: Session | None = None
    waiters: set[asyncio.Future[Outcome]] = msgspec.field(default_factory=set)
    request_ids: list[str] = msgspec.field(default_factory=list)
    sent_on: int = 0
    sent_at: float = 0.0
    abandoned_at: float | None = None

    def answer(self, outcome: Outcome) -> bool:
        """Answer all waiting agents; return False if none waits."""
        waiting = [waiter for waiter in self.waiters if not waiter.done()]
        for waiter in waiting:
            waiter.set_result(outcome)
        return bool(waiting)


class RefusedRegistration(NamedTuple):
    """The latest unsuccessful answer to an identity's registration; `status` is 0 if none came in time.

    `at` is monotonic, `name` the cluster's name and `agent` the id that the agent uses for itself.
    """

    name: str
    agent: str
    status: int
    error: str
    at: float


class ReplayFinished(NamedTuple):
    """All fresh sessions of a link are registered on its connection, or were not answered in time."""

    link: UpstreamLink
    now: float


class SessionAnnounced(NamedTuple):
    """The controller knows a session on this connection, or did not answer its registration in time."""

    session: Session
    connection: UpstreamConnection


class RegistrationReplay(msgspec.Struct, eq=False):
    """One replay after a reconnect: the registrations still to be sent, and those that wait for a reply."""

    link: UpstreamLink
    unsent: deque[tuple[Session, dict[str, Any]]]
    waiting: set[PendingRegistration]


class Registrations:
    """All pending registrations, at most one per identity."""

    def __init__(self, ctx: BridgeContext) -> None:
        self._ctx = ctx
        self._by_identity: dict[RegistrationKey, PendingRegistration] = {}
        self._by_request: dict[str, PendingRegistration] = {}
        self._unclaimed: dict[RegistrationKey, tuple[Outcome, float]] = {}
        self._replays: dict[UpstreamLink, RegistrationReplay] = {}
        self._asked_at: dict[RegistrationKey, float] = {}
        self._refusals: dict[RegistrationKey, RefusedRegistration] = {}
        self._stopping = False

    def waiting_for(self, link: UpstreamLink) -> bool:
        """Return True if an agent waits for an answer over this link."""
        return any(job.link is link and job.waiters for job in self._by_identity.values())

    @property
    def refusals(self) -> list[RefusedRegistration]:
        """The registrations that the controller refused or did not answer, and has not accepted since."""
        return list(self._refusals.values())

    def registers(self, agent_id: str) -> bool:
        """Return True if an agent with this id waits for the answer to its registration."""
        return any(job.call is not None and job.call.agent_id == agent_id for job in self._by_identity.values())

    def acknowledged(self, session: Session) -> None:
        """Delete the record of an unanswered registration: the controller acknowledges the agent's heartbeats."""
        if self._refusals:
            identity = identity_of(session)
            if identity in self._refusals and not self._refusals[identity].status:
                del self._refusals[identity]

    def forget(self, session: Session) -> None:
        """Delete the record of a refused registration, because its session is removed."""
        self._refusals.pop(identity_of(session), None)

    def sweep(self) -> None:
        """Delete outdated answers and records, and registrations that no agent waits for."""
        now = self._ctx.now
        self._refusals = {i: each for i, each in self._refusals.items() if now - each.at < REFUSED_S}
        self._unclaimed = {i: kept for i, kept in self._unclaimed.items() if now - kept[1] < UNCLAIMED_S}
        self._asked_at = {i: at for i, at in self._asked_at.items() if now - at < AGAIN_S}
        for job in list(self._by_identity.values()):
            patience_s = UNCLAIMED_S if job.sent_on else ABANDONED_S
            if job.abandoned_at is not None and now - job.abandoned_at >= patience_s:
                self._forget(job)

    def end_all(self) -> None:
        """Answer every waiting agent with 503, because the shim stops."""
        self._stopping = True
        for job in self._by_identity.values():
            job.answer(Failed(503, "the shim is stopping", retry_after_s=RETRY_AFTER_S))

    # --- an agent registers -------------------------------------------------------------------------------------------

    async def register(
        self, link: UpstreamLink, call: RegisterCall, find_stored: FindStored, arrived_s: float
    ) -> Outcome:
        """Answer an agent's registration within `register.deadline_s` of `arrived_s`.

        `find_stored` returns the session with the stored registration, or None; it is called after 5 s without a reply
        of the controller. See docs/reference/protocol.md#11-register.
        """
        if self._stopping:
            return Failed(503, "the shim is stopping", retry_after_s=RETRY_AFTER_S)
        link.apply(ev.RetryNow(), self._ctx.now)
        if link.machine.refused and link.state is LinkState.WAITING:
            return REFUSED
        identity = identity_of_call(link.owner, call)
        outcome, at = self._unclaimed.pop(identity, (None, 0.0))
        if outcome is None or self._ctx.now - at >= UNCLAIMED_S:
            outcome = await self._join_and_wait(link, identity, call, find_stored, arrived_s)
        # The answer may be the one to another process of the same cluster, which has another agent id.
        return replace(outcome, agent_id=call.agent_id) if isinstance(outcome, Registered) else outcome

    async def _join_and_wait(
        self,
        link: UpstreamLink,
        identity: RegistrationKey,
        call: RegisterCall,
        find_stored: FindStored,
        arrived_s: float,
    ) -> Outcome:
        job = self._join(link, identity, call)
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        job.waiters.add(waiter)
        try:
            return await self._await(job, waiter, find_stored, arrived_s)
        finally:
            job.waiters.discard(waiter)
            if not job.waiters:
                job.abandoned_at = self._ctx.now

    async def _await(
        self,
        job: PendingRegistration,
        waiter: asyncio.Future[Outcome],
        find_stored: FindStored,
        arrived_s: float,
    ) -> Outcome:
        link = job.link
        deadline = arrived_s + self._ctx.settings.register.deadline_s
        patience = min(arrived_s + CACHED_AFTER_S, deadline)
        for until in (patience, deadline):
            await asyncio.wait((waiter,), timeout=max(0.0, until - self._ctx.now))
            if waiter.done():
                return waiter.result()
            stored = None if link.machine.refused else find_stored()
            if stored is not None:
                self._ctx.metrics.registrations.labels("cached").inc()
                job.answered_from = stored
                if stored.key.kind == TargetKind.CLUSTER.value:
                    job.session = stored  # the agent goes on with its id, whichever the controller answers later
                return stored.registered(cached=True)
        self._ctx.metrics.registrations.labels("timeout").inc()
        if link.machine.refused:
            return REFUSED
        reason = "the controller did not answer in time" if link.machine.connected else link.unreachable
        return Failed(503, reason, retry_after_s=RETRY_AFTER_S)

    def _join(self, link: UpstreamLink, identity: RegistrationKey, call: RegisterCall) -> PendingRegistration:
        job = self._by_identity.get(identity)
        if job is None:
            job = self._by_identity[identity] = PendingRegistration(
                identity, link, dict(call.payload), call.secret, call=call
            )
        elif job.call is None:  # a replay is under way: its reply also answers this agent, whose new fields are kept
            job.call, job.payload, job.secret = call, {**job.payload, **call.payload}, call.secret
        if job.link is not link:  # the old link was removed to make room for another
            self._forget_requests(job)
            job.link = link
        job.abandoned_at = None
        self._try_send(job)
        return job

    # --- the shim registers -------------------------------------------------------------------------------------------

    def ask(self, session: Session, link: UpstreamLink, payload: dict[str, Any]) -> None:
        """Register a session from what is known of it, at most once in 10 s, unless the shim stops."""
        if self._stopping:
            return
        identity = identity_of(session)
        pending = self._by_identity.get(identity)
        if pending is not None:
            self._try_send(pending)
        elif self._ctx.now - self._asked_at.get(identity, -AGAIN_S) >= AGAIN_S:
            self._asked_at[identity] = self._ctx.now
            self._start(session, link, payload, identity)

    def _start(
        self, session: Session, link: UpstreamLink, payload: dict[str, Any], identity: RegistrationKey
    ) -> PendingRegistration:
        secret = payload.pop("k8s_service_token", "")
        job = PendingRegistration(identity, link, payload, secret, session=session, abandoned_at=self._ctx.now)
        self._by_identity[identity] = job
        self._try_send(job)
        return job

    # --- the link -----------------------------------------------------------------------------------------------------

    def replay(self, link: UpstreamLink, sessions: list[tuple[Session, dict[str, Any]]], now: float) -> None:
        """Register these sessions after a reconnect, a window at a time, and repeat the pending registrations."""
        self.sweep()
        pending = {job.identity: job for job in self._by_identity.values() if job.link is link}
        todo = deque(item for item in sessions if identity_of(item[0]) not in pending)
        replay = self._replays[link] = RegistrationReplay(link, todo, set(pending.values()))
        for job in pending.values():
            self._try_send(job)
        self._advance(replay, now)

    def _advance(self, replay: RegistrationReplay, now: float) -> None:
        link = replay.link
        if self._replays.get(link) is not replay or link.connection is None:
            return
        while replay.unsent and len(replay.waiting) < REPLAY_WINDOW:
            session, payload = replay.unsent.popleft()
            identity = identity_of(session)
            if identity not in self._by_identity:
                replay.waiting.add(self._start(session, link, payload, identity))
        if not replay.unsent and not replay.waiting:
            del self._replays[link]
            self._ctx.events.put(ReplayFinished(link, now))

    def link_lost(self, link: UpstreamLink) -> None:
        """Prepare agents' pending registrations for the next connection, and drop the shim's own."""
        self._replays.pop(link, None)
        for job in list(self._by_identity.values()):
            if job.link is link:
                self._forget_requests(job)
                job.sent_on = 0
                if job.call is None:
                    self._forget(job)

    def link_refused(self, link: UpstreamLink) -> None:
        """Answer every pending registration of the link with 401, because its token is refused."""
        for job in list(self._by_identity.values()):
            if job.link is link:
                self._finish(job, REFUSED, None, self._ctx.now)

    def _try_send(self, job: PendingRegistration) -> None:
        """Send a registration, unless the connection carries it already and its reply is less than a minute late."""
        connection, now = job.link.connection, self._ctx.now
        if connection is None or (job.sent_on == connection.serial and now - job.sent_at < LOST_S):
            return
        request_id = f"req_{self._ctx.new_id()}"
        job.request_ids.append(request_id)
        job.sent_on, job.sent_at = connection.serial, now
        self._by_request[request_id] = job
        secret = {"k8s_service_token": job.secret} if job.secret else {}
        connection.send("register", {**job.payload, **secret}, request_id)
        self._ctx.timers.call_later(ANSWER_S, lambda: self._unanswered(job, connection))

    def _unanswered(self, job: PendingRegistration, connection: UpstreamConnection) -> None:
        """Continue without a reply: later registrations and heartbeats do not wait for a slow controller."""
        if self._by_identity.get(job.identity) is not job or job.sent_on != connection.serial:
            return
        self._note_refusal(job, 0, f"no answer within {ANSWER_S:g} s")
        if job.session is not None:
            self._ctx.events.put(SessionAnnounced(job.session, connection))
        self._settled(job, self._ctx.now)

    # --- the controller answers ---------------------------------------------------------------------------------------

    def in_progress(self, message: Message, now: float) -> None:
        """Restart the wait for a reply, because a `register_in_progress` arrived."""
        job = self._by_request.get(message.request_id)
        if job is not None:
            job.sent_at = now

    def find(self, request_id: str) -> PendingRegistration | None:
        """Return the registration that a reply with this `request_id` answers, or None."""
        return self._by_request.get(request_id)

    def succeed(self, job: PendingRegistration, outcome: Outcome, connection: UpstreamConnection, now: float) -> None:
        """Complete a registration that the controller accepted."""
        self._ctx.metrics.registrations.labels("ok").inc()
        self._refusals.pop(job.identity, None)
        self._finish(job, outcome, connection, now)

    def fail(self, job: PendingRegistration, failed: Failed, connection: UpstreamConnection, now: float) -> None:
        """Complete a registration that the controller refused, or answered without a usable cluster id."""
        self._ctx.metrics.registrations.labels(str(failed.status)).inc()
        if failed.cluster_id:
            self._refusals.pop(job.identity, None)  # a 409 with a cluster id is a success for agents and in the status
        else:
            self._note_refusal(job, failed.status, failed.error)
        self._finish(job, failed, connection, now)

    def _note_refusal(self, job: PendingRegistration, status: int, error: str) -> None:
        name, agent = str(job.payload.get("name", "")), str(job.payload.get("agent_id", ""))
        self._refusals.pop(job.identity, None)
        self._refusals[job.identity] = RefusedRegistration(name, agent, status, error, self._ctx.now)
        if len(self._refusals) > MAX_REFUSED:
            del self._refusals[next(iter(self._refusals))]

    def _finish(
        self, job: PendingRegistration, outcome: Outcome, connection: UpstreamConnection | None, now: float
    ) -> None:
        """Answer the waiting agents; if none waits, keep a success for an agent that tries again."""
        self._forget(job)
        if not job.answer(outcome) and job.call is not None and not isinstance(outcome, Failed):
            self._unclaimed[job.identity] = (outcome, now)
        if connection is not None and job.session is not None:
            self._ctx.events.put(SessionAnnounced(job.session, connection))
        self._settled(job, now)

    def _settled(self, job: PendingRegistration, now: float) -> None:
        replay = self._replays.get(job.link)
        if replay is not None and job in replay.waiting:
            replay.waiting.discard(job)
            self._advance(replay, now)

    def _forget(self, job: PendingRegistration) -> None:
        self._forget_requests(job)
        if self._by_identity.get(job.identity) is job:
            del self._by_identity[job.identity]

    def _forget_requests(self, job: PendingRegistration) -> None:
        for request_id in job.request_ids:
            self._by_request.pop(request_id, None)
        job.request_ids.clear()
