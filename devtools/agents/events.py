"""Events that a simulated agent reports, and the callbacks through which a test harness controls it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from devtools.agents.http_client import Pool, Request, Response
from devtools.agents.replies import Command
from devtools.agents.requests import Result


class EventKind(Enum):
    """Kind of an event."""

    REGISTER = "register"
    HEARTBEAT = "heartbeat"
    STATUS = "status"
    POLL = "poll"
    COMMAND = "command"  # the agent has received a command
    RESULT = "result"
    TUNNEL = "tunnel"
    HEALTH = "health"
    EXIT = "exit"  # the process ended by itself


class CallOutcome(Enum):
    """Outcome of a call from the agent's point of view."""

    OK = "ok"
    REFUSED = "refused"  # a status that this generation treats as a failure
    UNDECODABLE = "undecodable"  # a success with a body that the agent cannot use
    FAILED = "failed"  # no response


@dataclass(frozen=True, slots=True)
class Event:
    """One event of an agent. Times are monotonic seconds, comparable between processes of one host.

    `started_s` is the start of the call and `response` its response, if there was one; `detail` is the reason of a
    failure. `command` is set for COMMAND and RESULT.
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
        """Return the HTTP status, or 0 if there was no response."""
        return self.response.status if self.response else 0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A call that is about to be made; `send()` makes it correctly."""

    agent_id: str
    what: EventKind
    request: Request
    pool: Pool

    async def send(self) -> Response:
        return await self.pool.exchange(self.request)


async def succeed(command: Command) -> Result:
    """Complete any command with success."""
    return Result(output=f"done {command.type}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Callbacks that a test harness passes to an agent.

    `event` is called for every event at once. `execute` executes a command. `call` makes each call, and may make it
    incorrectly: it returns a response or raises `WireError`. `Exchange.pool` opens further connections.
    """

    event: Callable[[Event], None]
    execute: Callable[[Command], Awaitable[Result]] = succeed
    call: Callable[[Exchange], Awaitable[Response]] = Exchange.send
