"""The demo of several replicas: two on one PostgreSQL, and the owner of a link is killed before your eyes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from devtools.agents import EventKind
from devtools.controller.client import control_client
from devtools.demo.console import Console, StepFailed
from devtools.demo.demo_agent import POLL_S, SLOW, TOKEN, ControllerEvents, DemoAgent
from devtools.demo.postgres import PostgresServer
from devtools.demo.processes import ChildProcess
from devtools.demo.scenario import Scenario
from shim.clock import Clock

_CHUNK_BYTES = 65_536


class Service:
    """A TCP proxy. `replicas` maps names to addresses and may change; `reached` is where the last connection went."""

    def __init__(self, replicas: Mapping[str, str]) -> None:
        self._replicas = replicas
        self._first = ""
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.reached = ""

    async def listen(self) -> str:
        """Start, and return the URL that the agent calls."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    def prefer(self, replica: str) -> None:
        """Send connections to this replica from now on, while it accepts them; close those that are open."""
        self._first = replica
        for writer in self._open:
            writer.close()

    def close(self) -> None:
        """Stop, and close all connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._pass_on(reader, writer)
        except OSError:
            pass  # one side is gone, and so is the other
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = await self._connect()
        if found is None:
            return
        back, forth = found
        self._open.add(forth)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, forth))
                group.create_task(_pump(back, writer))
        finally:
            self._open.discard(forth)
            forth.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for name in sorted(self._replicas, key=lambda each: each != self._first):
            host, _, port = self._replicas[name].rpartition(":")
            with suppress(OSError):
                found = await asyncio.open_connection(host, int(port))
                self.reached = name
                return found
        return None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes of one direction, then close the other side."""
    with suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


SHARDS = 16
_LOOK_S = 0.1
_AGAIN = frozenset({"uncertain", "requeued", "redelivered", "redelivered_by_hand"})
"""Events in a command's trace that are reasons to offer it again."""


@dataclass(slots=True)
class Replica:
    """One replica; `addresses` (`listen`, `admin`) are those of its last start and those of its next."""

    child: ChildProcess
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.child.name

    async def start(self, settings: Mapping[str, str]) -> None:
        """Start it with these settings. Raises `ChildFailed` if it ends instead."""
        ports = {f"{key}.port": address.rpartition(":")[2] for key, address in self.addresses.items()}
        own = {"listen.port": "0", "admin.port": "0", "cluster.port": "0", "cluster.replica": self.name, **ports}
        args = [part for key, value in {**settings, **own}.items() for part in ("--set", f"{key}={value}")]
        ready = await self.child.start(["run", *args])
        self.addresses = {key: ready[key] for key in ("listen", "admin")}

    async def json(self, path: str) -> dict[str, Any]:
        """Return a JSON page of its admin port."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.addresses['admin']}{path}") as reply:
            found: dict[str, Any] = await reply.json()
            return found

    async def metric(self, name: str) -> int:
        """Return a metric's value, given its name as `/metrics` shows it, with the labels; 0 if it is not there."""
        address = f"http://{self.addresses['admin']}/metrics"
        async with aiohttp.ClientSession() as session, session.get(address) as reply:
            lines = (await reply.text()).splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name))

    async def shards(self) -> int:
        """Return how many shards it owns."""
        return await self.metric("agent_shim_shards")

    async def forwarded(self) -> int:
        """Return how many requests it has passed on to the owner, which answered."""
        return await self.metric('agent_shim_forwarded_requests_total{outcome="answered"}')


class Replicas:
    """All replicas. Methods that wait for a state wait without end: the caller sets the limit."""

    def __init__(self, children: Sequence[ChildProcess]) -> None:
        self._all = [Replica(child) for child in children]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def other(self, replica: Replica) -> Replica:
        """Return a replica that is not this one."""
        return next(each for each in self._all if each is not replica)

    async def shared_out(self) -> str:
        """Wait until every shard has an owner and no replica more than its share; return the numbers in words."""
        while True:
            counts = {each.name: await each.shards() for each in self._all}
            if sum(counts.values()) == SHARDS and max(counts.values()) - min(counts.values()) <= 1:
                return in_words(counts)
            await asyncio.sleep(_LOOK_S)

    async def links(self, number: int) -> str:
        """Wait until so many links are online; return their numbers by owner, in words."""
        while True:
            counts = {each.name: (await each.json("/status.json"))["links"]["online"] for each in self._all}
            if sum(counts.values()) >= number:
                return in_words(counts)
            await asyncio.sleep(_LOOK_S)

    async def owner_of(self, agent_id: str) -> Replica:
        """Wait until a replica has the agent's session, and return it."""
        while True:
            for replica in self._all:
                sessions = (await replica.json("/status.json"))["sessions"]["items"]
                if any(each["agent_id"] == agent_id for each in sessions):
                    return replica
            await asyncio.sleep(_LOOK_S)


async def reasons(replica: Replica, ident: str) -> str:
    """Return why a command was offered more than once, by its trace; "" if the trace does not say."""
    found = (await replica.json(f"/commands/{ident}.json"))["commands"]
    return ", ".join(sorted({step["event"] for each in found for step in each["trace"]} & _AGAIN))


def in_words(counts: Mapping[str, int]) -> str:
    """Return numbers by replica in words."""
    return ", ".join(f"{name} {number}" for name, number in sorted(Counter(counts).items())) or "nobody"


AGENTS = 6
QUEUED = 5
_HOLD_S = 10
_LONG_S = 60
"""The limit of steps that wait for a process to start or for a lease to end."""


class GatewayScenario(Scenario):
    """Two replicas and agents that call either, each with a token and so a link of its own; then one replica dies."""

    def __init__(
        self,
        stage: Console,
        clock: Clock,
        controller: ChildProcess,
        database: PostgresServer,
        replicas: Sequence[ChildProcess],
    ) -> None:
        super().__init__(stage, clock, (controller, database, *replicas))
        self._database = database
        self._replicas = Replicas(replicas)
        self._listening: dict[str, str] = {}
        self._services: list[Service] = []

    async def tell(self, group: asyncio.TaskGroup) -> None:
        """Show all steps; agents and guards over the processes run in `group`."""
        self._stage.headline("agent-shim demo --gateway: two replicas on one PostgreSQL, and agents that call either")
        self._group = group
        await self._open()
        async with control_client(f"http://{self._addresses['controller']}") as control:
            watch = ControllerEvents(control)
            await self._agents_arrive(watch)
            owner, other = await self._owners()
            await self._command_across(watch, owner, other)
            await self._it_returns(await self._owner_dies(watch))
        self.told = True

    def dismiss(self) -> None:
        """Close the agents' proxies, and end everything that runs in the group."""
        for service in self._services:
            service.close()
        super().dismiss()

    def show_commands(self) -> None:
        """Print what a person may try now."""
        one, two = (replica.addresses for replica in self._replicas)
        control = f"http://{self._addresses['controller']}/control"
        push = f'{{"type": "hello", "payload": {{"from": "you"}}, "cluster_id": "{self._agents[0].legacy.cluster_id}"}}'
        beat = f"/api/v1/clusters/agent/{self._agents[0].legacy.cluster_id}/heartbeat"
        auth = f"-H 'Authorization: Bearer {_token(0)}'"
        self._show_tries(
            (
                ("push a command: the agent has it at once", f"curl -s {control}/commands -d '{push}'"),
                ("heartbeat by this replica", f"curl -i http://{one['listen']}{beat} {auth} -d '{{}}'"),
                ("and by the other one", f"curl -i http://{two['listen']}{beat} {auth} -d '{{}}'"),
                (
                    "who owns what",
                    f"curl -s http://{{{one['admin']},{two['admin']}}}/metrics | grep '^agent_shim_shards '",
                ),
            )
        )

    # --- acts

    async def _open(self) -> None:
        async with self._stage.step("PostgreSQL takes connections", _LONG_S) as step:
            ready = await self._database.start([])
            self._spawn(self._database.guard())
            step.detail = ready["url"]
        async with self._stage.step("development controller listens") as step:
            await self._start_controller("127.0.0.1:0", "--token-prefix", TOKEN)
            step.detail = f"ws://{self._addresses['controller']}/api/v1/clusters/agent/ws"
        for replica in self._replicas:
            async with self._stage.step(f"replica {replica.name} serves", _LONG_S) as step:
                await self._start_replica(replica)
                step.detail = f"http://{replica.addresses['listen']}, admin {replica.addresses['admin']}"
        async with self._stage.step("shards shared out", _LONG_S) as step:
            step.detail = await self._replicas.shared_out()

    async def _agents_arrive(self, watch: ControllerEvents) -> None:
        self._stage.headline(f"{AGENTS} agents that were never changed")
        self._stage.note(
            "Each has a token, and so a link, of its own. A Service sends their connections to any replica."
        )
        names = [replica.name for replica in self._replicas]
        for number in range(AGENTS):
            service = Service(self._listening)
            self._services.append(service)
            agent = DemoAgent(await service.listen(), self._clock, number, _token(number))
            service.prefer(names[number % len(names)])
            self._agents.append(agent)
            self._spawn(agent.legacy.run())
        async with self._stage.step("all registered", _LONG_S) as step:
            for agent in self._agents:
                await agent.event(EventKind.REGISTER)
            calls = Counter(service.reached for service in self._services)
            step.detail = "calls go to " + in_words(calls)
        async with self._stage.step("a link for each", _LONG_S) as step:
            for agent in self._agents:
                await watch.event("received", 0, type="register", agent_id=agent.legacy.who.agent_id)
            step.detail = "links owned: " + await self._replicas.links(AGENTS)

    async def _owners(self) -> tuple[Replica, Replica]:
        """Send the first agent's calls to the replica that does not own its shard; return the owner and it."""
        async with self._stage.step("the first agent calls the other", _LONG_S) as step:
            owner = await self._replicas.owner_of(self._agents[0].legacy.who.agent_id)
            other = self._replicas.other(owner)
            since = len(self._agents[0].events)
            before = await other.forwarded()
            self._services[0].prefer(other.name)
            await self._agents[0].count(EventKind.HEARTBEAT, 2, since)
            passed_on = await other.forwarded() - before
            if not passed_on:
                raise StepFailed(f"{other.name} has forwarded nothing")
            step.detail = f"{owner.name} owns its shard, {self._services[0].reached} answers and forwards ({passed_on})"
        return owner, other

    async def _command_across(self, watch: ControllerEvents, owner: Replica, other: Replica) -> None:
        self._stage.headline("A command that comes in at one replica while the agent asks the other")
        agent = self._agents[0]
        async with self._stage.step("agent's poll is held open", POLL_S + _HOLD_S) as step:
            await agent.in_poll()
            step.detail = f"asked of {other.name}, held at {owner.name}"
        async with self._stage.step("command pushed by the controller") as step:
            sent_s, ident = await self._push(agent, watch, "restart")
            step.detail = f"to {owner.name}"
        async with self._stage.step("in the agent's hand", POLL_S + _HOLD_S) as step:
            in_hand = await agent.event(EventKind.COMMAND, id=ident)
            step.detail, step.took_s = "since the controller sent it", in_hand.at_s - sent_s
        async with self._stage.step("result back at the controller") as step:
            result = await watch.event("received", 0, type="command_result", command_id=ident)
            step.detail, step.took_s = "since the controller sent it", result["monotonic_s"] - sent_s

    async def _owner_dies(self, watch: ControllerEvents) -> Replica:
        """Kill the owner of the first agent's shard while commands wait, and return it."""
        self._stage.headline("The owner dies, with commands that wait")
        agent = self._agents[0]
        async with self._stage.step("the agent is busy", POLL_S + _HOLD_S) as step:
            await agent.in_poll()
            _, busy = await self._push(agent, watch, SLOW)
            await agent.event(EventKind.COMMAND, id=busy)
            step.detail = "it polls no more until it is done"
        async with self._stage.step(f"{QUEUED} more commands are kept") as step:
            idents = [(await self._push(agent, watch, f"step-{number + 1}"))[1] for number in range(QUEUED)]
            for ident in idents:
                await watch.event("received", 0, type="command_ack", command_id=ident)
            step.detail = "committed in PostgreSQL, then acknowledged"
        # Asked anew: on a busy machine a lease may have run out meanwhile.
        owner = await self._replicas.owner_of(agent.legacy.who.agent_id)
        other = self._replicas.other(owner)
        _, seen = await watch.control.events(0, 0)
        async with self._stage.step(f"replica {owner.name} killed (kill -9)"):
            del self._listening[owner.name]
            since, killed_s = len(agent.events), self._clock.monotonic_s()
            await owner.child.kill()
        async with self._stage.step(f"{other.name} has its links", _LONG_S) as step:
            found = await watch.event("received", seen, type="register", agent_id=agent.legacy.who.agent_id)
            sent = sum(event.what is EventKind.REGISTER for event in agent.events[since:])
            step.detail = f"since the kill; registration replayed, {sent} by the agent"
            step.took_s = found["monotonic_s"] - killed_s
        agent.release.set()
        async with self._stage.step("what waited arrives, in order", _LONG_S) as step:
            came = [(await agent.event(EventKind.COMMAND, id=ident)).at_s for ident in idents]
            if came != sorted(came):
                raise StepFailed("not in the order in which the controller sent them")
            step.detail = await self._each_once(other, [busy, *idents])
        async with self._stage.step("and so do the results", _LONG_S) as step:
            for ident in (busy, *idents):
                await watch.event("received", 0, type="command_result", command_id=ident)
            step.detail = f"{len(idents) + 1} at the controller"
        return owner

    async def _it_returns(self, replica: Replica) -> None:
        self._stage.headline(f"{replica.name} is started again")
        async with self._stage.step(f"replica {replica.name} serves", _LONG_S):
            await self._start_replica(replica)
        async with self._stage.step("shards shared out anew", _LONG_S) as step:
            step.detail = await self._replicas.shared_out()
        async with self._stage.step("every link is up", _LONG_S) as step:
            step.detail = "links owned: " + await self._replicas.links(AGENTS)

    # --- how

    async def _start_replica(self, replica: Replica) -> None:
        settings = {
            "upstream.url": f"ws://{self._addresses['controller']}",
            "upstream.send_command_ack": "true",
            "store.url": self._database.url,
            "store.password_file": str(self._database.password_file),
            "poll.hold": str(_HOLD_S),
        }
        await replica.start(settings)
        self._spawn(replica.child.guard())
        self._listening[replica.name] = replica.addresses["listen"]

    async def _each_once(self, replica: Replica, idents: Sequence[str]) -> str:
        """Say that the agent got each command once, or why more often. Raises `StepFailed` where no trace says why."""
        taken = Counter(
            event.command.id
            for event in self._agents[0].events
            if event.what is EventKind.COMMAND and event.command is not None
        )
        again = []
        for ident in (each for each in idents if taken[each] > 1):
            reason = await reasons(replica, ident)
            if not reason:
                raise StepFailed(f"the agent got {ident} {taken[ident]} times, and its trace does not say why")
            again.append(f"{ident} ({reason})")
        if again:
            return f"{len(idents)} commands, again with a reason: {'; '.join(again)}"
        return f"{len(idents)} commands, each once"


def _token(number: int) -> str:
    return f"{TOKEN}-{number}"
