"""Sessions that move: whatever comes together, no command is lost, and each reaches the agent of its cluster only.

Rules: docs/reference/protocol.md#16-owners-sessions-aliases, #3-commands; the promises 1 and 3 of
docs/concepts/promises.md.

A seed makes a random life of a few clusters in virtual time: pods that are replaced, with and without their cluster id,
with other tokens, while the old ones still call; registrations that are repeated or answered late; a controller that is
away or loses its database; a disk that refuses writes or hangs; a shim that is killed or stopped. Then the trouble
ends, the newest pod of each cluster goes on living, and every command is accounted for.

`AGENT_SHIM_FUZZ_INPUTS` sets the number of lives (`make fuzz`), `AGENT_SHIM_SEED` plays one of them alone. A seed
always plays the same life.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from shim.core.agent_calls import Commands, Registered
from shim.core.records import CommandState
from shim.ports import CallResult
from shim.protocol.upstream_message import Message
from tests.support.upstream import Controller, FakeSocket
from tests.support.virtual import run_virtual
from tests.support.world import TOKEN, Agent, World
from tests.support.world import settings as shim_settings

LIVES = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000")) // 50
BATCH = 10
ONLY = os.environ.get("AGENT_SHIM_SEED")
FIRST = range(0, LIVES, BATCH) if ONLY is None else [int(ONLY)]
STEPS = 40
AGAIN_S, EVERY_S = 300.0, 7.0
OVERLAP_S = 30.0
TTL_S = 5000
# What a life does next, with weights.
DEEDS = {
    "register": 5,
    "heartbeat": 8,
    "poll": 8,
    "push": 12,
    "replace": 5,
    "upstream": 6,
    "answer": 6,
    "forget": 3,
    "disk": 6,
    "restart": 4,
    "wait": 8,
}


class ForgetfulController(Controller):
    """A controller that knows clusters by account and name, may answer late, and may lose its database.

    `ids` has the present id of each cluster, `sockets_of` the connection that last spoke for an id. `broke(account,
    name)` is called when a cluster gets another id and nothing shows that it is the one from before: the token or the
    agent's id is new.
    """

    broke: Callable[[str, str], None]

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self.known: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        self.ids: dict[tuple[str, str], str] = {}
        self.sockets_of: dict[str, FakeSocket] = {}
        self._rng = rng
        self._named = 0

    def forget(self) -> None:
        """Lose the database."""
        self.ids.clear()
        self.sockets_of.clear()

    def answer_any(self) -> None:
        """Answer one of the registers that were held back, not always the oldest."""
        self.held_registers.rotate(self._rng.randrange(3))
        self.answer_register()

    def _said(self, socket: FakeSocket, message: Message) -> None:
        if message.type == "heartbeat" and message.payload["cluster_id"] in self.ids.values():
            self.sockets_of[message.payload["cluster_id"]] = socket
        super()._said(socket, message)

    def _register(self, socket: FakeSocket, message: Message) -> None:
        if not socket.open:
            return
        cluster = account_of(socket.spec.token), message.payload["name"]
        given, who = message.payload.get("cluster_id", ""), (socket.spec.token, message.payload["agent_id"])
        if cluster not in self.ids:
            keeps = given and given not in self.ids.values() and self._rng.random() < 0.5
            self._named += not keeps
            self.ids[cluster] = given if keeps else f"c-{self._named}"
            if not keeps and who not in self.known[cluster]:
                self.broke(*cluster)
        self.sockets_of[self.ids[cluster]] = socket
        self.manners.cluster_id = lambda _: self.ids[cluster]
        super()._register(socket, message)


def account_of(token: str) -> str:
    """The account that a token belongs to: `acme-2` is the second token of `acme`."""
    return token.partition("-")[0]


@dataclass(eq=False)
class Pod:
    """A process of an agent, and its calls that are under way."""

    agent: Agent
    read: list[str] = field(default_factory=list)
    poll: asyncio.Task[CallResult] | None = None
    registering: asyncio.Task[Any] | None = None

    def cancel(self) -> None:
        """The process ends, or the shim's does: no call is answered any more."""
        for task in (self.poll, self.registering):
            if task is not None:
                task.cancel()
        self.poll = self.registering = None


@dataclass
class Cluster:
    """A cluster, its pods from the oldest to the newest, and the commands that were pushed to its present id."""

    account: str
    name: str
    pods: list[Pod] = field(default_factory=list)
    overlap_until_s: float = 0.0
    pushed: list[str] = field(default_factory=list)
    cut_off: set[str] = field(default_factory=set)  # those pushed to a former id that nothing connects with the present


class Offers(logging.Handler):
    """What the shim logs of offers, and the exceptions in its log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.of: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.defects: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "command_offered":
            fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
            self.of[fields["command"]].append(fields)
        if record.exc_info or record.getMessage() == "illegal_transition":
            self.defects.append(f"{record.getMessage()} {record.exc_info}")


class Life:
    """One random life of a shim, its agents and its controller."""

    def __init__(self, seed: int, offers: Offers) -> None:
        self.rng = rng = Random(seed)
        self.offers = offers
        self.own_tokens = rng.random() < 0.5
        self.world = World(
            shim_settings(
                poll={"hold": rng.choice(["off", "auto", 20]), "max_batch": 2},
                commands={"at_most_once": ["once"]},
                upstream={"send_command_ack": True} | ({"token": ""} if self.own_tokens else {}),
            )
        )
        self.world._memory._key = bytes(32)  # the same owners in each run
        self.world.controller = self.controller = ForgetfulController(rng)
        self.controller.broke = self._cut_off
        self.controller.manners.acks = rng.random() < 0.7
        self.numbers = iter(range(1, 10_000))
        accounts = [rng.choice(["acme", "apex"]) if self.own_tokens else account_of(TOKEN) for _ in range(3)]
        self.clusters = [Cluster(account, f"cluster{n}") for n, account in enumerate(accounts)]
        self.disk_refused = self.forgetful = False

    async def play(self) -> list[str]:
        """Play the life and return what was wrong."""
        self.world.start()
        await self.world.settle()
        for cluster in self.clusters:
            self._new_pod(cluster)
            await self.register(cluster)
        deeds = self.rng.choices([*DEEDS], [*DEEDS.values()], k=STEPS)
        for deed in deeds:
            await getattr(self, deed)(self.rng.choice(self.clusters))
            await self.world.pass_s(0.01)  # no two calls come at exactly the same time
        await self._settle_down()
        wrong = [*await self._lost(), *self._strayed(), *self._repeated()]
        await self._end(kill=False)
        return wrong + [str(fault) for fault in self.world.faults] + self.offers.defects

    # --- agents -------------------------------------------------------------------------------------------------------

    def _new_pod(self, cluster: Cluster, cluster_id: str = "") -> None:
        before = cluster.pods[-1].agent if cluster.pods else None
        dialect = before.dialect if before else self.rng.choice(["clusters_agent", "clusters_agent", "agents"])
        token = before.token if before else f"{cluster.account}-1" if self.own_tokens else TOKEN
        if before and self.own_tokens and not cluster_id and self._settled(cluster) and self.rng.random() < 0.3:
            token = f"{cluster.account}-{next(self.numbers)}"
        same_name = before is not None and self.rng.random() < 0.3  # of the pod: a StatefulSet
        agent_id = before.agent_id if before and same_name else f"pod-{next(self.numbers)}"
        agent = self.world.agent(
            dialect=dialect, agent_id=agent_id, name=cluster.name, cluster_id=cluster_id, token=token
        )
        cluster.pods.append(Pod(agent))

    def _settled(self, cluster: Cluster) -> bool:
        """Return True if the controller and the store have seen all registrations of the cluster: its token may change.

        Only the answer to a registration shows that the new token's cluster is the one that the old one's was.
        """
        manners, registers = self.controller.manners, self.world.bridge.registrations.registers
        answers = manners.registers and manners.dial is None and not self.controller.held_registers
        return answers and not self.forgetful and not any(registers(pod.agent.agent_id) for pod in cluster.pods)

    def _pod(self, cluster: Cluster) -> Pod:
        """A pod that calls: mostly the newest, at times the one before, which is being replaced."""
        replaced = self.world.now < cluster.overlap_until_s and self.rng.random() < 0.3
        return cluster.pods[-2 if replaced else -1]

    async def register(self, cluster: Cluster) -> None:
        """The newest pod registers, at times once more: its process was started again, without the id that it had."""
        pod = cluster.pods[-1]
        if pod.registering is None or pod.registering.done():
            pod.agent.cluster_id = ""
            pod.registering = self.world.loop.create_task(self._register(cluster, pod.agent))

    async def _register(self, cluster: Cluster, agent: Agent) -> None:
        outcome = await agent.register()
        if isinstance(outcome, Registered) and not outcome.cached:
            self.controller.known[cluster.account, cluster.name].add((agent.token, agent.agent_id))

    async def heartbeat(self, cluster: Cluster) -> None:
        pod = self._pod(cluster)
        if _identified(pod):
            await pod.agent.heartbeat()

    async def poll(self, cluster: Cluster) -> None:
        """The reply is read; written and lost; or not written. Or the poll is held, or its agent leaves."""
        pod = self._pod(cluster)
        if not _identified(pod):
            return
        how = self.rng.choice(["read", "read", "read", "lost", "unwritten", "left"])
        if pod.poll is None:
            pod.poll = pod.agent.poll_task()
            await self.world.settle()
        if pod.poll.done():
            await self._end_poll(pod, how)
        elif how == "left":
            pod.poll.cancel()
            pod.poll = None
            pod.agent.reconnect(clean=False)

    async def _end_poll(self, pod: Pod, how: str) -> None:
        assert pod.poll is not None
        answer, pod.poll = pod.poll.result(), None
        if not isinstance(answer.outcome, Commands):
            return  # a token that the controller has not accepted yet
        if how == "unwritten":
            if answer.receipt is not None:
                self.world.bridge.delivery.unwritten(answer.receipt)
        else:
            commands = pod.agent.take(answer)
            if how == "read":
                pod.read += [command.id for command in commands]
                if commands and self.rng.random() < 0.5:
                    await pod.agent.heartbeat()
                return
        pod.agent.reconnect(clean=False)

    async def replace(self, cluster: Cluster) -> None:
        """A new pod, with the saved cluster id or without; the old one may go on for a while."""
        cluster_id = cluster.pods[-1].agent.cluster_id if self.rng.random() < 0.5 else ""
        goes_on = cluster_id != "" and self.rng.random() < 0.5
        self._end_pods(cluster.pods[:-1] if goes_on else cluster.pods)
        cluster.overlap_until_s = self.world.now + OVERLAP_S * goes_on
        self._new_pod(cluster, cluster_id)
        if not cluster_id:
            await self.register(cluster)

    def _end_pods(self, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.poll is not None and pod.poll.done() and pod.poll.result().receipt is not None:
                self.world.bridge.delivery.unwritten(pod.poll.result().receipt)
            pod.cancel()

    # --- the controller -----------------------------------------------------------------------------------------------

    async def push(self, cluster: Cluster) -> None:
        """Push a few commands to the cluster's present id, if the connection that last spoke for it is its agent's."""
        cluster_id = self.controller.ids.get((cluster.account, cluster.name), "")
        socket = self.controller.sockets_of.get(cluster_id)
        if socket is not None and socket.open and socket.spec.token == cluster.pods[-1].agent.token:
            for kind in self.rng.choices(["exec", "exec", "once"], k=self.rng.randint(1, 3)):
                command_id = f"k{next(self.numbers)}-{kind}"
                cluster.pushed.append(command_id)
                payload = {"command_id": command_id, "type": kind, "cluster_id": cluster_id, "ttl_seconds": TTL_S}
                socket.says("command", payload, f"r-{command_id}")

    async def answer(self, _cluster: Cluster) -> None:
        if self.controller.held_registers:
            self.controller.answer_any()

    async def forget(self, _cluster: Cluster) -> None:
        self.controller.forget()

    async def _controller(self, how: str) -> None:
        if how == "away":
            self.controller.go_away()
        elif how == "back":
            self.controller.come_back()
        elif how == "late":
            self.controller.manners.registers = False
        else:
            for socket in list(self.controller.open_sockets()):
                socket.lose(by_close_frame=how == "closes")

    async def upstream(self, _cluster: Cluster) -> None:
        await self._controller(self.rng.choice(["away", "back", "back", "late", "late", "loses", "closes"]))

    def _cut_off(self, account: str, name: str) -> None:
        for cluster in self.clusters:
            if (cluster.account, cluster.name) == (account, name):
                cluster.cut_off.update(cluster.pushed)

    # --- the shim -----------------------------------------------------------------------------------------------------

    async def disk(self, _cluster: Cluster) -> None:
        how = self.rng.choice(["full", "some", "heals", "slow", "fast", "fast"])
        store, rng = self.world.store, self.rng
        self.disk_refused |= how in ("full", "some")
        if how == "full":
            store.fail()
        elif how == "some":
            store.failing = lambda operations: rng.random() < 0.5
        elif how == "heals":
            store.heal()
        elif how == "slow":
            store.slow = True
        else:
            store.catch_up()

    async def restart(self, _cluster: Cluster) -> None:
        await self._end(kill=self.rng.random() < 0.7)
        self.world.start()
        kept = {(session.key.owner, session.upstream_cluster_id) for session in self.world.bridge.ctx.sessions}
        for cluster in self.clusters:
            owner = self.world.bridge.links.owner_of(cluster.pods[-1].agent.token)
            if self.forgetful and (owner, self.controller.ids.get((cluster.account, cluster.name))) not in kept:
                cluster.cut_off.update(cluster.pushed)

    async def _end(self, *, kill: bool) -> None:
        if kill:
            await self.world.crash()
        else:
            self.world.store.catch_up()
            await self.world.settle()
            await self.world.stop()
        if self.disk_refused:
            self.forgetful = True
            self.controller.known.clear()
        self.disk_refused = False
        for cluster in self.clusters:
            cluster.overlap_until_s = 0.0
            for pod in cluster.pods:
                pod.cancel()
                pod.agent._leased = False
                pod.agent.connection = self.world.connection()

    async def wait(self, _cluster: Cluster) -> None:
        await self.world.pass_s(self.rng.choice([0.3, 1.5, 6.0, 12.0, 31.0, 50.0, 70.0]))

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _settle_down(self) -> None:
        """The trouble ends; the newest pod of each cluster goes on living."""
        world, controller = self.world, self.controller
        controller.come_back()
        controller.manners.registers = True
        while controller.held_registers:
            controller.answer_any()
        world.store.heal()
        world.store.catch_up()
        for socket in controller.open_sockets():
            socket.lose()
        for cluster in self.clusters:
            self._end_pods(cluster.pods[:-1])
        end = world.now + AGAIN_S
        while world.now < end:
            for cluster in self.clusters:
                await self._go_on(cluster)
            await world.pass_s(EVERY_S)

    async def _go_on(self, cluster: Cluster) -> None:
        pod = cluster.pods[-1]
        if not _identified(pod):
            if pod.registering is None or pod.registering.done():
                pod.registering = self.world.loop.create_task(self._register(cluster, pod.agent))
            return
        await pod.agent.heartbeat()
        if pod.poll is None:
            pod.poll = pod.agent.poll_task()
            await self.world.settle()
        if pod.poll.done():
            already = len(pod.read)
            await self._end_poll(pod, "read")
            for command_id in pod.read[already:]:
                await pod.agent.result(command_id)

    def _read_by(self, cluster: Cluster) -> list[str]:
        return [command_id for pod in cluster.pods for command_id in pod.read]

    def _unread(self) -> list[tuple[Cluster, str, set[str]]]:
        """Return the accepted commands that no pod has read, each with its cluster and the codes that were reported."""
        codes: defaultdict[str, set[str]] = defaultdict(set)
        for message in self.controller.got("command_result"):
            codes[message.payload["command_id"]].add(message.payload.get("code", ""))
        accepted = {message.payload["command_id"] for message in self.controller.got("command_ack")}
        return [
            (cluster, command_id, codes[command_id])
            for cluster in self.clusters
            for command_id in sorted(accepted.intersection(cluster.pushed).difference(self._read_by(cluster)))
        ]

    async def _lost(self) -> list[str]:
        wrong = [
            f"{command_id} was not read, although an agent of {cluster.name} lives: {codes}"
            for cluster, command_id, codes in self._unread()
            if codes != {"undeliverable"} and command_id not in cluster.cut_off
        ]
        if self._unread():
            await self.world.pass_s(TTL_S)
        # An uncertain command may have been received: it ends with its session. With agents' own tokens a report waits
        # for the token of a pod that may be gone.
        queues = [queue for _, queue in self.world.bridge.queues.items()]
        uncertain = {each.record.id for queue in queues for each in queue.all() if each.state is CommandState.UNCERTAIN}
        for _, command_id, codes in self._unread():
            reported = codes or await self.world.state(command_id) in ("expired", "dead")
            if not reported and command_id not in uncertain:
                wrong.append(f"{command_id} is lost")
        return wrong

    def _strayed(self) -> list[str]:
        pushed = {command_id: cluster for cluster in self.clusters for command_id in cluster.pushed}
        return [
            f"{command_id} was read by {cluster.name}, and was for {pushed[command_id].name}"
            for cluster in self.clusters
            for command_id in self._read_by(cluster)
            if pushed[command_id] is not cluster
        ]

    def _repeated(self) -> list[str]:
        wrong = []
        for cluster in self.clusters:
            read = self._read_by(cluster)
            for command_id in {each for each in read if read.count(each) > 1}:
                offers = self.offers.of[command_id]
                reasons = [offer for offer in offers if offer["reason"]]
                # A process that is killed does not remember an offer that the disk refused.
                forgotten = [offer for offer in offers if not offer["recorded"]]
                if "-once" in command_id or len(reasons) + len(forgotten) < read.count(command_id) - 1:
                    wrong.append(f"{command_id} was read {read.count(command_id)} times: {offers}")
        return wrong


def _identified(pod: Pod) -> bool:
    return bool(pod.agent.cluster_id) or pod.agent.dialect == "agents"


def play(seed: int) -> list[str]:
    """Play the life of a seed and return what was wrong."""
    logger, offers = logging.getLogger("shim"), Offers()
    level_before = logger.level
    logger.addHandler(offers)
    logger.setLevel(logging.INFO)
    try:

        async def life() -> list[str]:
            return await Life(seed, offers).play()

        return run_virtual(life())
    finally:
        logger.removeHandler(offers)
        logger.setLevel(level_before)


@pytest.mark.parametrize("first", FIRST)
def test_every_command_reaches_its_cluster_or_is_reported(first: int) -> None:
    wrong = {seed: found for seed in range(first, first + (BATCH if ONLY is None else 1)) if (found := play(seed))}
    assert not wrong, "seeds and what was wrong"
