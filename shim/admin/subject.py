"""Interface between the admin port and one bridge, or the combined bridges of a replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from shim.bridge import BridgeContext
from shim.bridge.admin_actions import Drain
from shim.bridge.links import UpstreamLink
from shim.bridge.registration import RefusedRegistration
from shim.bridge.websocket_agents import WebSocketAgent
from shim.core.command_queue import CommandQueue
from shim.core.records import CommandDetails, CommandRecord, SessionKey
from shim.core.route_usage import Route, RouteUse
from shim.core.sessions import Session


class Agents(Protocol):
    """Sessions."""

    def __iter__(self) -> Iterator[Session]: ...

    def get(self, key: SessionKey) -> Session | None: ...

    def alias(self, owner: str, agent_id: str) -> Session | None: ...


class Registering(Protocol):
    """Registrations."""

    @property
    def refusals(self) -> list[RefusedRegistration]: ...

    def registers(self, agent_id: str) -> bool: ...


class Heartbeats(Protocol):
    """Heartbeats to the controller."""

    def unacknowledged(self) -> list[tuple[Session, float]]: ...


class Waiting(Protocol):
    """Queues of commands."""

    def get(self, key: SessionKey) -> CommandQueue | None: ...

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]: ...

    def values(self) -> Iterable[CommandQueue]: ...


class Outgoing(Protocol):
    """Results to be sent to the controller."""

    def __len__(self) -> int: ...

    @property
    def empty(self) -> bool: ...


class Handing(Protocol):
    """Held polls, and the times that commands took."""

    @property
    def hand_overs_s(self) -> deque[float]: ...

    def held(self) -> int: ...


class Holds(Protocol):
    def held_tunnels(self) -> int: ...


class Census(Protocol):
    @property
    def usage(self) -> Iterable[tuple[SessionKey, dict[Route, RouteUse]]]: ...


class Hands(Protocol):
    """Operator's actions (`bridge.admin_actions`)."""

    @property
    def draining(self) -> bool: ...

    def progress(self) -> Drain: ...

    def drain(self, timeout_s: float) -> Drain: ...

    def resume(self) -> Drain: ...

    async def find(self, command_id: str) -> list[CommandDetails]: ...

    async def purge(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord: ...

    async def redeliver(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord: ...


class Forgets(Protocol):
    """Deletion of agents by an operator (`bridge.session_removal`)."""

    async def forget(self, agent: str) -> SessionKey: ...


class Subject(Protocol):
    """A bridge, as far as the admin port uses one."""

    stopping: bool

    @property
    def ctx(self) -> BridgeContext: ...

    @property
    def sessions(self) -> Agents: ...

    @property
    def links(self) -> Iterable[UpstreamLink]: ...

    @property
    def queues(self) -> Waiting: ...

    @property
    def outbox(self) -> Outgoing: ...

    @property
    def delivery(self) -> Handing: ...

    @property
    def holding(self) -> Holds: ...

    @property
    def session_registry(self) -> Census: ...

    @property
    def registrations(self) -> Registering: ...

    @property
    def presence(self) -> Heartbeats: ...

    @property
    def websocket_agents(self) -> Iterable[WebSocketAgent]: ...

    @property
    def admin_actions(self) -> Hands: ...

    @property
    def session_removal(self) -> Forgets: ...

    def replicas(self) -> dict[str, Any] | None:
        """Return the status of the replicas, `None` with a single one."""

    async def found_elsewhere(self, command_id: str) -> list[dict[str, Any]]:
        """Return the descriptions of a command from other replicas."""
