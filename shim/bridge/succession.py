"""How sessions end: one gives way to another of the same cluster, or nobody has seen its agent (protocol.md §1.6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shim.bridge.context import BridgeContext
from shim.bridge.saves import SessionPersistence
from shim.core.records import DeleteSession, MoveSession, SessionKey
from shim.core.sessions import Session
from shim.errors import StoreError
from shim.logs import get
from shim.ports import StoreDone

log = get(__name__)


class SessionSuccession:
    """`moved(source, target)` and `ended(key)` are told what became of a session."""

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
        """Let other sessions with the same upstream cluster id give way as soon as they are not fresh.

        Across owners too, where the controller accepted a registration on this owner's link with that id: it proves
        whose cluster it is.
        """
        sessions = self._ctx.sessions
        for other in sessions if across_owners else sessions.of_owner(session.key.owner):
            if other is not session and other.upstream_cluster_id == session.upstream_cluster_id:
                other.superseded_by = session.key
                self._saves.save_session(other)
        self.sweep()

    def adopt_predecessors(self, session: Session) -> None:
        """An adopted session whose id the controller has given to others of its owner is their successor.

        That id was an answer to a register whose session the shim forgot: it was killed while the disk took nothing.
        What is known of the cluster goes over, and the others give way as they would have.
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
        """Let superseded sessions that are not fresh any more go over into their successors."""
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
        """Until the disk takes it: what is written of the moved commands later is written of the successor's."""

        def done(outcome: list[Any] | StoreError) -> None:
            if isinstance(outcome, StoreError):
                self._pending_moves.append(move)

        self._ctx.store.submit([move], done)

    def expire(self) -> None:
        """Delete sessions that were not seen for `sessions.retain_s`; their commands end EXPIRED."""
        before = self._ctx.clock.wall_s() - self._ctx.settings.sessions.retain_s
        now = self._ctx.now
        for session in self._ctx.sessions:
            if session.last_seen_unix < before and not session.fresh(now):
                log.info("session_forgotten", session=session.key.ident)
                self._end(session)

    async def forget(self, session: Session) -> StoreError | None:
        """Delete a session by hand; its commands end EXPIRED. Return the error where the disk refuses."""
        stored: asyncio.Future[list[Any] | StoreError] = asyncio.get_running_loop().create_future()
        self._end(session, lambda outcome: None if stored.done() else stored.set_result(outcome))
        outcome = await stored
        return outcome if isinstance(outcome, StoreError) else None

    def _end(self, session: Session, done: StoreDone | None = None) -> None:
        self.ended(session.key)
        self._ctx.sessions.remove(session)
        self._ctx.store.submit([DeleteSession(session.key)], done)
