"""How many agents a token may have, and what is kept of one that the controller has not accepted (protocol.md §1.6).

What is adopted on a token of an agent's own before the controller has accepted it since our start may be anybody's: it
is few, in memory only, and forgotten with its link.
"""

from __future__ import annotations

from collections.abc import Callable

from shim.bridge.context import BridgeContext
from shim.core.records import SessionKey
from shim.errors import AgentError
from shim.logs import get

log = get(__name__)

MAX_UNVERIFIED_SESSIONS = 8
RETRY_AFTER_S = 60


class SessionQuota:
    """Decides about new sessions. `proven(owner)` tells whether the controller has accepted the owner's token."""

    def __init__(self, ctx: BridgeContext, proven: Callable[[str], bool]) -> None:
        self._ctx = ctx
        self._proven = proven
        self._unproven: set[SessionKey] = set()
        self._told: set[str] = set()

    def admit(self, owner: str) -> None:
        """Raise `AgentError` 503 when an owner has as many sessions as it may."""
        proven = self._proven(owner)
        limit = self._ctx.settings.sessions.max_per_owner if proven else MAX_UNVERIFIED_SESSIONS
        if self._ctx.sessions.count_of(owner) < limit:
            self._told.discard(owner)
            return
        self._ctx.metrics.sessions_refused.inc()
        if not proven:
            raise AgentError(503, "the controller has not accepted the token yet", retry_after_s=RETRY_AFTER_S)
        if owner not in self._told:
            self._told.add(owner)
            log.error("too_many_sessions", owner=owner[:16], limit=limit, hint="see sessions.max_per_owner")
        raise AgentError(503, "too many agents: see sessions.max_per_owner", retry_after_s=RETRY_AFTER_S)

    def adopted(self, key: SessionKey) -> None:
        """A session was made for an agent that did not register here."""
        if not self._proven(key.owner):
            self._unproven.add(key)

    def persistence_deferred(self, key: SessionKey) -> bool:
        """Whether nothing of this session may be stored yet."""
        return key in self._unproven

    def on_token_accepted(self, owner: str) -> list[SessionKey]:
        """The controller has accepted the owner's token: the sessions that may be stored now."""
        return self._release(owner)

    def on_owner_removed(self, owner: str) -> list[SessionKey]:
        """The owner's last link is gone: the sessions to forget."""
        self._told.discard(owner)
        return self._release(owner)

    def _release(self, owner: str) -> list[SessionKey]:
        found = [key for key in self._unproven if key.owner == owner]
        self._unproven.difference_update(found)
        return found
