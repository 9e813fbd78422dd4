"""All shards of this replica as one `admin.Subject`, and what there is to say of the other replicas."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from shim.admin import Recent
from shim.bridge import Bridge, Context
from shim.bridge.connection import Connection
from shim.bridge.delivery import HAND_OVERS
from shim.bridge.links import LinkRunner
from shim.bridge.operator import Drain, DrainState, Found
from shim.core.commands import CommandQueue
from shim.core.records import CommandRecord, Loaded, Operation, SessionKey
from shim.core.sessions import Session
from shim.core.usage import Route, Use
from shim.errors import OperatorError, StoreError
from shim.ports import StoreDone
from shim.shards.shard import Shard
from shim.store import Post

KEPT = 50
Bridges = Callable[[], list[Bridge]]


class NatsProbe:
    """A `ports.CommandStore` that takes nothing: what is written tells only whether NATS answers."""

    def __init__(self, answers: Callable[[], bool], post: Post) -> None:
        self._answers = answers
        self._post = post

    def open(self) -> Loaded:
        """Nothing is kept here."""
        return Loaded(b"")

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """See `ports.CommandStore`."""
        if done is not None:
            fault = None if self._answers() else StoreError("the NATS server does not answer")
            self._post(partial(done, fault or [None] * len(operations)))

    def close(self) -> None:
        """Nothing is open."""


class _All:
    """Base of the parts."""

    def __init__(self, bridges: Bridges) -> None:
        self._bridges = bridges


class _Sessions(_All):
    def __iter__(self) -> Iterator[Session]:
        return chain.from_iterable(bridge.sessions for bridge in self._bridges())

    def get(self, key: SessionKey) -> Session | None:
        return next((found for bridge in self._bridges() if (found := bridge.sessions.get(key)) is not None), None)


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
        self._times_s: deque[float] = deque(maxlen=HAND_OVERS)

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


class _Gateways(_All):
    def connection_of(self, key: SessionKey) -> Connection | None:
        found = (bridge.gateways.connection_of(key) for bridge in self._bridges())
        return next((each for each in found if each is not None), None)


class _Roster(_All):
    @property
    def usage(self) -> Iterable[tuple[SessionKey, dict[Route, Use]]]:
        return chain.from_iterable(bridge.roster.usage for bridge in self._bridges())


class _Operator(_All):
    """A drain concerns the shards that are here when it begins."""

    @property
    def draining(self) -> bool:
        return any(bridge.operator.draining for bridge in self._bridges())

    def progress(self) -> Drain:
        return _together([bridge.operator.progress() for bridge in self._bridges()])

    def drain(self, timeout_s: float) -> Drain:
        return _together([bridge.operator.drain(timeout_s) for bridge in self._bridges()])

    def resume(self) -> Drain:
        return _together([bridge.operator.resume() for bridge in self._bridges()])

    async def find(self, command_id: str) -> list[Found]:
        return [each for bridge in self._bridges() for each in await bridge.operator.find(command_id)]

    async def purge(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        return await (await self._of(command_id)).operator.purge(command_id, session, reason)

    async def redeliver(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        return await (await self._of(command_id)).operator.redeliver(command_id, session, reason)

    async def _of(self, command_id: str) -> Bridge:
        """The bridge that knows a command. Raises `OperatorError`."""
        knowing = [bridge for bridge in self._bridges() if await bridge.operator.find(command_id)]
        if not knowing:
            raise OperatorError(404, "this replica does not own the command's link: ask the one that its trace names")
        if len(knowing) > 1:
            raise OperatorError(409, "several tokens have a command with this id: choose its session at its owner")
        return knowing[0]


def _together(drains: list[Drain]) -> Drain:
    order = [DrainState.OFF, DrainState.DRAINED, DrainState.DRAINING, DrainState.TIMED_OUT]
    return Drain(
        max((each.state for each in drains), key=order.index, default=DrainState.OFF),
        max((each.since_wall for each in drains), default=0.0),
        max((each.deadline_wall for each in drains), default=0.0),
        sum(each.commands for each in drains),
        sum(each.results for each in drains),
        sum(each.refused for each in drains),
    )


class Recents:
    """What happened last to commands here, the newest first."""

    def __init__(self, shards: Callable[[], list[Shard]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Recent]:
        merged = heapq.merge(*(shard.recent for shard in self._shards()), key=lambda each: each.wall, reverse=True)
        return iter([each for _, each in zip(range(KEPT), merged, strict=False)])


class Overview:
    """Implements `admin.Subject`. `replicas` and `found_elsewhere` come from the cluster."""

    def __init__(
        self,
        ctx: Context,
        bridges: Bridges,
        replicas: Callable[[], dict[str, Any]],
        found_elsewhere: Callable[[str], Awaitable[list[dict[str, Any]]]],
    ) -> None:
        self.ctx = ctx
        self.stopping = False
        self._bridges = bridges
        self._replicas = replicas
        self._found_elsewhere = found_elsewhere
        self.sessions = _Sessions(bridges)
        self.queues = _Queues(bridges)
        self.outbox = _Outbox(bridges)
        self.delivery = _Delivery(bridges)
        self.holding = _Holding(bridges)
        self.gateways = _Gateways(bridges)
        self.roster = _Roster(bridges)
        self.operator = _Operator(bridges)

    @property
    def links(self) -> Iterable[LinkRunner]:
        """All links."""
        return [link for bridge in self._bridges() for link in bridge.links]

    def replicas(self) -> dict[str, Any] | None:
        """See `admin.Subject`."""
        return self._replicas()

    async def found_elsewhere(self, command_id: str) -> list[dict[str, Any]]:
        """See `admin.Subject`."""
        return await self._found_elsewhere(command_id)
