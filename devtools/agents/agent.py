"""One simulated legacy agent, whose HTTP requests equal those of a real agent of its generation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from devtools.agents.events import Callbacks, CallOutcome, Event, EventKind, Exchange
from devtools.agents.generations import GENERATIONS
from devtools.agents.http_client import Pool, Request, Response, WireError
from devtools.agents.pacing import Pace, Pause, PollStyle, Ticker
from devtools.agents.replies import Command, DecodeError, decode_commands, decode_tunnel
from devtools.agents.requests import Identity, Result, health, result_body, status_report, tunnel_poll
from shim.clock import Clock

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentProfile:
    """Timing of an agent; the defaults are those of real agents.

    A heartbeat interval of `None` selects the generation's own interval; for other calls `None` disables them.
    `timeout_scale` multiplies the time-outs of calls.
    """

    dialect: str = "clusters_agent"
    heartbeat_interval_s: float | None = None
    poll_interval_s: float | None = None
    poll_style: PollStyle = PollStyle.TICKER
    tunnel_interval_s: float | None = None
    status_interval_s: float | None = None
    retry_attempts: int = 10
    retry_initial_s: float = 5
    retry_max_s: float = 30
    result_attempts: int = 3
    timeout_scale: float = 1

    def scaled(self, factor: float) -> AgentProfile:
        """Return the profile with every interval, pause and time-out multiplied by `factor`."""

        def times(value_s: float | None) -> float | None:
            return None if value_s is None else value_s * factor

        return replace(
            self,
            heartbeat_interval_s=self.beat_s * factor,
            poll_interval_s=times(self.poll_interval_s),
            tunnel_interval_s=times(self.tunnel_interval_s),
            status_interval_s=times(self.status_interval_s),
            retry_initial_s=self.retry_initial_s * factor,
            retry_max_s=self.retry_max_s * factor,
            timeout_scale=self.timeout_scale * factor,
        )

    @property
    def beat_s(self) -> float:
        """Return the seconds between heartbeats."""
        return self.heartbeat_interval_s or GENERATIONS[self.dialect].INTERVAL_S

    @property
    def drains(self) -> bool:
        """Return True if the agent polls: the profile asks for it and the generation has a route for commands."""
        return self.poll_interval_s is not None and GENERATIONS[self.dialect].POLLS


class LegacyAgent:
    """A legacy agent. `run` executes it; the single calls are public for test harnesses that drive it by hand.

    `cluster_id` is given or comes from the register reply. A generation that stores it never registers again.
    """

    def __init__(
        self, url: str, who: Identity, profile: AgentProfile, clock: Clock, callbacks: Callbacks, cluster_id: str = ""
    ) -> None:
        self.who = who
        self.profile = profile
        self.cluster_id = cluster_id
        self._generation = GENERATIONS[profile.dialect]
        self._clock = clock
        self._callbacks = callbacks
        # Real agents have two clients: one for the control plane, and Go's default one for the polls of generation B.
        self._control = Pool(url, clock.monotonic_s)
        self._default = Pool(url, clock.monotonic_s)
        self._drain_pool = self._default if self._generation.KEEPS_ID else self._control

    @property
    def connections_opened(self) -> int:
        """Return the number of TCP connections that the agent has opened."""
        return self._control.opened + self._default.opened

    async def run(self) -> None:
        """Run until cancelled, or until a failed registration ends the process, if the generation exits then."""
        exits = self._generation.FATAL_REGISTER
        holds_id = self._generation.KEEPS_ID and self.cluster_id != ""
        try:
            async with asyncio.TaskGroup() as group:
                if not exits:
                    self._start_tunnel(group)
                if not holds_id and not await self.register() and exits:
                    now_s = self._clock.monotonic_s()
                    self._emit(EventKind.EXIT, CallOutcome.FAILED, now_s, detail="could not register")
                    return
                if exits:
                    self._start_tunnel(group)
                self._start_loops(group)
        finally:
            self.close()

    def close(self) -> None:
        """Close all connections. The agent may be run again, like a restarted process that kept its state."""
        self._control.close()
        self._default.close()

    async def register(self) -> bool:
        """Register once; return True if this generation accepts the reply as success."""
        request = self._generation.register(self.who, self._clock.wall_s())

        def read(response: Response) -> Response:
            found = self._generation.registration(response.status, response.body, self.who)
            self.cluster_id = found.cluster_id or self.cluster_id
            if found.token:
                self.who = replace(self.who, service_token=found.token)
            return response

        return await self._call(EventKind.REGISTER, request, self._control, read) is not None

    async def heartbeat(self) -> bool:
        """Send one heartbeat, without retries."""
        request = self._generation.heartbeat(self.who, self.cluster_id, self._clock.wall_s())
        return await self._call(EventKind.HEARTBEAT, request, self._control, _take) is not None

    async def status(self, report: dict[str, Any] | None = None) -> bool:
        """Send one cluster status report."""
        request = status_report(self.who, self._clock.wall_s(), report)
        return await self._call(EventKind.STATUS, request, self._control, _take) is not None

    async def health(self) -> bool:
        """Send one health request."""
        return await self._call(EventKind.HEALTH, health(), self._control, _take) is not None

    async def poll_tunnel(self) -> bool:
        """Poll the tunnel's state once."""
        request = tunnel_poll(self.who)
        return await self._call(EventKind.TUNNEL, request, self._default, lambda r: decode_tunnel(r.body)) is not None

    async def poll(self) -> list[Command] | None:
        """Poll once, report the commands, then execute and answer them in order. Return None if the poll failed."""
        request = self._generation.poll(self.who, self.cluster_id)
        commands = await self._call(EventKind.POLL, request, self._drain_pool, lambda r: decode_commands(r.body))
        now_s = self._clock.monotonic_s()
        for command in commands or ():
            self._emit(EventKind.COMMAND, CallOutcome.OK, now_s, command=command)
        for command in commands or ():
            await self.answer(command, await self._callbacks.execute(command))
        return commands

    async def answer(self, command: Command, result: Result) -> bool:
        """Post a command's result, up to `result_attempts` times with the first retry's pause in between."""
        body = result_body(result, self._clock.wall_s())
        request = self._generation.result(self.who, self.cluster_id, command.id, body)
        for attempt in range(self.profile.result_attempts):
            if attempt:
                await asyncio.sleep(self.profile.retry_initial_s)
            if await self._call(EventKind.RESULT, request, self._drain_pool, _take, command) is not None:
                return True
        return False

    def _start_tunnel(self, group: asyncio.TaskGroup) -> None:
        interval_s = self.profile.tunnel_interval_s
        if self.who.tunnel_enabled and interval_s is not None:
            ticker = Ticker(interval_s, self._clock.monotonic_s(), at_once=True)
            group.create_task(self._repeat((ticker, self.poll_tunnel)))

    def _start_loops(self, group: asyncio.TaskGroup) -> None:
        profile, now_s = self.profile, self._clock.monotonic_s()
        beats = (Ticker(profile.beat_s, now_s, at_once=self._generation.FIRST_AT_ONCE), self._beat)
        if profile.poll_interval_s is None or not self._generation.POLLS:
            group.create_task(self._repeat(beats))
        elif profile.poll_style is PollStyle.SERIAL:
            group.create_task(self._repeat(beats, (Ticker(profile.poll_interval_s, now_s), self.poll)))
        else:
            pace = Pause if profile.poll_style is PollStyle.PAUSE else Ticker
            group.create_task(self._repeat(beats))
            group.create_task(self._repeat((pace(profile.poll_interval_s, now_s), self.poll)))
        if profile.status_interval_s is not None and profile.dialect == "agents":
            group.create_task(self._repeat((Ticker(profile.status_interval_s, now_s), self.status)))

    async def _repeat(self, *timed: tuple[Pace, Callable[[], Awaitable[object]]]) -> None:
        """Make the repeated calls of one loop when they are due, the longest overdue first."""
        while True:
            pace, call = min(timed, key=lambda entry: entry[0].due_s)
            await asyncio.sleep(pace.due_s - self._clock.monotonic_s())
            pace.started(self._clock.monotonic_s())
            await call()
            pace.ended(self._clock.monotonic_s())

    async def _beat(self) -> None:
        """Send a heartbeat with the generation's retries. If a cluster id is required and missing, send nothing."""
        if self._generation.KEEPS_ID and not self.cluster_id:
            return
        attempts = self.profile.retry_attempts if self._generation.RETRIES else 1
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(min(self.profile.retry_initial_s * 2 ** (attempt - 1), self.profile.retry_max_s))
            if await self.heartbeat():
                return

    async def _call(
        self,
        what: EventKind,
        request: Request,
        pool: Pool,
        read: Callable[[Response], _Value],
        command: Command | None = None,
    ) -> _Value | None:
        """Make one call, report it and return the result of `read` for its response. Return None if the call failed."""
        request = replace(request, timeout_s=request.timeout_s * self.profile.timeout_scale)
        started_s = self._clock.monotonic_s()
        try:
            response = await self._callbacks.call(Exchange(self.who.agent_id, what, request, pool))
        except WireError as error:
            self._emit(what, CallOutcome.FAILED, started_s, detail=str(error), command=command)
            return None
        if response.status not in request.success:
            self._emit(what, CallOutcome.REFUSED, started_s, response=response, command=command)
            return None
        try:
            value = read(response)
        except DecodeError as error:
            outcome = CallOutcome.UNDECODABLE if response.status < 300 else CallOutcome.REFUSED
            self._emit(what, outcome, started_s, response=response, detail=str(error), command=command)
            return None
        self._emit(what, CallOutcome.OK, started_s, response=response, command=command)
        return value

    def _emit(self, what: EventKind, outcome: CallOutcome, started_s: float, **rest: Any) -> None:
        now_s = self._clock.monotonic_s()
        self._callbacks.event(Event(self.who.agent_id, what, outcome, started_s, now_s, **rest))


def _take(response: Response) -> Response:
    return response
