"""One registration on its way up, and the replay of many after a reconnect (protocol.md §1.1, §2.1)."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from shim.bridge.connection import UpstreamConnection
from shim.bridge.links import UpstreamLink
from shim.core.calls import Outcome, RegisterCall
from shim.core.sessions import Session

RegistrationKey = tuple[str, ...]


def identity_of(session: Session) -> RegistrationKey:
    """Who registers: (owner, `name`, cluster name), or (owner, `agent`, agent id) where the dialect is keyed by it.

    An adopted session whose name nobody told is only itself.
    """
    name = session.registration.get("name")
    if session.key.kind == "agent" or not name:
        return tuple(session.key)
    return session.key.owner, "name", name


def identity_of_call(owner: str, call: RegisterCall) -> RegistrationKey:
    """The same of an agent's own registration."""
    return (owner, "agent", call.agent_id) if call.known_by_agent else (owner, "name", call.name)


@dataclass(slots=True, eq=False)
class PendingRegistration:
    """One registration that the controller has not answered. `session` is set where the shim itself asks.

    `sent_on` is the serial of the connection that carries it (0: none), `sent_at` and `abandoned_at` monotonic seconds.
    """

    identity: RegistrationKey
    runner: UpstreamLink
    payload: dict[str, Any]
    secret: str
    call: RegisterCall | None = None
    session: Session | None = None
    waiters: set[asyncio.Future[Outcome]] = field(default_factory=set)
    request_ids: list[str] = field(default_factory=list)
    sent_on: int = 0
    sent_at: float = 0.0
    abandoned_at: float | None = None

    def answer(self, outcome: Outcome) -> bool:
        """Answer the agents that wait. False if none does."""
        waiting = [waiter for waiter in self.waiters if not waiter.done()]
        for waiter in waiting:
            waiter.set_result(outcome)
        return bool(waiting)


class RefusedRegistration(NamedTuple):
    """The newest answer to an identity's registration that was no success. `status` is 0 where none came in time.

    `at` is monotonic, `name` the cluster's name, `agent` the id that the agent calls itself.
    """

    name: str
    agent: str
    status: int
    error: str
    at: float


@dataclass(slots=True, eq=False)
class RegistrationReplay:
    """What a reconnect still has to tell, and what it waits for."""

    runner: UpstreamLink
    remedy: deque[tuple[Session, dict[str, Any]]]
    waiting: set[PendingRegistration]


class RegistrationListener(Protocol):
    """Who makes a session of an answer."""

    def registered(self, job: PendingRegistration, reply: dict[str, Any], *, conflict: bool = False) -> Outcome:
        """Keep what the controller told of an agent; `reply` as `core.replies.register_reply` gives it.

        `conflict`: it answered with an error that carries the cluster's id (409).
        """

    def told(self, session: Session, connection: UpstreamConnection) -> None:
        """The controller has just been told about this session."""
