"""Storage of sessions with what belongs to them: aliases and tunnel states."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any

from shim.bridge.context import BridgeContext
from shim.core.records import Operation, SaveAlias, SaveSession, SaveTunnel, SessionKey
from shim.core.sessions import Session
from shim.errors import StoreError

STORE_WAIT_S = 1.0


class SessionPersistence:
    """Storage of sessions, aliases and tunnel states.

    A refused write is retried, and sessions that were to be stored together stay together.
    """

    def __init__(self, ctx: BridgeContext) -> None:
        self._ctx = ctx
        self._deferred: set[SessionKey] = set()
        self._unsaved: list[frozenset[SessionKey]] = []  # disjoint; each is stored in one transaction
        self._newest = asyncio.Event()  # set once the store has answered the newest write
        self._newest.set()

    def defer(self, key: SessionKey) -> None:
        """Store nothing of a session until its owner is released."""
        self._deferred.add(key)

    def is_deferred(self, key: SessionKey) -> bool:
        """Return True if the session may not be stored yet."""
        return key in self._deferred

    def release(self, owner: str) -> list[SessionKey]:
        """Allow the owner's deferred sessions to be stored, and return their keys."""
        found = [key for key in self._deferred if key.owner == owner]
        self._deferred.difference_update(found)
        return found

    def save_session(self, session: Session) -> None:
        """Store a session."""
        self._submit((session.key,), [SaveSession(session.record())])

    def save_tunnel(self, session: Session, state: dict[str, Any]) -> None:
        """Store a session's tunnel state."""
        self._submit((session.key,), [SaveTunnel(session.key, state)])

    def save_alias(self, session: Session, agent_id: str) -> None:
        """Store an agent id as an alias of a session."""
        self._submit((session.key,), [SaveAlias(session.key.owner, agent_id, session.key)])

    def retry(self) -> None:
        """Retry one refused write; its success triggers the next retry."""
        while self._unsaved:
            if self.save_all(*self._unsaved.pop(0)):
                return

    def save_all(self, *keys: SessionKey) -> bool:
        """Store sessions with their aliases and tunnel states in one transaction; return False if there are none.

        A session and the one that it supersedes are stored together: a process killed in between would start with an
        agent id that leads to the new session already, and nothing would lead to what waits in the former one.
        """
        operations: list[Operation] = []
        for session in map(self._ctx.sessions.get, keys):
            if session is None or session.key in self._deferred:
                continue
            key = session.key
            operations.append(SaveSession(session.record()))
            if session.tunnel is not None:
                operations.append(SaveTunnel(key, session.tunnel))
            if self._ctx.sessions.alias_is(key.owner, session.agent_id, key):
                operations.append(SaveAlias(key.owner, session.agent_id, key))
        if operations:
            self._submit(keys, operations)
        return bool(operations)

    async def answered(self, within_s: float = STORE_WAIT_S) -> None:
        """Wait until the store has answered all writes so far, for at most `within_s`.

        An agent that is answered after they have succeeded keeps its registration through a kill of the shim.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._newest.wait()  # the store answers in the order of submission

    def _submit(self, keys: tuple[SessionKey, ...], operations: list[Operation]) -> None:
        if not self._deferred.issuperset(keys):
            newest = self._newest = asyncio.Event()
            self._ctx.store.submit(*operations, done=partial(self._saved, keys, newest))

    def _saved(self, keys: tuple[SessionKey, ...], answered: asyncio.Event, outcome: StoreError | None) -> None:
        answered.set()
        if outcome is not None:
            together = frozenset(keys).union(*(others for others in self._unsaved if not others.isdisjoint(keys)))
            self._unsaved = [*(others for others in self._unsaved if others.isdisjoint(keys)), together]
        elif self._unsaved:
            self.retry()
