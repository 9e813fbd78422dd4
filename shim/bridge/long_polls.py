"""Long polls: an empty poll is held until a command arrives or its hold time ends.

The hold time is learnt per session, see docs/reference/protocol.md#13-poll.
"""

from __future__ import annotations

import asyncio
from typing import Any

from shim.bridge.context import BridgeContext
from shim.bridge.delivery import CommandDelivery
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.link_pool import LinkPool
from shim.bridge.scheduler import DeadlineQueue, DueCallback
from shim.bridge.session_registry import SessionRegistry
from shim.core.agent_calls import Commands, Failed, PollCall
from shim.core.poll_hold import HoldEstimator
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.errors import AgentError
from shim.log import get
from shim.ports import Caller, CallResult


class LongPolls:
    """Handler of polls."""

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        session_registry: SessionRegistry,
        delivery: CommandDelivery,
        holding: PollHolds,
    ) -> None:
        self._ctx = ctx
        self._links = links
        self._session_registry = session_registry
        self._delivery = delivery
        self._holding = holding

    def _polled(self, owner: str, client: Caller, call: PollCall) -> Session:
        session = self._session_registry.session_for_call(owner, call.target, call.dialect)
        session.poll_at = self._ctx.now
        self._session_registry.usage.note(session.key, call.dialect, "poll", session.last_seen_unix)
        self._links.link_for(session, client, self._ctx.now)
        return session

    def empty(self, owner: str, client: Caller, call: PollCall) -> CallResult | None:
        """Answer a poll that has nothing to fetch and may not be held; return None for every other poll."""
        known = self._ctx.sessions.get(self._ctx.sessions.key_of(owner, call.target))
        if known is None or self._holding.limit_s(known.hold) > 0 or self._delivery.has_pending(known.key):
            return None
        session = self._polled(owner, client, call)
        self._holding.poll_arrived(session, session.hold)
        self._holding.presence.called(session)
        self._holding.hold_answered(session.hold)
        return CallResult(Commands((), self._ctx.settings.poll.frequency_s))

    async def wait(self, owner: str, client: Caller, call: PollCall, arrived_s: float) -> CallResult:
        """Answer a poll as soon as commands are offered to it, or when its hold time ends.

        Thousands of polls may wait at a time, so a held poll costs one coroutine, one future and no timer of its own.
        """
        try:
            session = self._polled(owner, client, call)
        except AgentError as error:
            return failed(error)
        key, hold = session.key, session.hold
        limit_s = self._holding.poll_arrived(session, hold)
        poll = self._delivery.poll(key, client.connection, arrived_s, hold=limit_s > 0)
        held_at: float | None = None
        if poll.batch is None and not poll.offered.done():
            held_at = self._holding.hold_started(session, limit_s, self._delivery.expire_poll, poll)
        else:
            self._holding.presence.called(session)
        try:
            await poll.offered
        except asyncio.CancelledError:
            if held_at is None:
                hold.connection_lost()  # the poll was waiting for the disk: its duration does not depend on the agent
            else:
                self._holding.agent_disconnected(session, hold, held_at)
            self._delivery.cancel_poll(key, poll)
            raise
        if held_at is not None:
            self._holding.reply_sent(session, held_at)
        self._holding.hold_answered(hold)
        batch = poll.offered.result()
        commands = batch.offered if batch is not None else ()
        poll.batch = None
        return CallResult(Commands(commands, self._ctx.settings.poll.frequency_s), batch)


def failed(error: AgentError) -> CallResult:
    """Return an `AgentError` as the result of a call."""
    return CallResult(Failed(error.status, str(error), error.retry_after_s))


log = get(__name__)


class PollHolds:
    """The hold time of each session, learnt from the way its earlier polls ended."""

    def __init__(self, ctx: BridgeContext, presence: HeartbeatForwarder, session_registry: SessionRegistry) -> None:
        self._ctx = ctx
        self.presence = presence
        self._session_registry = session_registry
        self._tunnels: dict[SessionKey, asyncio.Future[None]] = {}
        self._deadlines = DeadlineQueue(ctx)
        self.stopping = False

    def limit_s(self, hold: HoldEstimator) -> float:
        """Return the number of seconds for which a poll may be held now; 0 means that it is answered at once."""
        poll = self._ctx.settings.poll
        if self.stopping or poll.hold == "off":
            return 0.0
        if poll.hold == "auto":
            return hold.limit_s(poll.max_hold_s)
        return min(poll.hold, poll.max_hold_s)

    def poll_arrived(self, session: Session, hold: HoldEstimator) -> float:
        """Record the arrival of a poll and return for how many seconds it may be held.

        The caller must then call exactly one of `hold_answered`, `agent_disconnected` and
        `HoldEstimator.connection_lost`.
        """
        if hold.poll_arrived(self._ctx.now):
            log.info(
                "poll_pacing_detected", session=session.key.ident, pace=hold.pace.value, interval_s=hold.interval_s
            )
        return self.limit_s(hold)

    def hold_started(self, session: Session, limit_s: float, end: DueCallback, poll: Any) -> float:
        """Start to hold a poll and return the current monotonic time.

        `end(session.key, poll)` is called after `limit_s` in any case and must ignore a poll that was answered before.
        The caller passes the returned time to `reply_sent` or `agent_disconnected`.
        """
        self._deadlines.add(limit_s, end, session.key, poll)
        self.presence.hold_started(session)
        return self._ctx.now

    def reply_sent(self, session: Session, started: float) -> None:
        """Record that a hold ended with a reply of the shim."""
        self._ended(session, started, "replied")

    def agent_disconnected(self, session: Session, hold: HoldEstimator, started: float) -> None:
        """Record that the agent disconnected during a hold, and learn its patience from that.

        Nothing is learnt while the shim is stopping: the agent may have been disconnected by the shutdown.
        """
        if self.stopping:
            hold.connection_lost()
        else:
            hold.agent_disconnected(self._ctx.now - started)
            self._session_registry.save(session)
        self._ended(session, started, "left")

    def _ended(self, session: Session, started: float, how: str) -> None:
        self._ctx.metrics.hold_seconds.labels(how).observe(self._ctx.now - started)
        self.presence.hold_ended(session)

    def hold_answered(self, hold: HoldEstimator) -> None:
        """Record a reply to a poll, which lets the hold time grow."""
        hold.reply_sent(self._ctx.now, self._ctx.settings.poll.max_hold_s)

    # --- tunnel polls -------------------------------------------------------------------------------------------------

    async def tunnel(self, session: Session) -> None:
        """Hold a tunnel poll until its state changes or its hold time ends, if `poll.hold_tunnel` is set.

        A waiting tunnel poll of the same session is answered at once. A poll is not held if the tunnel state has
        changed since the agent's previous poll.
        """
        hold = session.tunnel_hold
        limit_s = self.poll_arrived(session, hold)
        if self._ctx.settings.poll.hold_tunnel and limit_s > 0 and session.tunnel == session.last_sent_tunnel:
            self.tunnel_changed(session.key)
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._tunnels[session.key] = changed
            started = self.hold_started(session, limit_s, self._tunnel_over, changed)
            try:
                await changed
            except asyncio.CancelledError:
                self.agent_disconnected(session, hold, started)
                raise
            finally:
                self._tunnel_over(session.key, changed)
            self.reply_sent(session, started)
        session.last_sent_tunnel = session.tunnel
        self.hold_answered(hold)

    def tunnel_changed(self, key: SessionKey) -> None:
        """Answer the waiting tunnel poll of a session."""
        waiting = self._tunnels.pop(key, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _tunnel_over(self, key: SessionKey, changed: asyncio.Future[None]) -> None:
        if self._tunnels.get(key) is changed:
            self.tunnel_changed(key)

    def held_tunnels(self) -> int:
        """Return the number of tunnel polls that wait."""
        return len(self._tunnels)

    def end_all(self) -> None:
        """Answer every held tunnel poll and hold no further poll."""
        self.stopping = True
        for key in list(self._tunnels):
            self.tunnel_changed(key)
