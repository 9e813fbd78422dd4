"""All bridges of this process as one subject of the admin port: what it shows, and what operators change."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any

import msgspec
from msgspec.structs import replace

from shim.bridge import Bridge, BridgeContext
from shim.bridge.admin_actions import NOT_FOUND, AdminActions, Drain, DrainState, means, unknown_command
from shim.bridge.delivery import MAX_HAND_OVER_SAMPLES
from shim.bridge.links import UpstreamLink
from shim.bridge.registration import RefusedRegistration
from shim.bridge.session_registry import RouteUse
from shim.bridge.websocket_agents import WebSocketAgent
from shim.core.call_records import Route
from shim.core.command_queue import SHOWN_COMMANDS, CommandQueue, RecentCommand
from shim.core.records import CommandDetails, CommandRecord, SessionKey
from shim.core.sessions import Session
from shim.errors import OperatorError
from shim.ports import Clock


class Actions:
    """An operator's actions on all bridges of this process, also on those that are opened during a drain.

    `shards` returns the number of shards of all replicas, 0 with a single process. `drains_elsewhere` has the latest
    known progress of other replicas' drains, by the replica's name; `shards_elsewhere` counts the shards in it.
    """

    def __init__(
        self, bridges: Callable[[], Sequence[Bridge]], clock: Clock, shards: Callable[[], int] = lambda: 0
    ) -> None:
        self._bridges = bridges
        self._clock = clock
        self._shards = shards
        self.shards_elsewhere = 0
        self._drain: Drain | None = None  # of this process, whichever bridges it has
        self._joined = False  # the drain was learnt from another replica
        self.drains_elsewhere: dict[str, Drain] = {}

    @property
    def draining(self) -> bool:
        """True while this process rejects new commands because of a drain."""
        return self._drain is not None

    def progress_here(self) -> Drain:
        """Return the progress of this process's drain."""
        mine = [] if self._drain is None else [self._drain]
        return together([*mine, *(bridge.admin_actions.progress() for bridge in self._bridges())])

    def progress(self) -> Drain:
        """Return the progress of the drain at all replicas.

        Before its deadline it is not over while nobody counts the commands of some shard, because its owner does not
        answer or is gone.
        """
        drain = together([self.progress_here(), *self.drains_elsewhere.values()])
        if drain.state is not DrainState.DRAINED or self.shards_here + self.shards_elsewhere >= self.shards:
            return drain
        late = self._clock.wall_s() >= drain.deadline_unix
        return replace(drain, state=DrainState.TIMED_OUT if late else DrainState.DRAINING)

    @property
    def shards(self) -> int:
        """The number of shards of all replicas, 0 with a single process."""
        return self._shards()

    @property
    def shards_here(self) -> int:
        """The number of shards that this process serves."""
        return len(self._bridges())

    def record_elsewhere(self, drains: dict[str, Drain]) -> None:
        """Record the progress of other replicas. Drains that are over are forgotten with this process's own."""
        self.drains_elsewhere = {name: each for name, each in drains.items() if self.draining or each.since_unix}

    def drain(self, timeout_s: float) -> Drain:
        """Start a drain: reject new commands until the queued ones are delivered and the results are sent."""
        wall = self._clock.wall_s()
        since = wall if self._drain is None else self._drain.since_unix
        self._drain = Drain(DrainState.DRAINED, since, wall + timeout_s, 0, 0, 0)
        self._joined, self.shards_elsewhere = False, 0
        for bridge in self._bridges():
            bridge.admin_actions.drain(timeout_s)
        return self.progress_here()

    def include(self, bridge: Bridge) -> None:
        """Have a bridge that was just opened take part in the drain, if there is one."""
        if self._drain is not None:
            bridge.admin_actions.drain(max(0.0, self._drain.deadline_unix - self._clock.wall_s()))

    def follow(self, *, join: bool) -> None:
        """With `join`, take part in a drain of another replica. End such a drain once no other replica drains."""
        deadlines = [each.deadline_unix for each in self.drains_elsewhere.values() if each.since_unix]
        if join and deadlines and self._drain is None:
            self.drain(max(0.0, max(deadlines) - self._clock.wall_s()))
            self._joined = True
        elif self._joined and self.drains_elsewhere and not deadlines:
            self.resume()

    def end_with_others(self) -> None:
        """Treat the drain, if there is one, as learnt from the other replicas: they may have ended it unnoticed."""
        self._joined = self._drain is not None

    def resume(self) -> Drain:
        """End the drain and accept commands again."""
        self._drain, self._joined = None, False
        for bridge in self._bridges():
            bridge.admin_actions.resume()
        return self.progress_here()

    async def find(self, command_id: str) -> list[CommandDetails]:
        """Return all commands with this id. Raises `OperatorError`."""
        return [each for bridge in self._bridges() for each in await bridge.admin_actions.find(command_id)]

    async def purge(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        """Purge a command. Raises `OperatorError`."""
        return await (await self._owner_of(command_id, session)).purge(command_id, session, reason)

    async def redeliver(self, command_id: str, session: str = "", reason: str = "") -> CommandRecord:
        """Redeliver a command. Raises `OperatorError`."""
        return await (await self._owner_of(command_id, session)).redeliver(command_id, session, reason)

    async def _owner_of(self, command_id: str, session: str) -> AdminActions:
        bridges, knowing = self._bridges(), []
        if len(bridges) == 1:
            return bridges[0].admin_actions
        for bridge in bridges:
            found = await bridge.admin_actions.find(command_id)
            if any(means(session, each.record.session) for each in found):
                knowing.append(bridge)
        if not knowing:
            raise unknown_command()
        if len(knowing) > 1:
            raise OperatorError(409, "several tokens have a command with this id: name its session")
        return knowing[0].admin_actions

    async def forget(self, agent: str) -> SessionKey:
        """Forget an agent by name, id or whole key. Raises `OperatorError`."""
        bridges = self._bridges()
        for bridge in bridges:
            try:
                return await bridge.admin_actions.forget(agent)
            except OperatorError as error:
                if error.status != NOT_FOUND or len(bridges) == 1:
                    raise
        raise OperatorError(NOT_FOUND, "no agent with this name, id or key is known")


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


Bridges = Callable[[], Sequence[Bridge]]
Answers = list[tuple[str, dict[str, Any]]]
AskOthers = Callable[..., Awaitable[Answers]]


class Subject:
    """The bridges of this process as one.

    `ctx` has what they share. `replicas` describes all replicas, and returns `None` with a single process. `ask_others`
    has the other replicas carry out an action; a single process owns every command and asks nobody.
    """

    def __init__(
        self,
        ctx: BridgeContext,
        bridges: Bridges,
        replicas: Callable[[], dict[str, Any] | None] = lambda: None,
        ask_others: AskOthers | None = None,
    ) -> None:
        self.ctx = ctx
        self.stopping = False
        self.replicas = replicas
        self.admin_actions = Actions(bridges, ctx.clock, lambda: (replicas() or {}).get("shards", 0))
        self._bridges = bridges
        self._ask_others = ask_others
        self._hand_overs_s: deque[float] = deque(maxlen=MAX_HAND_OVER_SAMPLES)

    @classmethod
    def of(cls, bridge: Bridge) -> Subject:
        """Return the subject of a single bridge."""
        return cls(bridge.ctx, lambda: (bridge,))

    async def ask_others(
        self, action: str, target: str, body: bytes, *, required: bool = False, complete: bool = False
    ) -> Answers:
        """Have all other replicas carry out an action of `command_api.CommandApi`.

        Returns the answers of those that could, with the replicas' names. A replica fails if it does not answer, or has
        a reason other than not knowing the target. Raises `OperatorError` if one fails and the answers have to be
        `complete`, or if one fails, none answered and an answer is `required`.
        """
        if self._ask_others is None:
            return []
        answers = await self._ask_others(action, target, body, required=required, complete=complete)
        if action in ("drain", "resume", "progress"):
            # A replica that starts does not know yet if it is to drain: that it does not is no cancellation.
            known = [(name, answer) for name, answer in answers if not answer.get("starting")]
            drains = {name: msgspec.convert(answer["drain"], Drain) for name, answer in known}
            self.admin_actions.record_elsewhere(drains)
            if action == "progress":  # an earlier version does not tell its shards: do not wait for them
                shards = (answer.get("shards", self.admin_actions.shards) for _, answer in known)
                self.admin_actions.shards_elsewhere = sum(shards)
        return answers

    # --- links and agents ---------------------------------------------------------------------------------------------

    @property
    def links(self) -> Iterable[UpstreamLink]:
        """All links of this process."""
        return [link for bridge in self._bridges() for link in bridge.links]

    @property
    def sessions(self) -> Iterable[Session]:
        """The sessions of all agents."""
        return chain.from_iterable(bridge.sessions for bridge in self._bridges())

    def session(self, key: SessionKey) -> Session | None:
        """Return the session with this key from the bridge that has it, or None."""
        return next((found for bridge in self._bridges() if (found := bridge.sessions.get(key)) is not None), None)

    def alias(self, owner: str, agent_id: str) -> Session | None:
        """Return the session for which an agent id of the owner is an alias, or None."""
        found = (bridge.sessions.alias(owner, agent_id) for bridge in self._bridges())
        return next((each for each in found if each is not None), None)

    @property
    def websocket_agents(self) -> Iterable[WebSocketAgent]:
        """The agents that connect by WebSocket themselves."""
        return chain.from_iterable(bridge.websocket_agents for bridge in self._bridges())

    @property
    def usage(self) -> Iterable[tuple[SessionKey, dict[Route, RouteUse]]]:
        """The calls of all agents, by route."""
        return chain.from_iterable(bridge.session_registry.usage for bridge in self._bridges())

    @property
    def refusals(self) -> list[RefusedRegistration]:
        """The registrations that the controller refused."""
        return [each for bridge in self._bridges() for each in bridge.registrations.refusals]

    def registers(self, agent_id: str) -> bool:
        """Return True if a registration of this agent waits for the controller."""
        return any(bridge.registrations.registers(agent_id) for bridge in self._bridges())

    def unacknowledged(self) -> list[tuple[Session, float]]:
        """Return the agents without acknowledged heartbeats, and since when (monotonic seconds)."""
        return [each for bridge in self._bridges() for each in bridge.heartbeats.unacknowledged()]

    # --- commands and results -----------------------------------------------------------------------------------------

    @property
    def queues(self) -> list[tuple[SessionKey, CommandQueue]]:
        """All queues that are not empty, each with the key of its session."""
        return [each for bridge in self._bridges() for each in bridge.queues.items()]

    def queue(self, key: SessionKey) -> CommandQueue | None:
        """Return the queue of a session, or None if it has none."""
        return next((found for bridge in self._bridges() if (found := bridge.queues.get(key)) is not None), None)

    @property
    def recent_commands(self) -> Iterable[RecentCommand]:
        """The commands that changed last, the newest step first."""
        recent = (bridge.ctx.recent_commands for bridge in self._bridges())
        return islice(heapq.merge(*recent, key=lambda each: each.wall, reverse=True), SHOWN_COMMANDS)

    @property
    def held_polls(self) -> int:
        """Number of held polls for commands."""
        return sum(bridge.delivery.held() for bridge in self._bridges())

    @property
    def held_tunnels(self) -> int:
        """Number of held tunnel polls."""
        return sum(bridge.long_polls.held_tunnels() for bridge in self._bridges())

    @property
    def hand_overs_s(self) -> deque[float]:
        """The latest seconds between the arrival of commands and their delivery, moved here from the bridges."""
        for bridge in self._bridges():
            self._hand_overs_s.extend(bridge.delivery.hand_overs_s)
            bridge.delivery.hand_overs_s.clear()
        return self._hand_overs_s

    @property
    def results(self) -> int:
        """Number of stored results that the controller is not known to have."""
        return sum(len(bridge.outbox) for bridge in self._bridges())

    @property
    def all_results_confirmed(self) -> bool:
        """True if the controller has received every result."""
        return all(bridge.outbox.empty for bridge in self._bridges())
