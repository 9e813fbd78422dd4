"""Long polls: an empty poll is held until a command arrives or its hold time ends.

The hold time is learnt per session, see docs/reference/protocol.md#13-poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from shim.bridge.context import BridgeContext
from shim.bridge.delivery import CommandDelivery
from shim.bridge.heartbeats import HeartbeatForwarder
from shim.bridge.link_pool import LinkPool
from shim.bridge.scheduler import DeadlineQueue
from shim.bridge.session_registry import SessionRegistry
from shim.core.agent_calls import Commands, Failed, OfferedCommand, PollCall
from shim.core.poll_hold import HoldEstimator
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.errors import AgentError
from shim.log import get
from shim.ports import Caller, CallResult

log = get(__name__)


def failed(error: AgentError) -> CallResult:
    """Return an `AgentError` as the result of a call."""
    return CallResult(Failed(error.status, str(error), error.retry_after_s))


class LongPolls:
    """The polls of all sessions, and the hold time of each, learnt from the way its earlier polls ended."""

    def __init__(
        self,
        ctx: BridgeContext,
        links: LinkPool,
        session_registry: SessionRegistry,
        delivery: CommandDelivery,
        heartbeats: HeartbeatForwarder,
    ) -> None:
        self._ctx = ctx
        self._links = links
        self._session_registry = session_registry
        self._delivery = delivery
        self._heartbeats = heartbeats
        self._tunnels: dict[SessionKey, asyncio.Future[None]] = {}
        self._deadlines = DeadlineQueue(ctx)
        self._no_commands = Commands((), ctx.settings.poll.frequency_s)
        self.stopping = False

    # --- polls for commands -------------------------------------------------------------------------------------------

    def poll(
        self, owner: str, caller: Caller, call: PollCall, arrived_s: float, now: float
    ) -> CallResult | Coroutine[Any, Any, CallResult]:
        """Answer a poll at once if it has nothing to fetch and may not be held; else return the wait for its answer.

        Raises `AgentError` as `SessionRegistry.session_for_call` and `LinkPool.link_for` do.
        """
        session = self._session_registry.session_for_call(owner, call.target, call.dialect, "poll", now)
        session.poll_at = now
        self._links.link_for(session, caller, now)
        limit_s = self.limit_s(session.hold)
        if limit_s > 0 or self._delivery.has_pending(session.key):
            return self._wait(session, caller.connection, arrived_s, limit_s)
        self._poll_arrived(session, session.hold, now)
        self._heartbeats.called(session, now)
        session.hold.reply_sent(now, self._ctx.settings.poll.max_hold_s)
        return CallResult(self._commands(()))

    async def _wait(self, session: Session, connection: int, arrived_s: float, limit_s: float) -> CallResult:
        """Answer a poll as soon as commands are offered to it, or when its hold time ends.

        Thousands of polls may wait at a time, so a held poll costs one coroutine, one future and no timer of its own.
        """
        now = self._ctx.now
        key, hold = session.key, session.hold
        self._poll_arrived(session, hold, now)
        poll = self._delivery.poll(key, connection, arrived_s, hold=limit_s > 0)
        held = poll.batch is None and not poll.offered.done()
        if held:
            self._deadlines.add(limit_s, self._delivery.expire_poll, key, poll)
            self._heartbeats.hold_started(session, now)
        else:
            self._heartbeats.called(session, now)
        try:
            await poll.offered
        except asyncio.CancelledError:
            if held:
                self._agent_disconnected(session, hold, now)
            else:
                hold.connection_lost()  # the poll was waiting for the disk: its duration does not depend on the agent
            self._delivery.cancel_poll(key, poll)
            raise
        if held:
            self._hold_ended(session, now, "replied")
        hold.reply_sent(self._ctx.now, self._ctx.settings.poll.max_hold_s)
        batch = poll.offered.result()
        commands = batch.offered if batch is not None else ()
        poll.batch = None
        return CallResult(self._commands(commands), batch)

    def _commands(self, commands: tuple[OfferedCommand, ...]) -> Commands:
        """Return the outcome of a poll: without commands the same object each time, so that it is encoded once."""
        frequency_s = self._ctx.settings.poll.frequency_s
        if commands:
            return Commands(commands, frequency_s)
        if self._no_commands.poll_frequency_s != frequency_s:
            self._no_commands = Commands((), frequency_s)
        return self._no_commands

    # --- hold times ---------------------------------------------------------------------------------------------------

    def limit_s(self, hold: HoldEstimator) -> float:
        """Return the number of seconds for which a poll may be held now; 0 means that it is answered at once."""
        poll = self._ctx.settings.poll
        if self.stopping or poll.hold == "off":
            return 0.0
        if poll.hold == "auto":
            return hold.limit_s(poll.max_hold_s)
        return min(poll.hold, poll.max_hold_s)

    def _poll_arrived(self, session: Session, hold: HoldEstimator, now: float) -> None:
        """Record the arrival of a poll.

        The caller must then call exactly one of `HoldEstimator.reply_sent`, `_agent_disconnected` and
        `HoldEstimator.connection_lost`.
        """
        if hold.poll_arrived(now):
            log.info(
                "poll_pacing_detected", session=session.key.ident, pace=hold.pace.value, interval_s=hold.interval_s
            )

    def _agent_disconnected(self, session: Session, hold: HoldEstimator, started_s: float) -> None:
        """Record that the agent disconnected during a hold, and learn its patience from that.

        Nothing is learnt while the shim is stopping: the agent may have been disconnected by the shutdown.
        """
        if self.stopping:
            hold.connection_lost()
        else:
            hold.agent_disconnected(self._ctx.now - started_s)
            self._session_registry.persistence.save_session(session)
        self._hold_ended(session, started_s, "left")

    def _hold_ended(self, session: Session, started_s: float, how: str) -> None:
        now = self._ctx.now
        self._ctx.metrics.hold_seconds.labels(how).observe(now - started_s)
        self._heartbeats.hold_ended(session, now)

    # --- tunnel polls -------------------------------------------------------------------------------------------------

    async def tunnel(self, session: Session) -> None:
        """Hold a tunnel poll until its state changes or its hold time ends, if `poll.hold_tunnel` is set.

        A waiting tunnel poll of the same session is answered at once. A poll is not held if the tunnel state has
        changed since the agent's previous poll.
        """
        hold, now = session.tunnel_hold, self._ctx.now
        self._poll_arrived(session, hold, now)
        limit_s = self.limit_s(hold)
        if self._ctx.settings.poll.hold_tunnel and limit_s > 0 and session.tunnel == session.last_sent_tunnel:
            self.tunnel_changed(session.key)
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._tunnels[session.key] = changed
            self._deadlines.add(limit_s, self._tunnel_over, session.key, changed)
            self._heartbeats.hold_started(session, now)
            try:
                await changed
            except asyncio.CancelledError:
                self._agent_disconnected(session, hold, now)
                raise
            finally:
                self._tunnel_over(session.key, changed)
            self._hold_ended(session, now, "replied")
        session.last_sent_tunnel = session.tunnel
        hold.reply_sent(self._ctx.now, self._ctx.settings.poll.max_hold_s)

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
