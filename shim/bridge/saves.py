"""Sessions on their way to the disk; where it refuses, memory goes on, and they are stored when it takes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shim.bridge.context import BridgeContext
from shim.core.records import Operation, SaveAlias, SaveSession, SaveTunnel, SessionKey
from shim.core.sessions import Session
from shim.errors import StoreError


class SessionPersistence:
    """Stores sessions, their aliases and tunnel states; nothing of one that is `withheld`."""

    def __init__(self, ctx: BridgeContext, withheld: Callable[[SessionKey], bool]) -> None:
        self._ctx = ctx
        self._withheld = withheld
        self._unsaved: set[SessionKey] = set()

    def save_session(self, session: Session) -> None:
        """Store a session as it is now."""
        self._submit(session.key, [SaveSession(session.record())])

    def save_tunnel(self, session: Session, state: dict[str, Any]) -> None:
        """Store its tunnel state."""
        self._submit(session.key, [SaveTunnel(session.key, state)])

    def save_alias(self, session: Session, agent_id: str) -> None:
        """Store that this agent id stands for it."""
        self._submit(session.key, [SaveAlias(session.key.owner, agent_id, session.key)])

    def retry(self) -> None:
        """Try one that the disk has refused; once it is taken, the others follow."""
        while self._unsaved:
            if self.save_all(self._unsaved.pop()):
                return

    def save_all(self, key: SessionKey) -> bool:
        """Store a session with its alias and tunnel state. False if it is gone."""
        session = self._ctx.sessions.get(key)
        if session is None:
            return False
        operations: list[Operation] = [SaveSession(session.record())]
        if session.tunnel is not None:
            operations.append(SaveTunnel(key, session.tunnel))
        if self._ctx.sessions.alias_is(key.owner, session.agent_id, key):
            operations.append(SaveAlias(key.owner, session.agent_id, key))
        self._submit(key, operations)
        return True

    def _submit(self, key: SessionKey, operations: list[Operation]) -> None:
        if self._withheld(key):
            return

        def done(outcome: list[Any] | StoreError) -> None:
            if isinstance(outcome, StoreError):
                self._unsaved.add(key)
            elif self._unsaved:
                self.retry()

        self._ctx.store.submit(operations, done)
