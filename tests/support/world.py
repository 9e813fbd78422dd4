"""A whole bridge in virtual time: settings, a store, a controller in memory, agents that call as the frontend does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, TypeVar, cast

import msgspec
from prometheus_client import CollectorRegistry

from shim.bridge import Bridge, BridgeContext
from shim.config.settings import Settings
from shim.core.agent_calls import (
    AgentCall,
    Commands,
    HeartbeatCall,
    OfferedCommand,
    Outcome,
    PollCall,
    RegisterCall,
    ResultCall,
    SessionTarget,
    StatusCall,
    TargetKind,
    TunnelPollCall,
)
from shim.core.command_queue import OpenUntil
from shim.core.records import (
    AddTrace,
    CommandDetails,
    FindCommand,
    MarkCommands,
    MoveSession,
    Operation,
    PutCommand,
    StoreContents,
    StoreOperation,
    TraceEntry,
)
from shim.core.sessions import Session, Sessions
from shim.errors import ShimError, StoreError
from shim.metrics import Metrics
from shim.ports import Caller, CallResult, CommandStore, StoreDone, Timer
from shim.store.writer import RETRY_S
from tests.support.memory_store import MemoryStore
from tests.support.upstream import Controller
from tests.support.virtual import VirtualClock, VirtualLoop

_Result = TypeVar("_Result")

TOKEN = "upstream-token"
HALF = 0.5


def settings(**sections: Any) -> Settings:
    """Settings with these sections' keys replaced; a configured token and no holding of polls unless told otherwise."""
    base: dict[str, Any] = {
        "upstream": {"url": "https://api.vendor.test", "token": TOKEN},
        "poll": {"hold": "off"},
        "store": {"path": ":memory:"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return msgspec.convert(base, Settings)


class OwnedTimers:
    """`ports.Timers` on a loop: a test sees what is pending, and a crash takes all of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: set[asyncio.TimerHandle] = set()
        self._dead = False

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        def fire() -> None:
            self._pending.discard(handle)
            callback()

        handle = self._loop.call_later(delay, fire)
        if self._dead:
            handle.cancel()
        self._pending.add(handle)
        return handle

    def pending(self) -> list[asyncio.TimerHandle]:
        return [handle for handle in self._pending if not handle.cancelled()]

    def crash(self) -> None:
        self._dead = True
        for handle in self._pending:
            handle.cancel()


class FlakyStore:
    """A `ports.CommandStore` in front of another: fails while `failing` says so, answers late while it is `slow`."""

    def __init__(self, inner: CommandStore) -> None:
        self.inner = inner
        self.failing: Callable[[tuple[Operation, ...]], bool] = lambda operations: False
        self.slow = False
        self.dead = False
        self.log: list[Operation] = []
        self.outstanding = 0
        self._unmoved: list[tuple[Operation, ...]] = []
        self._late: list[Callable[[], None]] = []

    def open(self) -> StoreContents:
        return self.inner.open()

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        if self.dead:
            return
        if self._refuses((operation, *also)):
            if isinstance(operation, MoveSession):
                self._unmoved.append((operation, *also))
                asyncio.get_running_loop().call_later(RETRY_S, self._repeat_moves)
            refusal = partial(self._tell, done, StoreError("the disk is full"))
            if self.slow:
                self._late.append(refusal)
            else:
                asyncio.get_running_loop().call_soon(refusal)
            return
        self.log.extend((operation, *also))
        self.outstanding += 1

        def finished(outcome: _Result | StoreError) -> None:
            self.outstanding -= 1
            if self.slow:
                self._late.append(lambda: self._tell(done, outcome))
            else:
                self._tell(done, outcome)

        self.inner.submit(operation, *also, done=finished)

    def _refuses(self, operations: tuple[Operation, ...]) -> bool:
        """As the stores do (`ports.CommandStore.submit`): nothing is stored before the moves that were refused."""
        self._repeat_moves()
        return bool(self._unmoved) or self.failing(operations)

    def _repeat_moves(self) -> None:
        while self._unmoved and not self.dead and not self.failing(self._unmoved[0]):
            operation, *also = self._unmoved.pop(0)
            self.log.extend((operation, *also))
            self.inner.submit(cast("MoveSession", operation), *also)

    def _tell(self, done: StoreDone[_Result] | None, outcome: _Result | StoreError) -> None:
        if done is not None and not self.dead:
            done(outcome)

    async def find(self, command_id: str) -> list[CommandDetails]:
        """Look up a command in the store below, in spite of the faults that this one makes."""
        found: asyncio.Future[list[CommandDetails] | StoreError] = asyncio.get_running_loop().create_future()
        self.outstanding += 1
        self.inner.submit(FindCommand(command_id), done=found.set_result)
        outcome = await found
        self.outstanding -= 1
        assert not isinstance(outcome, StoreError)
        return outcome

    def fail(self) -> None:
        """The disk is full from now on."""
        self.failing = lambda operations: True

    def heal(self) -> None:
        self.failing = lambda operations: False

    def catch_up(self) -> None:
        """Answer the slow submissions now."""
        self.slow = False
        late, self._late = self._late, []
        for tell in late:
            tell()

    def close(self) -> None:
        self._repeat_moves()
        self._unmoved.clear()
        self.inner.close()


class World:
    """One shim and its surroundings. `start()` comes first; it may be stopped, killed and started again."""

    def __init__(
        self,
        configured: Settings | None = None,
        make_store: Callable[[], CommandStore] | None = None,
        rng: Callable[[], float] = lambda: HALF,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.settings = configured or settings()
        self.clock = VirtualClock(loop)
        self.controller = Controller()
        self.token = TOKEN
        self.token_error: ShimError | None = None
        self.faults: list[dict[str, Any]] = []
        self.running = False
        self.has_defects = False  # a test makes some on purpose
        self._rng = rng
        self._memory = MemoryStore(loop.call_soon)
        self._make_store = make_store
        self._ids = count(1)
        self._connections = count(1)
        self.store = FlakyStore(self._memory)
        loop.outside = lambda: make_store is not None and self.store.outstanding > 0
        loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self.timers: OwnedTimers
        self.registry: CollectorRegistry
        self.bridge: Bridge

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, while_opening: Callable[[], None] = lambda: None) -> World:
        """Start the shim; `while_opening` is called while it waits for its store."""
        self.timers = OwnedTimers(self.loop)
        self.registry = CollectorRegistry()
        self.store = FlakyStore(self._make_store() if self._make_store is not None else self._memory)
        ctx = BridgeContext(
            settings=self.settings,
            clock=self.clock,
            timers=self.timers,
            rng=self._rng,
            new_id=lambda: f"id-{next(self._ids)}",
            store=self.store,
            upstream=self.controller.upstream,
            metrics=Metrics(self.registry),
            read_token=self._read_token,
            sessions=Sessions(),
        )
        self.bridge = Bridge(ctx)
        loaded = self.store.open()
        while_opening()
        self.bridge.start(loaded)
        self.running = True
        return self

    def _read_token(self) -> str:
        if self.token_error is not None:
            raise self.token_error
        return self.token

    async def stop(self) -> None:
        """Stop the shim, as SIGTERM does."""
        self.running = False
        self.bridge.quiesce()
        await self.settle()
        self.bridge.stop()
        await self.settle()
        self.store.close()

    async def crash(self) -> None:
        """End the shim as `kill -9` does: no message follows, and the disk stays as it is."""
        self.running = False
        self.timers.crash()
        self.store.dead = True
        self.store.close()
        for socket in self.controller.open_sockets():
            socket.lose()
            socket.closed_by_us = 0
        await self.settle()

    async def restart(self) -> None:
        await self.stop()
        self.start()
        await self.settle()

    async def settle(self) -> None:
        """Let everything happen that takes no time."""
        for _ in range(20):
            await asyncio.sleep(0)
        if self.loop.outside():
            await self._pause(1e-6)
            await self.settle()

    async def pass_s(self, seconds: float) -> None:
        """Let virtual time pass."""
        await self._pause(seconds)
        await self.settle()

    async def until(self, true: Callable[[], bool], within_s: float = 120.0, step_s: float = 0.05) -> None:
        """Let virtual time pass until something is true."""
        deadline = self.now + within_s
        while not true():
            assert self.now < deadline, f"it did not come true within {within_s} s"
            await self._pause(step_s)

    async def _pause(self, seconds: float) -> None:
        over = self.loop.create_future()
        self.loop.call_later(seconds, over.set_result, None)
        await over

    @property
    def now(self) -> float:
        return self.loop.time()

    # --- looking inside -----------------------------------------------------------------------------------------------

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"agent_shim_{name}", labels) or 0.0

    def defects(self) -> list[Any]:
        """The exceptions that were caught and counted as defects, by part."""
        found = (sample for family in self.registry.collect() for sample in family.samples)
        return [each for each in found if each.name == "agent_shim_internal_errors_total" and each.value]

    def session(self, ident: str) -> Session:
        found = [session for session in self.bridge.ctx.sessions if session.key.ident == ident]
        assert len(found) == 1, f"{len(found)} sessions {ident}"
        return found[0]

    async def trace(self, command_id: str) -> list[str]:
        """The events in the life of a command, as they are on disk."""
        return [entry.event for _, _, trace in await self.store.find(command_id) for entry in trace]

    async def state(self, command_id: str) -> str:
        """The state of a command on disk."""
        return ",".join(record.state.value for record, _, _ in await self.store.find(command_id))

    def agent(self, **fields: Any) -> Agent:
        return Agent(self, **fields)

    def connection(self) -> int:
        return next(self._connections)


class Agent:
    """A legacy agent on one keep-alive connection at a time. It tells the bridge what the frontend would tell."""

    def __init__(
        self,
        world: World,
        dialect: str = "clusters_agent",
        agent_id: str = "pod-1",
        name: str = "prod",
        cluster_id: str = "",
        token: str = TOKEN,
    ) -> None:
        self.world = world
        self.dialect = dialect
        self.agent_id = agent_id
        self.name = name
        self.cluster_id = cluster_id
        self.token = token
        self.connection = world.connection()
        self.open_until: OpenUntil = lambda: world.now  # of that connection
        self.extra: dict[str, Any] = {"k8s_version": "v1.28.3"}
        self._leased = False
        self.pipelines = False  # then its next request is no evidence

    @property
    def target(self) -> SessionTarget:
        if self.dialect == "agents":
            return SessionTarget(TargetKind.AGENT, self.agent_id)
        if self.cluster_id:
            return SessionTarget(TargetKind.CLUSTER, self.cluster_id)
        return SessionTarget(TargetKind.ALIAS, self.agent_id)

    async def call(self, call: AgentCall, arrived_s: float | None = None) -> CallResult:
        """One request on the agent's connection. A reply with commands is written, unless `poll` does otherwise."""
        world = self.world
        if self._leased and not self.pipelines:
            self._leased = False
            world.bridge.delivery.next_request(self.connection)
        at_s = world.now if arrived_s is None else arrived_s
        answer = world.bridge.calls.call(Caller(self.token, self.connection), call, at_s, world.now)
        return answer if isinstance(answer, CallResult) else await answer

    async def outcome(self, call: AgentCall) -> Outcome:
        return (await self.call(call)).outcome

    async def register(self, secret: str = "") -> Outcome:
        payload = {"agent_id": self.agent_id, "name": self.name, **self.extra}
        outcome = await self.outcome(
            RegisterCall(self.dialect, self.agent_id, self.name, payload, secret, self.dialect == "agents")
        )
        cluster_id = getattr(outcome, "cluster_id", "")
        if cluster_id and self.dialect != "agents":
            self.cluster_id = cluster_id
        return outcome

    def heartbeat_call(
        self, status: str = "healthy", tunnel_status: str = "connected", **payload: Any
    ) -> HeartbeatCall:
        known: dict[str, Any] = {"name": self.name} if self.dialect == "agents" else {}
        if self.dialect == "agents":
            tunnel_status = "disconnected"
        return HeartbeatCall(self.dialect, self.target, self.agent_id, status, tunnel_status, payload, known)

    async def heartbeat(self, status: str = "healthy", tunnel_status: str = "connected", **payload: Any) -> Outcome:
        return await self.outcome(self.heartbeat_call(status, tunnel_status, **payload))

    async def status(self, **body: Any) -> Outcome:
        return await self.outcome(StatusCall(self.dialect, self.target, body))

    async def tunnel_poll(self) -> Outcome:
        return await self.outcome(TunnelPollCall(SessionTarget(TargetKind.ALIAS, self.agent_id)))

    async def result(self, command_id: str, success: bool = True, **body: Any) -> Outcome:
        return await self.outcome(ResultCall(self.dialect, self.target, command_id, {"success": success, **body}))

    async def poll(self) -> list[str]:
        """Poll, read the whole reply, return the ids of its commands."""
        return [command.id for command in await self.poll_commands()]

    async def poll_commands(self) -> tuple[OfferedCommand, ...]:
        answer = await self.call(PollCall(self.dialect, self.target))
        return self.take(answer)

    def take(self, answer: CallResult) -> tuple[OfferedCommand, ...]:
        """The reply of a poll is written and arrives."""
        if answer.receipt is not None:
            self.world.bridge.delivery.written(answer.receipt, self.open_until)
            self._leased = True
        assert isinstance(answer.outcome, Commands)
        return answer.outcome.commands

    async def poll_unwritten(self) -> tuple[OfferedCommand, ...]:
        """Poll, and hang up before the reply's first byte."""
        answer = await self.call(PollCall(self.dialect, self.target))
        if answer.receipt is not None:
            self.world.bridge.delivery.unwritten(answer.receipt)
        self.reconnect(clean=False)
        return cast("Commands", answer.outcome).commands

    def poll_task(self) -> asyncio.Task[CallResult]:
        """A poll that is under way; to hang up, cancel it."""
        return self.world.loop.create_task(self.call(PollCall(self.dialect, self.target)))

    def reconnect(self, clean: bool = True) -> None:
        """Close the connection, by FIN or by RST, and open another."""
        if self._leased:
            self._leased = False
            self.world.bridge.delivery.connection_closed(self.connection, clean)
        self.connection = self.world.connection()

    async def live(self, seconds: float, every_s: float = 5.0) -> None:
        """Heartbeat for a while."""
        end = self.world.now + seconds
        while self.world.now < end:
            await self.heartbeat()
            await self.world.pass_s(min(every_s, max(end - self.world.now, 0.001)))


def traces(world: World, command_id: str) -> list[str]:
    """Return the steps of a command that were submitted to the store, in order, as `event: detail`."""
    steps: list[TraceEntry | None] = []
    for operation in world.store.log:
        match operation:
            case PutCommand(record=record) if record.id == command_id:
                steps += [operation.arrived, operation.offered]
            case AddTrace(ids=ids, entry=step) | MarkCommands(ids=ids, step=step) if command_id in ids:
                steps.append(step)
    return [f"{step.event}: {step.detail}" for step in steps if step is not None]
