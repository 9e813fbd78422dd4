"""Whatever agents, controller, network, disk and clock do: the promises hold.

Rules: docs/reference/protocol.md#16-owners-sessions-aliases, #21-link-life, #3-commands.

A shim on a memory store in virtual time is driven by any sequence of calls, messages, losses, crashes, refusals and
waits. Then the trouble ends, the agents go on living, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shim.core.agent_calls import Accepted, Commands, Failed
from shim.ports import CallResult, DialFailure
from tests.support.upstream import GONE, REFUSED, FakeSocket, Sent
from tests.support.virtual import VirtualLoop
from tests.support.world import Agent, World
from tests.support.world import settings as shim_settings

T = TypeVar("T")
WHO = st.integers(0, 3)
HOW = st.sampled_from(["read", "read", "unread", "unread", "unwritten", "left", "held"])
AGAIN_S = 500.0


class Log(logging.Handler):
    """What the bridge says while a machine runs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.offers: list[dict[str, Any]] = []
        self.defects: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "command_offered":
            self.offers.append(record.fields)  # type: ignore[attr-defined]
        if record.exc_info or record.getMessage() == "illegal_transition":
            self.defects.append(f"{record.getMessage()} {getattr(record, 'fields', '')} {record.exc_info}")


@dataclass
class Life:
    """An agent and what it went through."""

    agent: Agent
    registers: bool = True
    contacts: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)  # since the shim started
    read: list[str] = field(default_factory=list)
    unread: tuple[int, list[str]] | None = None  # a reply on a connection that it has not read
    poll: asyncio.Task[CallResult] | None = None
    registering: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def fresh_for_s(self) -> float:
        gaps = [b - a for a, b in zip(self.beats, self.beats[1:], strict=False)][-8:]
        return max(35.0, 1.5 * (median(gaps) if len(gaps) >= 3 else 30.0))


class Machine(RuleBasedStateMachine):
    """One shim and four agents: two clusters, one of dialect agents, one with a saved id that never registers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.log = Log()
        logging.getLogger("shim").addHandler(self.log)
        self.level_before = logging.getLogger("shim").level
        logging.getLogger("shim").setLevel(logging.INFO)
        self.pushed = 0
        self.posted: set[str] = set()
        self.own_tokens = False
        self.dial_failures: list[DialFailure] = []
        self.checked = 0

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coro)

    def do(self, deed: Callable[..., Any], *args: Any) -> None:
        """Something that is not awaited, and all that follows from it at once."""

        async def done() -> None:
            deed(*args)
            await self.world.settle()

        self.run(done())

    @initialize(
        hold=st.sampled_from(["off", "auto", 20]),
        acks=st.booleans(),
        links=st.sampled_from(["one", "each", "own tokens"]),
    )
    def begin(self, hold: Any, acks: bool, links: str) -> None:
        upstream = {"send_command_ack": True, "share_link": links != "each"}
        self.own_tokens = links == "own tokens"
        if self.own_tokens:
            upstream["token"] = ""

        async def make() -> World:
            configured = shim_settings(
                poll={"hold": hold, "max_batch": 2},
                commands={"at_most_once": ["once"], "max_queued": 5},
                upstream=upstream,
            )
            return World(configured).start()

        self.world = self.run(make())
        self.controller = self.world.controller
        self.controller.manners.acks = acks
        self.lives = [
            Life(self.world.agent(name="one", agent_id="pod-1")),
            Life(self.world.agent(name="two", agent_id="pod-2")),
            Life(self.world.agent(name="three", agent_id="a-3", dialect="agents")),
            Life(self.world.agent(name="", agent_id="pod-4", cluster_id="c-saved"), registers=False),
        ]
        for life in self.lives:
            life.agent.token = f"own-{life.agent.agent_id}"  # not looked at where one is configured
        self.run(self.world.settle())
        for who in range(4):
            self.register(who)
            self.heartbeat(who, "healthy")

    # --- agents ---

    def called(self, life: Life) -> None:
        life.contacts.append(self.world.now)

    def able(self, who: int) -> Life | None:
        """The agent, if it has what it needs for a call: agents of dialect clusters_agent wait for their cluster id."""
        life = self.lives[who]
        return life if life.agent.cluster_id or life.agent.dialect == "agents" else None

    @rule(who=WHO)
    def register(self, who: int) -> None:
        life = self.lives[who]
        if life.registers:

            async def go() -> None:
                await life.agent.register()
                self.called(life)

            life.registering.append(self.loop.create_task(go()))
            self.run(self.world.settle())

    @rule(who=WHO, status=st.sampled_from(["healthy", "degraded"]))
    def heartbeat(self, who: int, status: str) -> None:
        life = self.able(who)
        if life is not None:
            self.called(life)
            life.beats.append(self.world.now)
            self.run(life.agent.heartbeat(status))
            self.run(self.world.settle())

    @rule(who=WHO, how=st.sampled_from(["result", "lost result", "tunnel poll"]))
    def call(self, who: int, how: str) -> None:
        """A tunnel poll, or the result of a command; `lost`: the connection that takes it up is about to break."""
        life = self.able(who)
        if life is None or (how != "tunnel poll" and (not life.read or self.world.store.slow)):
            return
        self.called(life)
        if how == "tunnel poll":
            self.run(life.agent.tunnel_poll())
            return
        socket = self.socket_of(life)
        if how == "lost result" and socket is not None:
            socket.swallows = True
        unanswered = [command_id for command_id in life.read if command_id not in self.posted]
        self.run(self._post(life, (unanswered or life.read)[-1]))
        self.run(self.world.settle())

    async def _post(self, life: Life, command_id: str) -> None:
        if await life.agent.result(command_id) == Accepted():
            self.posted.add(command_id)

    @rule(who=WHO, how=HOW)
    def poll(self, who: int, how: str) -> None:
        """The reply is read; written, but not read yet; not written; the agent leaves first; or the poll is held."""
        life = self.able(who)
        if life is None or life.unread is not None:
            return
        store, was_slow = self.world.store, self.world.store.slow
        store.slow = was_slow or how == "left"
        if life.poll is None:
            self.called(life)
            life.poll = life.agent.poll_task()
            life.poll.add_done_callback(lambda _: self.called(life))  # until then its connection was open
            self.run(self.world.settle())
        if how == "left" and not life.poll.done():
            life.poll.cancel()
            life.poll = None
            self.do(life.agent.reconnect, False)
        elif how != "held" and life.poll.done():
            self._end_poll(life, how)
        if not was_slow:
            self.do(store.catch_up)

    def _end_poll(self, life: Life, how: str) -> None:
        assert life.poll is not None
        answer, life.poll = life.poll.result(), None
        if self.token_refused(answer):
            return
        assert isinstance(answer.outcome, Commands)
        ids = [command.id for command in answer.outcome.commands]
        if how in ("unwritten", "left"):
            if answer.receipt is not None:
                self.do(self.world.bridge.delivery.unwritten, answer.receipt)
            self.do(life.agent.reconnect, False)
            return
        self.do(life.agent.take, answer)
        if how == "read" or answer.receipt is None:
            life.read += ids
        else:
            life.unread = (life.agent.connection, ids)
            life.agent.connection, life.agent._leased = self.world.connection(), False

    def token_refused(self, answer: CallResult) -> bool:
        """Return True for the 401 of an agent of which nothing is stored, whose own token the controller refuses."""
        if not isinstance(answer.outcome, Failed):
            return False
        assert answer.outcome.status == 401
        assert self.own_tokens
        assert REFUSED in self.dial_failures
        return True

    @precondition(lambda self: any(life.unread for life in self.lives))
    @rule(reads=st.booleans())
    def settle_unread(self, reads: bool) -> None:
        """What lay in the kernel is read after all, or the connections end with it unread."""
        for life in self.lives:
            if life.unread is not None:
                (connection, ids), life.unread = life.unread, None
                life.read += ids if reads else []
                self.do(self.world.bridge.delivery.connection_closed, connection, reads)

    @rule(who=WHO)
    def reconnect(self, who: int) -> None:
        if self.lives[who].poll is None:
            self.do(self.lives[who].agent.reconnect)

    # --- the controller ---

    def online(self) -> bool:
        return any(True for _ in self.controller.open_sockets())

    def socket_of(self, life: Life) -> FakeSocket | None:
        """The open socket that speaks for an agent."""
        for sent in reversed(self.controller.log):
            if sent.message.payload.get("agent_id") == life.agent.agent_id and sent.socket.open:
                return sent.socket
        return None

    def push(self, command_id: str, who: int, **payload: Any) -> None:
        target, socket = self.lives[who].agent, self.socket_of(self.lives[who])
        if socket is not None:
            ids = {"cluster_id": target.cluster_id} if target.cluster_id else {"agent_id": target.agent_id}
            self.do(socket.says, "command", {"command_id": command_id, **ids, **payload}, f"r-{command_id}")

    @precondition(online)
    @rule(who=WHO, kinds=st.lists(st.sampled_from(["exec", "exec", "once"]), min_size=1, max_size=3))
    def commands(self, who: int, kinds: list[str]) -> None:
        for kind in kinds:
            self.pushed += 1
            self.push(f"k{self.pushed}-{kind}", who, type=kind, **({"ttl_seconds": 40} if self.pushed % 5 == 0 else {}))

    @precondition(online)
    @rule(who=WHO, kinds=st.lists(st.sampled_from(["exec", "exec", "once"]), min_size=1, max_size=3), how=HOW)
    def deliver(self, who: int, kinds: list[str], how: str) -> None:
        self.commands(who, kinds)
        self.poll(who, how)

    @precondition(lambda self: self.online() and self.pushed)
    @rule(who=WHO, number=st.integers(0, 20))
    def command_again(self, who: int, number: int) -> None:
        acked = [message.payload["command_id"] for message in self.controller.got("command_ack")]
        if acked:
            command_id = acked[number % len(acked)]
            self.push(command_id, who, type=command_id.partition("-")[2])

    @precondition(online)
    @rule(
        kind=st.sampled_from(["boom", "cluster not registered", "ping", "heartbeat_ack", "proxy_request", "nonsense"])
    )
    def message(self, kind: str) -> None:
        for socket in self.controller.open_sockets():
            if kind in ("boom", "cluster not registered"):
                self.do(socket.says, "error", {"error": kind})
            else:
                self.do(socket.says, kind)

    @rule(
        how=st.sampled_from(["comes back", "comes back", "lost", "closed", "deaf", "refuses", "busy", "gone"]),
        registers=st.booleans(),
        pongs=st.booleans(),
    )
    def controller_changes(self, how: str, registers: bool, pongs: bool) -> None:
        self.controller.manners.registers, self.controller.manners.pongs = registers, pongs
        while registers and self.controller.held_registers:
            self.do(self.controller.answer_register)
        failures = {"refuses": REFUSED, "busy": DialFailure("status", 503, 20.0), "gone": GONE}
        if how == "comes back":
            self.controller.come_back()
        elif how in failures:
            self.dial_failures.append(failures[how])
            self.do(self.controller.go_away, failures[how])
        for socket in list(self.controller.open_sockets()):
            if how == "deaf":
                socket.swallows = True
            elif how in ("lost", "closed"):
                self.do(lambda s: s.lose(by_close_frame=how == "closed"), socket)

    # --- disk, clock, process ---

    @rule(how=st.sampled_from(["full", "heals", "slow", "fast", "fast"]))
    def disk(self, how: str) -> None:
        if how == "full":
            self.world.store.fail()
        elif how == "heals":
            self.world.store.heal()
        else:
            self.world.store.slow = how == "slow"
            if how == "fast":
                self.do(self.world.store.catch_up)

    @rule(seconds=st.sampled_from([0.3, 2.0, 12.0, 31.0, 40.0, 65.0, 130.0]))
    def time(self, seconds: float) -> None:
        self.run(self.world.pass_s(seconds))

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        self.run(self._restart(crash=crash))

    async def _restart(self, *, crash: bool) -> None:
        if not crash:
            self.world.store.catch_up()
            await self.world.settle()
        await self._end(crash=crash)
        self.world.start()
        await self.world.settle()

    async def _end(self, *, crash: bool) -> None:
        if crash:
            await self.world.crash()
        else:
            await self.world.stop()
        for life in self.lives:
            life.beats.clear()
            life.unread = None  # it had not read it, and the connection is gone
            life.agent._leased = False
            life.agent.connection = self.world.connection()
            for task in [*life.registering, *([life.poll] if life.poll is not None else [])]:
                if crash:
                    task.cancel()
                elif not task.done():
                    pytest.fail("a clean stop left somebody waiting")
            life.poll, life.registering = None, []
        if not crash:
            assert not self.world.timers.pending(), "a clean stop left a timer"
        self.world.store.heal()

    # --- what must always hold ---

    @invariant()
    def nothing_was_raised(self) -> None:
        if hasattr(self, "world"):
            assert not self.world.faults
            assert not self.log.defects

    @invariant()
    def heartbeats_speak_for_the_living_only(self) -> None:
        if not hasattr(self, "world"):
            return
        new, self.checked = self.controller.log[self.checked :], len(self.controller.log)
        for number, sent in enumerate(new, self.checked - len(new)):
            if sent.message.type == "heartbeat":
                self._check_heartbeat(number, sent)

    def _check_heartbeat(self, number: int, sent: Sent) -> None:
        agent_id = sent.message.payload["agent_id"]
        [life] = [life for life in self.lives if life.agent.agent_id == agent_id] or [self.lives[3]]
        held = life.poll is not None
        age_s = sent.at_s - max((at for at in life.contacts if at <= sent.at_s), default=-1e9)
        assert held or age_s < life.fresh_for_s + 1e-3, f"a heartbeat for an agent that was silent for {age_s} s"
        earlier = [s.message for s in self.controller.log[:number] if s.socket is sent.socket]
        told = any(m.type == "register" and m.payload["agent_id"] == agent_id for m in earlier)
        assert told or self._adopted(sent.message.payload["cluster_id"]), "a heartbeat before its registration"

    def _adopted(self, cluster_id: str) -> bool:
        """Whether the shim knows no registration: the agent never registered, or a full disk forgot it."""
        sessions = [each for each in self.world.bridge.ctx.sessions if each.upstream_cluster_id == cluster_id]
        return any(not each.registration and each.key.kind == "cluster" for each in sessions)

    @invariant()
    def nobody_got_anything_twice_without_a_reason(self) -> None:
        for offer in self.log.offers:
            assert offer["attempt"] == 1 or offer["reason"], offer
            assert "-once" not in offer["command"] or offer["attempt"] == 1, offer
        for life in getattr(self, "lives", []):
            once = [command_id for command_id in life.read if "-once" in command_id]
            assert len(once) == len(set(once))

    # --- the end ---

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.run(self._balance())
                self.heartbeats_speak_for_the_living_only()
                self.nobody_got_anything_twice_without_a_reason()
                self.run(self._end(crash=False))
                self.nothing_was_raised()
        finally:
            logging.getLogger("shim").removeHandler(self.log)
            logging.getLogger("shim").setLevel(self.level_before)
            self.loop.close()

    async def _balance(self) -> None:
        """The trouble ends. Every command that was acknowledged was read by its agent, or ended with a code."""
        world, controller = self.world, self.controller
        controller.come_back()
        controller.manners.registers = controller.manners.pongs = True
        while controller.held_registers:
            controller.answer_register()
        world.store.heal()
        world.store.catch_up()
        for socket in controller.open_sockets():
            socket.lose()  # a ping that was not answered would not be sent again on it
        end = world.now + AGAIN_S
        while world.now < end:
            for socket in controller.open_sockets():
                socket.says("ping")
            for life in self.lives:
                await self._go_on(life)
            await world.pass_s(9.0)
        await self._check_books()

    async def _go_on(self, life: Life) -> None:
        """A heartbeat, a poll whose reply is read, a result for each command."""
        if not life.agent.cluster_id and life.agent.dialect != "agents":
            return
        if life.unread is not None:
            self.world.bridge.delivery.connection_closed(life.unread[0], False)
            life.unread = None
        self.called(life)
        life.beats.append(self.world.now)
        await life.agent.heartbeat()
        if life.poll is None:
            life.poll = life.agent.poll_task()
            life.poll.add_done_callback(lambda _: self.called(life))
            await self.world.settle()
        if life.poll.done():
            answer, life.poll = life.poll.result(), None
            commands = () if self.token_refused(answer) else life.agent.take(answer)
            life.read += [command.id for command in commands]
            for command in commands:
                await self._post(life, command.id)
        self.called(life)

    async def _check_books(self) -> None:
        codes = defaultdict(list)
        for message in self.controller.got("command_result"):
            codes[message.payload["command_id"]].append(message.payload.get("code", ""))
        accepted = {message.payload["command_id"] for message in self.controller.got("command_ack")}
        for command_id in accepted:
            was_read = any(command_id in life.read for life in self.lives)
            ended = any(code in ("expired", "undeliverable") for code in codes.get(command_id, ()))
            assert was_read or ended, f"{command_id} was acknowledged and is lost"
        for command_id in self.posted:
            assert command_id in codes, f"the result of {command_id} was taken and is lost"
        for life in self.lives:
            first = list(dict.fromkeys(life.read))
            order = []
            for command_id in first:
                seqs = {r.seq for r, _, _ in await self.world.store.find(command_id) if r.seq and _is_for(r, life)}
                order += sorted(seqs)[:1]
            assert order == sorted(order), f"out of order: {first}"
        assert self.world.bridge.outbox.empty, "a result did not reach the controller"


def _is_for(record: Any, life: Life) -> bool:
    return record.session.ident in (life.agent.cluster_id, life.agent.agent_id)


Machine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestInvariants = Machine.TestCase
