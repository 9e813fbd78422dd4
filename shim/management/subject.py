"""All bridges of this process as one subject of the admin port: what it shows, and what operators change."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from shim.bridge import Bridge, BridgeContext
from shim.bridge.admin_actions import Drain
from shim.bridge.delivery import MAX_HAND_OVER_SAMPLES
from shim.bridge.links import UpstreamLink
from shim.bridge.registration import RefusedRegistration
from shim.bridge.websocket_agents import WebSocketAgent
from shim.core.call_records import Route, RouteUse
from shim.core.command_queue import CommandQueue
from shim.core.records import SessionKey
from shim.core.sessions import Session
from shim.management.actions import Actions

Bridges = Callable[[], Sequence[Bridge]]
Answers = list[tuple[str, dict[str, Any]]]
AskOthers = Callable[..., Awaitable[Answers]]


async def ask_nobody(_action: str, _target: str, _body: bytes, *, required: bool) -> Answers:
    """Return no answers: a single process owns every command. `required` is ignored."""
    del required
    return []


class Subject:
    """The bridges of this process as one.

    `ctx` has what they share. `replicas` describes all replicas, and returns `None` with a single process. `ask_others`
    has the other replicas carry out an action.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        bridges: Bridges,
        replicas: Callable[[], dict[str, Any] | None] = lambda: None,
        ask_others: AskOthers = ask_nobody,
    ) -> None:
        self.ctx = ctx
        self.stopping = False
        self.replicas = replicas
        self._bridges = bridges
        self._ask_others = ask_others
        self.sessions = _Sessions(bridges)
        self.queues = _Queues(bridges)
        self.outbox = _Outbox(bridges)
        self.delivery = _Delivery(bridges)
        self.long_polls = _LongPolls(bridges)
        self.session_registry = _SessionRegistry(bridges)
        self.registrations = _Registrations(bridges)
        self.websocket_agents = _WebSocketAgents(bridges)
        self.heartbeats = _Heartbeats(bridges)
        self.admin_actions = Actions(bridges)

    @classmethod
    def of(cls, bridge: Bridge) -> Subject:
        """Return the subject of a single bridge."""
        return cls(bridge.ctx, lambda: (bridge,))

    @property
    def links(self) -> Iterable[UpstreamLink]:
        """All links of this process."""
        return [link for bridge in self._bridges() for link in bridge.links]

    async def ask_others(self, action: str, target: str, body: bytes, *, required: bool) -> Answers:
        """Have all other replicas carry out an action of `command_api.CommandApi`.

        Returns the answers of those that could, with the replicas' names. Raises `OperatorError` if there is none, one
        is `required`, and a replica did not answer or had a reason other than not knowing the target.
        """
        answers = await self._ask_others(action, target, body, required=required)
        if action in ("drain", "resume", "progress"):
            drains = {name: msgspec.convert(answer["drain"], Drain) for name, answer in answers}
            self.admin_actions.record_elsewhere(drains)
        return answers


class _All:
    """Base of the parts of `Subject`, each a view of all bridges."""

    def __init__(self, bridges: Bridges) -> None:
        self._bridges = bridges


class _Sessions(_All):
    def __iter__(self) -> Iterator[Session]:
        return chain.from_iterable(bridge.sessions for bridge in self._bridges())

    def get(self, key: SessionKey) -> Session | None:
        """Return the session with this key from the bridge that has it, or None."""
        return next((found for bridge in self._bridges() if (found := bridge.sessions.get(key)) is not None), None)

    def alias(self, owner: str, agent_id: str) -> Session | None:
        """Return the session for which an agent id of the owner is an alias, or None."""
        found = (bridge.sessions.alias(owner, agent_id) for bridge in self._bridges())
        return next((each for each in found if each is not None), None)


class _WebSocketAgents(_All):
    def __iter__(self) -> Iterator[WebSocketAgent]:
        return chain.from_iterable(bridge.websocket_agents for bridge in self._bridges())


class _Registrations(_All):
    @property
    def refusals(self) -> list[RefusedRegistration]:
        """The registrations that the controller refused."""
        return [each for bridge in self._bridges() for each in bridge.registrations.refusals]

    def registers(self, agent_id: str) -> bool:
        """Return True if a registration of this agent waits for the controller."""
        return any(bridge.registrations.registers(agent_id) for bridge in self._bridges())


class _Heartbeats(_All):
    def unacknowledged(self) -> list[tuple[Session, float]]:
        """Return the agents without acknowledged heartbeats, and since when (monotonic seconds)."""
        return [each for bridge in self._bridges() for each in bridge.heartbeats.unacknowledged()]


class _Queues(_All):
    def get(self, key: SessionKey) -> CommandQueue | None:
        """Return the queue of a session, or None if it has none."""
        return next((found for bridge in self._bridges() if (found := bridge.queues.get(key)) is not None), None)

    def items(self) -> Iterable[tuple[SessionKey, CommandQueue]]:
        """Return all sessions with a queue, and their queues."""
        return [each for bridge in self._bridges() for each in bridge.queues.items()]

    def values(self) -> Iterable[CommandQueue]:
        """Return all queues."""
        return [each for bridge in self._bridges() for each in bridge.queues.values()]


class _Outbox(_All):
    def __len__(self) -> int:
        return sum(len(bridge.outbox) for bridge in self._bridges())

    @property
    def empty(self) -> bool:
        """True if no result waits for the controller."""
        return all(bridge.outbox.empty for bridge in self._bridges())


class _Delivery(_All):
    def __init__(self, bridges: Bridges) -> None:
        super().__init__(bridges)
        self._times_s: deque[float] = deque(maxlen=MAX_HAND_OVER_SAMPLES)

    @property
    def hand_overs_s(self) -> deque[float]:
        """The latest seconds between the arrival of commands and their delivery, moved here from the bridges."""
        for bridge in self._bridges():
            self._times_s.extend(bridge.delivery.hand_overs_s)
            bridge.delivery.hand_overs_s.clear()
        return self._times_s

    def held(self) -> int:
        """Return the number of held polls."""
        return sum(bridge.delivery.held() for bridge in self._bridges())


class _LongPolls(_All):
    def held_tunnels(self) -> int:
        """Return the number of held tunnel polls."""
        return sum(bridge.long_polls.held_tunnels() for bridge in self._bridges())


class _SessionRegistry(_All):
    @property
    def usage(self) -> Iterable[tuple[SessionKey, dict[Route, RouteUse]]]:
        """The calls of all agents, by route."""
        return chain.from_iterable(bridge.session_registry.usage for bridge in self._bridges())
