"""Operators' actions on a running shim: drain it, purge or redeliver a command, remove an agent."""

from __future__ import annotations

import asyncio
from enum import Enum
from functools import partial

import msgspec
from msgspec.structs import replace

from shim.bridge.command_queues import CommandQueues
from shim.bridge.context import BridgeContext, resolve
from shim.bridge.delivery import CommandDelivery
from shim.bridge.outbox import Outbox
from shim.bridge.registration import Registrations
from shim.bridge.session_registry import SessionRegistry
from shim.core.command_queue import CommandEvent, CommandQueue, next_state
from shim.core.records import (
    CommandDetails,
    CommandRecord,
    CommandState,
    FindCommand,
    RequeueCommand,
    SessionKey,
)
from shim.core.sessions import MIN_FRESH_S, Session
from shim.core.text import format_duration
from shim.errors import IllegalTransition, OperatorError, StoreError
from shim.log import get
from shim.ports import Timer

log = get(__name__)

CHECK_S = 0.5
NOT_FOUND = 404
REASON_CHARS = 200
_STATE_TEXTS = {
    CommandState.QUEUED: "it waits for its agent",
    CommandState.OFFERED: "it is in a reply that the agent may have",
    CommandState.UNCERTAIN: "it is uncertain and will be offered again",
    CommandState.DELIVERED: "it was delivered",
    CommandState.ANSWERED: "its agent has answered it",
    CommandState.CLOSED: "it is done, and the controller has its result",
    CommandState.EXPIRED: "it expired",
    CommandState.DEAD: "it was given up",
}


class DrainState(Enum):
    """The state of a drain."""

    OFF = "off"
    DRAINING = "draining"
    DRAINED = "drained"
    TIMED_OUT = "timed out"  # not empty before the deadline; new commands are still rejected


# The names in JSON are older than the attributes: the admin port and other replicas use them.
class Drain(msgspec.Struct, frozen=True, rename={"since_unix": "since_wall", "deadline_unix": "deadline_wall"}):
    """The progress of a drain.

    `commands` and `results` count what the shim still holds; `refused` counts the commands that were rejected since the
    drain began. `since_unix` and `deadline_unix` are Unix seconds, 0 while no drain is active.
    """

    state: DrainState
    since_unix: float
    deadline_unix: float
    commands: int
    results: int
    refused: int


class AdminActions:
    """Handler of operators' actions.

    Every action may raise `OperatorError`, whose text says why it failed and what to do instead.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        queues: CommandQueues,
        outbox: Outbox,
        delivery: CommandDelivery,
        registrations: Registrations,
        session_registry: SessionRegistry,
    ) -> None:
        self._ctx = ctx
        self._queues = queues
        self._outbox = outbox
        self._delivery = delivery
        self._registrations = registrations
        self._session_registry = session_registry
        self._state = DrainState.OFF
        self._since_unix = self._deadline_unix = self._deadline_at = 0.0
        self._was_empty = False
        self._timer: Timer | None = None

    # --- drain --------------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """True from the start of a drain until it is cancelled: new commands are rejected."""
        return self._state is not DrainState.OFF

    def progress(self) -> Drain:
        """Return the progress of the drain."""
        return Drain(
            self._state,
            self._since_unix,
            self._deadline_unix,
            len(self._queues),
            len(self._outbox),
            self._delivery.refused_by_drain,
        )

    def drain(self, timeout_s: float) -> Drain:
        """Reject new commands until all commands and results are delivered or `timeout_s` have passed.

        A second call only moves the deadline. A drain is not stored: a restarted shim accepts commands again.
        """
        wall = self._ctx.clock.wall_s()
        if not self.draining:
            self._since_unix = wall
            self._delivery.refused_by_drain = 0
            log.info("drain_started", timeout_s=timeout_s)
        self._state = DrainState.DRAINING
        self._delivery.closed = True
        self._was_empty = False
        self._deadline_unix, self._deadline_at = wall + timeout_s, self._ctx.now + timeout_s
        self._watch()
        return self.progress()

    def resume(self) -> Drain:
        """Cancel the drain and accept commands again."""
        if self.draining:
            log.info("drain_cancelled")
        self.stop()
        self._state = DrainState.OFF
        self._since_unix = self._deadline_unix = 0.0
        self._delivery.closed = False
        return self.progress()

    def stop(self) -> None:
        """Stop watching the drain, because the shim stops or the drain is cancelled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        self.stop()
        self._timer = self._ctx.timers.call_later(CHECK_S, self._check)

    def _check(self) -> None:
        """End the drain once the shim was empty at two checks in a row.

        A command or result that was being written to disk at the first check is visible at the second.
        """
        now = self.progress()
        empty = not now.commands and self._outbox.empty
        if empty and self._was_empty:
            self._state = DrainState.DRAINED
            log.info("drained", refused=now.refused)
            return
        self._was_empty = empty
        if self._ctx.now >= self._deadline_at and self._state is DrainState.DRAINING:
            self._state = DrainState.TIMED_OUT
            log.warning("drain_timed_out", commands=now.commands, results=now.results)
        self._watch()

    # --- single commands ----------------------------------------------------------------------------------------------

    async def find(self, command_id: str) -> list[CommandDetails]:
        """Return all commands with this id, of every session."""
        try:
            return await self._ctx.execute(FindCommand(command_id))
        except StoreError as error:
            raise _unanswered(error) from error

    async def purge(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        """End a waiting or uncertain command as DEAD and report it to the controller as `undeliverable`.

        `session`, an id or a whole session key, selects one of several sessions that have a command with this id.
        """
        held = [
            (key, queue)
            for key, queue in self._queues.items()
            if means(session, key) and queue.get(command_id) is not None
        ]
        if not held:
            record = _only(await self.find(command_id), session).record
            raise OperatorError(409, f"{_STATE_TEXTS[record.state]}: only a command that still waits can be purged")
        key, queue = held[0]
        if len(held) > 1:
            raise _ambiguous([key for key, _ in held])
        self._purge(key, queue, command_id, _with_reason("purged by an operator", reason))
        found = _only(await self.find(command_id), str(key)).record
        if found.state is not CommandState.DEAD:
            raise OperatorError(503, "purged in memory, but not on disk: it is back after a restart")
        return found

    def _purge(self, key: SessionKey, queue: CommandQueue, command_id: str, why: str) -> None:
        queued = queue.give_up(command_id)
        if queued is None:
            raise OperatorError(
                409,
                "it is in a reply that the agent may have: wait until it is delivered or uncertain "
                f"(at most {self._ctx.settings.commands.evidence_s:g} s) and look again",
            )
        self._queues.finish(key, queued, CommandState.DEAD, "undeliverable", why)

    async def redeliver(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        """Queue a DELIVERED, EXPIRED or DEAD command again, for `commands.ttl_s`.

        `session` as in `purge`.
        """
        if self.draining:
            raise OperatorError(409, "the shim is being drained: cancel that first (agent-shim drain --cancel)")
        record = _only(await self.find(command_id), session).record
        key = record.session
        try:
            queued = next_state(record.state, CommandEvent.REDELIVER)
        except IllegalTransition:
            why = "only one that was delivered, expired or given up, and has no result, can be delivered again"
            raise OperatorError(409, f"{_STATE_TEXTS[record.state]}: {why}") from None
        if record.seq == 0:
            raise OperatorError(
                409, "it was rejected when it arrived and never stored: the controller must send it again"
            )
        agent = self._ctx.sessions.get(key)
        if agent is None:
            raise OperatorError(409, f"its agent {key.ident} no longer exists: no agent would fetch it")
        if not self._queues.get_or_create(key).room_for(record.size_bytes, self._ctx.queue_policy):
            raise OperatorError(409, "the queue of its agent is full")
        why = _with_reason("by an operator", reason)
        wall, ttl_s = self._ctx.clock.wall_s(), self._ctx.settings.commands.ttl_s
        again = replace(record, state=queued, attempts=0, expires_unix=wall + ttl_s)
        step = self._ctx.step(
            key, (command_id,), wall, "redeliver", f"{why}; before that, {_STATE_TEXTS[record.state]}"
        )
        answer: asyncio.Future[bool | StoreError] = asyncio.get_running_loop().create_future()
        done = partial(self._requeued, agent, again, answer)
        self._ctx.store.submit(RequeueCommand(key, command_id, wall, again.expires_unix), step, done=done)
        outcome = await answer
        if isinstance(outcome, StoreError):
            raise _unanswered(outcome)
        if not outcome:
            raise OperatorError(409, "it changed in the meantime: look at it and try again")
        return again

    def _requeued(
        self,
        agent: Session,
        record: CommandRecord,
        answer: asyncio.Future[bool | StoreError],
        outcome: bool | StoreError,
    ) -> None:
        """Queue a command inside the store's callback, before any other event can change it."""
        resolve(answer, outcome)
        if outcome is True:
            log.info("command_redelivered", command=record.id, session=record.session.ident)
            self._queues.count("redelivered_by_hand")
            self._delivery.requeued(agent, record, self._ctx.moment())

    # --- removal of an agent ------------------------------------------------------------------------------------------

    async def forget(self, agent: str) -> SessionKey:
        """Remove an agent that no longer calls; end its waiting commands and report them to the controller.

        The agent is named by its name, its id or its whole session key. Raises `OperatorError`: 404 unknown,
        409 ambiguous or still calling, 503 if the store fails.
        """
        keys = self._named(agent)
        if not keys:
            raise OperatorError(NOT_FOUND, "no agent of this name or id is known")
        if len(keys) > 1:
            shown = ", ".join(str(key) for key in sorted(keys)[:10])
            raise OperatorError(409, f"{len(keys)} agents have this name or id, choose one by its whole key: {shown}")
        key = keys.pop()
        self._refuse_living(key)
        self._ctx.fallback.by_agent.pop(key, None)
        self._session_registry.usage.forget(key)
        session = self._ctx.sessions.get(key)
        if session is not None:
            self._registrations.forget(session)
            log.info("agent_forgotten", session=key.ident)
            try:
                await self._session_registry.forget(session)
            except StoreError:
                raise OperatorError(503, "forgotten in memory, but not on disk: it is back after a restart") from None
        return key

    def _named(self, agent: str) -> set[SessionKey]:
        sessions = self._ctx.sessions
        found = {session.key for session in sessions if agent in _names(session)}
        others = {*self._ctx.fallback.by_agent, *(key for key, _ in self._session_registry.usage)}
        found |= {key for key in others if sessions.get(key) is None and agent in (key.ident, str(key))}
        return found | {key for key, call in self._ctx.fallback.by_agent.items() if call.name == agent}

    def _refuse_living(self, key: SessionKey) -> None:
        """Raise `OperatorError` 409 if the agent still calls: its next call would create it again."""
        session, call = self._ctx.sessions.get(key), self._ctx.fallback.by_agent.get(key)
        ago_s = self._ctx.clock.wall_s() - max(
            session.last_seen_unix if session is not None else 0.0,
            call.wall_s if call is not None else 0.0,
            *(use.last_unix for owner, uses in self._session_registry.usage if owner == key for use in uses.values()),
            0.0,
        )
        if (session is not None and session.fresh(self._ctx.now)) or ago_s < MIN_FRESH_S:
            raise OperatorError(
                409, f"it called {format_duration(ago_s)} ago: stop it first, its next call makes it known again"
            )


def _unanswered(error: StoreError) -> OperatorError:
    return OperatorError(503, f"the store did not answer: {error}")


def means(session: str, key: SessionKey) -> bool:
    """Return True if an operator's text means this session: an id, a whole key, or nothing for any session."""
    return session in ("", key.ident, str(key))


def unknown_command(where: str = "") -> OperatorError:
    """Return the error for a command that no session has; `where` restricts it to one session."""
    return OperatorError(
        NOT_FOUND, f"no command with this id is known{where}; ended ones are kept for commands.retain_s"
    )


def _only(found: list[CommandDetails], session: str) -> CommandDetails:
    """Return the one command that is meant. Raises `OperatorError` 404 or 409."""
    meant = [each for each in found if means(session, each.record.session)]
    if not meant:
        raise unknown_command(" in this session" if session else "")
    if len(meant) > 1:
        raise _ambiguous([each.record.session for each in meant])
    return meant[0]


def _ambiguous(keys: list[SessionKey]) -> OperatorError:
    return OperatorError(409, f"several agents have this id, choose a session: {', '.join(map(str, keys))}")


def _with_reason(what: str, reason: str) -> str:
    shown = "".join(char for char in reason if char.isprintable())[:REASON_CHARS]
    return f"{what}: {shown}" if shown else what


def _names(session: Session) -> tuple[str, ...]:
    return session.key.ident, str(session.key), session.agent_id, session.name
