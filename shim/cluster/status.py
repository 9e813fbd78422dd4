"""Status of all shards of a replica as one `admin.Subject`, and admin actions on commands at any replica."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol

from shim.bridge import Bridge, BridgeContext
from shim.bridge.admin_actions import Drain, DrainState
from shim.bridge.delivery import MAX_HAND_OVER_SAMPLES
from shim.bridge.links import UpstreamLink
from shim.bridge.registration import RefusedRegistration
from shim.bridge.websocket_agents import WebSocketAgent
from shim.cluster.shard import Shard
from shim.core.command_queue import CommandQueue, RecentCommand
from shim.core.records import CommandDetails, CommandRecord, SessionKey
from shim.core.route_usage import Route, RouteUse
from shim.core.sessions import Session
from shim.errors import OperatorError

KEPT = 50
NOT_FOUND = 404
Bridges = Callable[[], list[Bridge]]


class Others(Protocol):
    """Interface to the admin actions of other replicas."""

    async def find(self, command_id: str) -> list[dict[str, Any]]:
        """Return other replicas' descriptions of a command."""

    async def act(self, action: str, command_id: str, session: str, reason: str) -> CommandRecord | None:
        """Purge or redeliver a command at the replica that has it; `None` if none has. Raises `OperatorError`."""

    async def forget(self, agent: str) -> SessionKey | None:
        """Forget an agent at the replica that has it; `None` if none has. Raises `OperatorError`."""

    def drain(self, timeout_s: float) -> None:
        """Start a drain at the other replicas, or change its deadline."""

    def resume(self) -> None:
        """End the drain at the other replicas."""

    def drains(self) -> list[Drain]:
        """Return the progress of other replicas' drains according to their latest reports."""


class _All:
    """Base of the parts of `Overview`, each a view over all bridges."""

    def __init__(self, bridges: Bridges) -> None:
        self._bridges = bridges


class _Sessions(_All):
    def __iter__(self) -> Iterator[Session]:
        return chain.from_iterable(bridge.sessions for bridge in self._bridges())

    def get(self, key: SessionKey) -> Session | None:
        return next((found for bridge in self._bridges() if (found := bridge.sessions.get(key)) is not None), None)

    def alias(self, owner: str, agent_id: str) -> Session | None:
        found = (bridge.sessions.alias(owner, agent_id) for bridge in self._bridges())
        return next((each for each in found if each is not None), None)


class _WebSocketAgents(_All):
    def __iter__(self) -> Iterator[WebSocketAgent]:
        return chain.from_iterable(bridge.websocket_agents for bridge in self._bridges())


class _Registrations(_All):
    @property
    def refusals(self) -> list[RefusedRegistration]:
        return [each for bridge in self._bridges() for each in bridge.registrations.refusals]

    def registers(self, agent_id: str) -> bool:
        return any(bridge.registrations.registers(agent_id) for bridge in self._bridges())


class _Heartbeats(_All):
    def unacknowledged(self) -> list[tuple[Session, float]]:
        return [each for bridge in self._bridges() for each in bridge.presence.unacknowledged()]


class _Queues(_All):
    def get(self, key: SessionKey) -> CommandQueue | None:
        return next((found for bridge in self._bridges() if (found := bridge.queues.get(key)) is not None), None)

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        return [each for bridge in self._bridges() for each in bridge.queues.items()]

    def values(self) -> Iterable[CommandQueue]:
        return [each for bridge in self._bridges() for each in bridge.queues.values()]


class _Outbox(_All):
    def __len__(self) -> int:
        return sum(len(bridge.outbox) for bridge in self._bridges())

    @property
    def empty(self) -> bool:
        return all(bridge.outbox.empty for bridge in self._bridges())


class _Delivery(_All):
    def __init__(self, bridges: Bridges) -> None:
        super().__init__(bridges)
        self._times_s: deque[float] = deque(maxlen=MAX_HAND_OVER_SAMPLES)

    @property
    def hand_overs_s(self) -> deque[float]:
        for bridge in self._bridges():
            self._times_s.extend(bridge.delivery.hand_overs_s)
            bridge.delivery.hand_overs_s.clear()
        return self._times_s

    def held(self) -> int:
        return sum(bridge.delivery.held() for bridge in self._bridges())


class _Holding(_All):
    def held_tunnels(self) -> int:
        return sum(bridge.holding.held_tunnels() for bridge in self._bridges())


class _Roster(_All):
    @property
    def usage(self) -> Iterable[tuple[SessionKey, dict[Route, RouteUse]]]:
        return chain.from_iterable(bridge.session_registry.usage for bridge in self._bridges())


class Operations(_All):
    """Admin actions on the shards of this replica."""

    @property
    def draining(self) -> bool:
        """True while new commands are rejected because of a drain."""
        return any(bridge.admin_actions.draining for bridge in self._bridges())

    def progress(self) -> Drain:
        """Return the progress of the drain."""
        return together([bridge.admin_actions.progress() for bridge in self._bridges()])

    def drain(self, timeout_s: float) -> Drain:
        """Start a drain: reject new commands until the queued ones are delivered and the results are sent."""
        return together([bridge.admin_actions.drain(timeout_s) for bridge in self._bridges()])

    def resume(self) -> Drain:
        """End the drain and accept commands again."""
        return together([bridge.admin_actions.resume() for bridge in self._bridges()])

    async def find(self, command_id: str) -> list[CommandDetails]:
        """Return all commands with this id. Raises `OperatorError`."""
        return [each for bridge in self._bridges() for each in await bridge.admin_actions.find(command_id)]

    async def forget_here(self, agent: str) -> SessionKey | None:
        """Forget an agent by name, id or whole key; `None` if it is not here. Raises `OperatorError`."""
        for bridge in self._bridges():
            try:
                return await bridge.session_removal.forget(agent)
            except OperatorError as error:
                if error.status != NOT_FOUND:
                    raise
        return None

    async def act(self, action: str, command_id: str, session: str, reason: str) -> CommandRecord | None:
        """Purge or redeliver a command; `None` if it is not here. Raises `OperatorError`."""
        knowing = []
        for bridge in self._bridges():
            found = await bridge.admin_actions.find(command_id)
            if any(not session or session in (str(each[0].session), each[0].session.ident) for each in found):
                knowing.append(bridge)
        if len(knowing) > 1:
            raise OperatorError(409, "several tokens have a command with this id: name its session")
        if not knowing:
            return None
        operator = knowing[0].admin_actions
        do = operator.purge if action == "purge" else operator.redeliver
        return await do(command_id, session, reason)


class _Everywhere(Operations):
    """Admin actions at this and all other replicas. A drain covers the shards owned when it starts."""

    def __init__(self, bridges: Bridges, others: Others) -> None:
        super().__init__(bridges)
        self._others = others

    def progress(self) -> Drain:
        return together([super().progress(), *self._others.drains()])

    def drain(self, timeout_s: float) -> Drain:
        self._others.drain(timeout_s)
        return super().drain(timeout_s)

    def resume(self) -> Drain:
        self._others.resume()
        return super().resume()

    async def purge(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        return await self._do("purge", command_id, session, reason)

    async def redeliver(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        return await self._do("redeliver", command_id, session, reason)

    async def forget(self, agent: str) -> SessionKey:
        key = await self.forget_here(agent) or await self._others.forget(agent)
        if key is None:
            raise OperatorError(NOT_FOUND, "no agent with this name, id or key is known")
        return key

    async def _do(self, action: str, command_id: str, session: str, reason: str) -> CommandRecord:
        done = await self.act(action, command_id, session, reason)
        if done is None:
            done = await self._others.act(action, command_id, session, reason)
        if done is None:
            hint = "ended ones are kept for commands.retain_s"
            raise OperatorError(NOT_FOUND, f"no command with this id is known; {hint}")
        return done


def together(drains: list[Drain]) -> Drain:
    """Combine several drains into one."""
    order = [DrainState.OFF, DrainState.DRAINED, DrainState.DRAINING, DrainState.TIMED_OUT]
    return Drain(
        max((each.state for each in drains), key=order.index, default=DrainState.OFF),
        max((each.since_unix for each in drains), default=0.0),
        max((each.deadline_unix for each in drains), default=0.0),
        sum(each.commands for each in drains),
        sum(each.results for each in drains),
        sum(each.refused for each in drains),
    )


class Recents:
    """Recent events of commands at this replica, newest first."""

    def __init__(self, shards: Callable[[], list[Shard]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[RecentCommand]:
        recent = (shard.bridge.ctx.recent_commands for shard in self._shards())
        merged = heapq.merge(*recent, key=lambda each: each.wall, reverse=True)
        return islice(merged, KEPT)


class Overview:
    """Status of a replica: implements `admin.Subject`. `replicas` describes all replicas."""

    def __init__(
        self, ctx: BridgeContext, bridges: Bridges, replicas: Callable[[], dict[str, Any]], others: Others
    ) -> None:
        self.ctx = ctx
        self.stopping = False
        self._bridges = bridges
        self._replicas = replicas
        self._others = others
        self.sessions = _Sessions(bridges)
        self.queues = _Queues(bridges)
        self.outbox = _Outbox(bridges)
        self.delivery = _Delivery(bridges)
        self.holding = _Holding(bridges)
        self.session_registry = _Roster(bridges)
        self.registrations = _Registrations(bridges)
        self.websocket_agents = _WebSocketAgents(bridges)
        self.presence = _Heartbeats(bridges)
        self.admin_actions = self.session_removal = _Everywhere(bridges, others)

    @property
    def links(self) -> Iterable[UpstreamLink]:
        """All links of this replica."""
        return [link for bridge in self._bridges() for link in bridge.links]

    def replicas(self) -> dict[str, Any] | None:
        """Return the description of all replicas."""
        return self._replicas()

    async def found_elsewhere(self, command_id: str) -> list[dict[str, Any]]:
        """Return other replicas' descriptions of a command."""
        return await self._others.find(command_id)
