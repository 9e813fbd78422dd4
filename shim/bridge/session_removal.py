"""Removal of one agent by an operator, for an agent that called by mistake or was decommissioned."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shim.bridge.context import BridgeContext
from shim.bridge.registration import Registrations
from shim.core.call_records import RouteUsage
from shim.core.records import SessionKey
from shim.core.sessions import MIN_FRESH_S, Session
from shim.core.text import format_duration
from shim.errors import OperatorError, StoreError
from shim.log import get

log = get(__name__)


class SessionRemoval:
    """Handler of removals. `end` removes a session and deletes its stored rows.

    An agent is named by its name, its id or its whole session key.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        usage: RouteUsage,
        registrations: Registrations,
        end: Callable[[Session], Awaitable[None]],
    ) -> None:
        self._ctx = ctx
        self._usage = usage
        self._registrations = registrations
        self._end = end

    async def forget(self, agent: str) -> SessionKey:
        """Remove an agent that no longer calls; end its waiting commands and report them to the controller.

        Raises `OperatorError`: 404 unknown, 409 ambiguous or still calling, 503 if the store fails.
        """
        keys = self._named(agent)
        if not keys:
            raise OperatorError(404, "no agent of this name or id is known")
        if len(keys) > 1:
            shown = ", ".join(str(key) for key in sorted(keys)[:10])
            raise OperatorError(409, f"{len(keys)} agents have this name or id, choose one by its whole key: {shown}")
        key = keys.pop()
        self._refuse_living(key)
        self._ctx.fallback.by_agent.pop(key, None)
        self._usage.forget(key)
        session = self._ctx.sessions.get(key)
        if session is not None:
            self._registrations.forget(session)
            log.info("agent_forgotten", session=key.ident)
            try:
                await self._end(session)
            except StoreError:
                raise OperatorError(503, "forgotten in memory, but not on disk: it is back after a restart") from None
        return key

    def _named(self, agent: str) -> set[SessionKey]:
        sessions = self._ctx.sessions
        found = {session.key for session in sessions if agent in _names(session)}
        others = {*self._ctx.fallback.by_agent, *(key for key, _ in self._usage)}
        found |= {key for key in others if sessions.get(key) is None and agent in (key.ident, str(key))}
        return found | {key for key, call in self._ctx.fallback.by_agent.items() if call.name == agent}

    def _refuse_living(self, key: SessionKey) -> None:
        """Raise `OperatorError` 409 if the agent still calls: its next call would create it again."""
        session, call = self._ctx.sessions.get(key), self._ctx.fallback.by_agent.get(key)
        ago_s = self._ctx.clock.wall_s() - max(
            session.last_seen_unix if session is not None else 0.0,
            call.wall_s if call is not None else 0.0,
            *(use.last_unix for owner, uses in self._usage if owner == key for use in uses.values()),
            0.0,
        )
        if (session is not None and session.fresh(self._ctx.now)) or ago_s < MIN_FRESH_S:
            raise OperatorError(
                409, f"it called {format_duration(ago_s)} ago: stop it first, its next call makes it known again"
            )


def _names(session: Session) -> tuple[str, ...]:
    return session.key.ident, str(session.key), session.agent_id, session.name
