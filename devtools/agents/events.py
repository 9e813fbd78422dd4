"""What a simulated agent tells its harness, and where a harness may reach into it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from devtools.agents.http_client import Pool, Request, Response
from devtools.agents.replies import Command
from devtools.agents.requests import Result


class EventKind(Enum):
    """What an event is about."""

    REGISTER = "register"
    HEARTBEAT = "heartbeat"
    STATUS = "status"
    POLL = "poll"
    COMMAND = "command"  # a command is in the agent's hand
    RESULT = "result"
    TUNNEL = "tunnel"
    HEALTH = "health"
    EXIT = "exit"  # the process ended by itself


class CallOutcome(Enum):
    """How it went, as the agent sees it."""

    OK = "ok"
    REFUSED = "refused"  # a status that this generation takes as a failure
    UNDECODABLE = "undecodable"  # a success that it cannot use
    FAILED = "failed"  # no answer


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to an agent. Times are monotonic seconds, comparable between processes of one host.

    `started_s` is when the call began; `response` what it was answered, if it was; `detail` says why it failed;
    `command` stands with COMMAND and RESULT.
    """

    agent_id: str
    what: EventKind
    outcome: CallOutcome
    started_s: float
    at_s: float
    detail: str = ""
    command: Command | None = None
    response: Response | None = None

    @property
    def status(self) -> int:
        """The HTTP status, 0 without an answer."""
        return self.response.status if self.response else 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A call that is about to be made: `send()` makes it as a sound agent would."""

    agent_id: str
    what: EventKind
    request: Request
    pool: Pool

    async def send(self) -> Response:
        return await self.pool.exchange(self.request)


async def succeed(command: Command) -> Result:
    """Carry out any command with success."""
    return Result(output=f"done {command.type}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What a harness hangs into an agent.

    `event` gets everything that happens, at once. `execute` carries out a command. `call` makes each call and may make
    it badly: it answers with a response or raises `WireError`, and has `Exchange.pool` for connections of its own.
    """

    event: Callable[[Event], None]
    execute: Callable[[Command], Awaitable[Result]] = succeed
    call: Callable[[Exchange], Awaitable[Response]] = Exchange.send
