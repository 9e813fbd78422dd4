"""Registrations on their way up: an agent's own, a replay, one for an adopted agent (protocol.md §1.1, §1.4)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from shim.bridge.connection import Connection
from shim.bridge.context import Context
from shim.bridge.links import LinkRunner
from shim.core import link_events as ev
from shim.core.calls import Failed, Outcome, RegisterCall
from shim.core.link import LinkState
from shim.core.replies import conflict_id, error_status, error_text, register_reply
from shim.core.sessions import Session
from shim.logs import get
from shim.messages import Message

log = get(__name__)

CACHED_AFTER_S = 5.0
REPLAY_WINDOW = 32
REPLAY_ANSWER_S = 10.0
UNCLAIMED_S = 600.0
ABANDONED_S = 60.0
AGAIN_S = 10.0

Identity = tuple[str, ...]


def identity_of(session: Session) -> Identity | None:
    """Who registers: (owner, `name`, cluster name), or (owner, `agent`, agent id) where the dialect is keyed by it."""
    if session.key.kind == "agent":
        return session.key.owner, "agent", session.key.ident
    name = session.registration.get("name")
    return (session.key.owner, "name", name) if name else None


@dataclass(slots=True, eq=False)
class Job:
    """One registration that the controller has not answered. `session` is set where the shim itself asks."""

    identity: Identity
    runner: LinkRunner
    payload: dict[str, Any]
    secret: str
    call: RegisterCall | None = None
    session: Session | None = None
    waiters: set[asyncio.Future[Outcome]] = field(default_factory=set)
    request_id: str = ""
    sent_on: int = 0
    abandoned_at: float | None = None


class RegistrationListener(Protocol):
    """Who makes a session of an answer."""

    def registered(self, job: Job, reply: dict[str, Any], connection: Connection) -> Outcome:
        """The controller accepted; `reply` as `core.replies.register_reply` gives it."""

    def told(self, session: Session, connection: Connection) -> None:
        """The controller has just been told about this session."""


class Registrations:
    """All registrations under way, one per identity."""

    def __init__(self, ctx: Context, listener: RegistrationListener) -> None:
        self._ctx = ctx
        self._listener = listener
        self._by_identity: dict[Identity, Job] = {}
        self._by_request: dict[str, Job] = {}
        self._unclaimed: dict[Identity, tuple[Outcome, float]] = {}
        self._replays: dict[LinkRunner, _Replay] = {}
        self._asked_at: dict[Identity, float] = {}

    # --- an agent registers -------------------------------------------------------------------------------------------

    async def register(
        self, runner: LinkRunner, call: RegisterCall, cached: Callable[[], Outcome | None], arrived_s: float
    ) -> Outcome:
        """Answer an agent's registration within `register.deadline_s` of `arrived_s` (protocol.md §1.1).

        `cached` yields the answer from the store; it is asked after 5 s without a result.
        """
        identity = self._identity(runner, call)
        ready = self._unclaimed.pop(identity, None)
        if ready is not None and self._ctx.now - ready[1] < UNCLAIMED_S:
            return ready[0]
        job = self._join(runner, identity, call)
        runner.apply(ev.Hurry())
        if runner.machine.refused and runner.state is LinkState.WAITING:
            self._leave(job)
            return Failed(401, "the controller refuses the token")
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        job.waiters.add(waiter)
        try:
            return await self._await(runner, waiter, cached, arrived_s)
        finally:
            job.waiters.discard(waiter)
            self._leave(job)

    def _identity(self, runner: LinkRunner, call: RegisterCall) -> Identity:
        if call.known_by_agent:
            return runner.owner, "agent", call.agent_id
        return runner.owner, "name", call.name

    async def _await(
        self,
        runner: LinkRunner,
        waiter: asyncio.Future[Outcome],
        cached: Callable[[], Outcome | None],
        arrived_s: float,
    ) -> Outcome:
        deadline = arrived_s + self._ctx.settings.register.deadline_s
        patience = min(arrived_s + CACHED_AFTER_S, deadline)
        for until in (patience, deadline):
            await asyncio.wait((waiter,), timeout=max(0.0, until - self._ctx.now))
            if waiter.done():
                return waiter.result()
            if not runner.machine.refused:
                found = cached()
                if found is not None:
                    self._ctx.metrics.registrations.labels("cached").inc()
                    return found
        self._ctx.metrics.registrations.labels("timeout").inc()
        return Failed(503, "the controller did not answer in time", retry_after_s=5)

    def _join(self, runner: LinkRunner, identity: Identity, call: RegisterCall) -> Job:
        job = self._by_identity.get(identity)
        if job is not None:
            job.abandoned_at = None
            if job.call is None:  # a replay is under way: its answer serves this agent too, and the news is kept
                job.call, job.payload, job.secret = call, {**job.payload, **call.payload}, call.secret
            return job
        job = Job(identity, runner, dict(call.payload), call.secret, call=call)
        self._by_identity[identity] = job
        self._try_send(job)
        return job

    def _leave(self, job: Job) -> None:
        if not job.waiters and self._by_identity.get(job.identity) is job:
            job.abandoned_at = self._ctx.now

    # --- the shim registers -------------------------------------------------------------------------------------------

    def ask(self, session: Session, runner: LinkRunner, payload: dict[str, Any]) -> bool:
        """Register a session from what is known of it, at most once in 10 s. False if nothing was started."""
        identity = identity_of(session) or (*session.key,)
        now = self._ctx.now
        if identity in self._by_identity or now - self._asked_at.get(identity, -AGAIN_S) < AGAIN_S:
            return False
        self._asked_at[identity] = now
        self._start(session, runner, payload, identity)
        return True

    def _start(self, session: Session, runner: LinkRunner, payload: dict[str, Any], identity: Identity) -> Job:
        secret = payload.pop("k8s_service_token", "")
        job = Job(identity, runner, payload, secret, session=session)
        self._by_identity[identity] = job
        self._try_send(job)
        return job

    # --- the link -----------------------------------------------------------------------------------------------------

    def replay(self, runner: LinkRunner, sessions: list[tuple[Session, dict[str, Any]]]) -> None:
        """After a reconnect: tell these sessions, a window at a time, then agents' own pending registrations."""
        now = self._ctx.now
        for job in list(self._by_identity.values()):
            if job.runner is runner:
                if job.abandoned_at is not None and now - job.abandoned_at > ABANDONED_S:
                    self._forget(job)
                else:
                    self._try_send(job)
        pending = {job.identity: job for job in self._by_identity.values() if job.runner is runner}
        todo = deque(item for item in sessions if identity_of(item[0]) not in pending)
        replay = _Replay(runner, todo, set(pending.values()))
        self._replays[runner] = replay
        for job in pending.values():
            self._give_time(replay, job)
        self._advance(replay)

    def _advance(self, replay: _Replay) -> None:
        runner = replay.runner
        if self._replays.get(runner) is not replay or runner.connection is None:
            return
        while replay.todo and len(replay.waiting) < REPLAY_WINDOW:
            session, payload = replay.todo.popleft()
            identity = identity_of(session) or (*session.key,)
            if identity in self._by_identity:
                continue
            job = self._start(session, runner, payload, identity)
            replay.waiting.add(job)
            self._give_time(replay, job)
        if not replay.todo and not replay.waiting:
            del self._replays[runner]
            runner.replayed()

    def _give_time(self, replay: _Replay, job: Job) -> None:
        def over() -> None:
            if job in replay.waiting and self._replays.get(replay.runner) is replay:
                replay.waiting.discard(job)
                if job.session is not None and replay.runner.connection is not None:
                    self._listener.told(job.session, replay.runner.connection)
                self._advance(replay)

        self._ctx.timers.call_later(REPLAY_ANSWER_S, over)

    def link_lost(self, runner: LinkRunner) -> None:
        """Answers will not come: agents' own registrations are sent again on the next connection."""
        self._replays.pop(runner, None)
        for job in list(self._by_identity.values()):
            if job.runner is runner:
                self._by_request.pop(job.request_id, None)
                job.request_id, job.sent_on = "", 0
                if job.call is None:
                    self._forget(job)

    def link_refused(self, runner: LinkRunner) -> None:
        """The token is refused: so is every registration that waits."""
        for job in list(self._by_identity.values()):
            if job.runner is runner:
                self._finish(job, Failed(401, "the controller refuses the token"))

    def _try_send(self, job: Job) -> None:
        connection = job.runner.connection
        if connection is None or job.sent_on == connection.serial:
            return
        job.request_id = f"req_{self._ctx.new_id()}"
        job.sent_on = connection.serial
        self._by_request[job.request_id] = job
        payload = dict(job.payload)
        if job.secret:
            payload["k8s_service_token"] = job.secret
        connection.send("register", payload, job.request_id)

    # --- the controller answers ---------------------------------------------------------------------------------------

    def succeeded(self, connection: Connection, message: Message) -> Job | None:
        """A `register_success`. Returns its job, `None` if nobody waits for this `request_id`."""
        job = self._by_request.get(message.request_id)
        if job is None:
            return None
        reply = register_reply(message.payload)
        if not reply:
            self._failed(job, connection, Failed(502, "the controller answered without a usable cluster id"))
            return None
        self._ctx.metrics.registrations.labels("ok").inc()
        self._finish(job, self._listener.registered(job, reply, connection), connection)
        return job

    def refused(self, connection: Connection, message: Message) -> bool:
        """An `error` with the `request_id` of a registration. False if it is not one."""
        job = self._by_request.get(message.request_id)
        if job is None:
            return False
        status = error_status(message.payload)
        text = error_text(message.payload)
        if job.runner.token and job.runner.token in text:
            text = "the controller reported an error"
        log.warning("register_failed", status=status, error=text, session=str(job.identity[-1]))
        known = conflict_id(message.payload) if status == 409 else ""
        self._failed(job, connection, Failed(status, text, cluster_id=known))
        return True

    def _failed(self, job: Job, connection: Connection, failed: Failed) -> None:
        self._ctx.metrics.registrations.labels(str(failed.status)).inc()
        self._finish(job, failed, connection)

    def _finish(self, job: Job, outcome: Outcome, connection: Connection | None = None) -> None:
        self._forget(job)
        waiting = [waiter for waiter in job.waiters if not waiter.done()]
        for waiter in waiting:
            waiter.set_result(outcome)
        if not waiting and job.call is not None and not isinstance(outcome, Failed):
            self._unclaimed[job.identity] = (outcome, self._ctx.now)
            self._prune_unclaimed()
        if connection is not None and job.session is not None:
            self._listener.told(job.session, connection)
        for replay in list(self._replays.values()):
            if job in replay.waiting:
                replay.waiting.discard(job)
                self._advance(replay)

    def _forget(self, job: Job) -> None:
        self._by_request.pop(job.request_id, None)
        if self._by_identity.get(job.identity) is job:
            del self._by_identity[job.identity]

    def _prune_unclaimed(self) -> None:
        now = self._ctx.now
        for identity in [i for i, (_, at) in self._unclaimed.items() if now - at >= UNCLAIMED_S]:
            del self._unclaimed[identity]


@dataclass(slots=True, eq=False)
class _Replay:
    """What a reconnect still has to tell, and what it waits for."""

    runner: LinkRunner
    todo: deque[tuple[Session, dict[str, Any]]]
    waiting: set[Job]
