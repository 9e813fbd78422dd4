"""Admin actions on other replicas: orders and reports as JSON over the internal listener."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from shim.admin.command_api import describe
from shim.admin.subject import Agents
from shim.bridge import Bridge
from shim.bridge.admin_actions import Drain
from shim.cluster.connection_pairs import PairLost, Pairs
from shim.cluster.status import Operations
from shim.core.leases import Member
from shim.core.records import CommandRecord, SessionKey
from shim.errors import OperatorError
from shim.log import get
from shim.protocol.reply_notes import OPERATOR
from shim.runtime import Spawn

log = get(__name__)

WAIT_S = 2.0
PROGRESS_S = 1.0
PATH = "/operate"


class Migration(msgspec.Struct, frozen=True, omit_defaults=True):
    """Event of an agent that speaks WebSocket itself, for the owner of its shard (`MigrationListener`)."""

    event: Literal["registers", "registered", "closed"]
    token: str
    payload: dict[str, Any]
    cluster_id: str = ""
    anew: bool = False

    def __repr__(self) -> str:
        return f"Migration({self.event!r})"

    def tell(self, bridge: Bridge) -> None:
        """Pass the event to the bridge of the shard."""
        match self.event:
            case "registers":
                bridge.websocket_registers(self.token, self.payload, anew=self.anew)
            case "registered":
                bridge.websocket_registered(self.token, self.payload, self.cluster_id)
            case "closed":
                bridge.websocket_closed(self.token, self.payload)


class Order(msgspec.Struct, omit_defaults=True):
    """Request to another replica for one admin action."""

    do: Literal["find", "purge", "redeliver", "forget", "drain", "resume", "progress", "migration"]
    command: str = ""
    agent: str = ""
    session: str = ""
    reason: str = ""
    timeout_s: float = 0.0
    migration: Migration | None = None


class Report(msgspec.Struct, omit_defaults=True):
    """Outcome of an order. `error` and `status` are those of an `OperatorError`."""

    commands: list[dict[str, Any]] = []
    record: CommandRecord | None = None
    session: SessionKey | None = None
    drain: Drain | None = None
    error: str = ""
    status: int = 0


class Operators:
    """Admin actions between replicas: implements `status.Others` and carries out orders of other replicas.

    `others` returns the other living replicas.
    """

    def __init__(
        self, here: Operations, sessions: Agents, name: str, others: Callable[[], Iterable[Member]], spawn: Spawn
    ) -> None:
        self.pairs = Pairs(OPERATOR)
        self._here = here
        self._sessions = sessions
        self._name = name
        self._others = others
        self._spawn = spawn
        self._drains: dict[str, Drain] = {}
        self.bridge_of: Callable[[str], Bridge | None] = lambda _: None
        self.owner_of: Callable[[str], Member | None] = lambda _: None

    # --- asked by others ----------------------------------------------------------------------------------------------

    async def carry_out(self, body: bytes) -> bytes:
        """Carry out an encoded `Order` and return the encoded `Report`."""
        try:
            report = await self._carry_out(msgspec.json.decode(body, type=Order))
        except OperatorError as error:
            report = Report(error=str(error), status=error.status)
        except msgspec.MsgspecError:
            report = Report(error="another replica's order cannot be read: do both have the same version?", status=502)
        return msgspec.json.encode(report)

    async def _carry_out(self, order: Order) -> Report:
        match order.do:
            case "find":
                found = await self._here.find(order.command)
                return Report([describe(each, self._sessions) | {"replica": self._name} for each in found])
            case "purge" | "redeliver":
                return Report(record=await self._here.act(order.do, order.command, order.session, order.reason))
            case "forget":
                return Report(session=await self._here.forget_here(order.agent))
            case "migration":
                bridge = None if order.migration is None else self.bridge_of(order.migration.token)
                if order.migration is not None and bridge is not None:
                    order.migration.tell(bridge)
                return Report()
            case "drain":
                return Report(drain=self._here.drain(order.timeout_s))
            case "resume":
                return Report(drain=self._here.resume())
            case "progress":
                return Report(drain=self._here.progress())

    # --- asking others ------------------------------------------------------------------------------------------------

    async def _ask(self, member: Member, order: Order) -> Report:
        """Send an order to another replica and return its report. Raises `OperatorError` without an answer in time."""
        body = msgspec.json.encode(order)
        head = f"POST {PATH} HTTP/1.1\r\nHost: replica\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        pair = None
        try:
            async with asyncio.timeout(WAIT_S):
                pair = await self.pairs.acquire(member)
                await pair.exchange(head, body, head_only=False)
                answer = b"".join([piece async for piece in pair.pieces()])
            self.pairs.release(pair)
            return msgspec.json.decode(answer, type=Report)
        except (PairLost, TimeoutError, ConnectionError, msgspec.MsgspecError):
            if pair is not None:
                pair.close()
            raise OperatorError(503, f"the replica {member.name} does not answer") from None

    async def _ask_all(self, order: Order) -> dict[str, Report]:
        """Send an order to all other replicas. Return the reports of those that answered, by process."""
        found: dict[str, Report] = {}

        async def ask(member: Member) -> None:
            with suppress(OperatorError):
                found[member.process] = await self._ask(member, order)

        await asyncio.gather(*(ask(member) for member in self._others()))
        return found

    async def find(self, command_id: str) -> list[dict[str, Any]]:
        """Return what other replicas know of a command."""
        reports = await self._ask_all(Order("find", command_id))
        return [each for report in reports.values() for each in report.commands]

    async def act(self, action: str, command_id: str, session: str, reason: str) -> CommandRecord | None:
        """Purge or redeliver a command at the replica that has it; `None` if none has. Raises `OperatorError`."""
        do: Literal["purge", "redeliver"] = "purge" if action == "purge" else "redeliver"
        order = Order(do, command_id, session=session, reason=reason)
        return next((report.record for report in await self._ask_each(order) if report.record is not None), None)

    async def forget(self, agent: str) -> SessionKey | None:
        """Forget an agent at the replica that has it; `None` if none has. Raises `OperatorError`."""
        reports = await self._ask_each(Order("forget", agent=agent))
        return next((report.session for report in reports if report.session is not None), None)

    async def _ask_each(self, order: Order) -> list[Report]:
        """Send an order to all other replicas, one after another, and return their reports.

        Raises `OperatorError` if one does not answer or reports an error.
        """
        reports = [await self._ask(member, order) for member in list(self._others())]
        for report in reports:
            if report.error:
                raise OperatorError(report.status, report.error)
        return reports

    # --- passthrough.websocket_proxy.MigrationListener ----------------------------------------------------------------

    def websocket_registers(self, token: str, payload: dict[str, Any], *, anew: bool) -> None:
        """Notify the owner that an agent has sent a `register` to the controller itself."""
        self._migration(Migration("registers", token, payload, anew=anew))

    def websocket_registered(self, token: str, payload: dict[str, Any], cluster_id: str) -> None:
        """Notify the owner that the controller has accepted such a `register`."""
        self._migration(Migration("registered", token, payload, cluster_id))

    def websocket_closed(self, token: str, payload: dict[str, Any]) -> None:
        """Notify the owner that the connection of an agent that had registered was closed."""
        self._migration(Migration("closed", token, payload))

    def _migration(self, migration: Migration) -> None:
        bridge, owner = self.bridge_of(migration.token), self.owner_of(migration.token)
        if bridge is not None:
            migration.tell(bridge)
        elif owner is not None:
            self._spawn("migration", self._ask_quietly(owner, Order("migration", migration=migration)))

    async def _ask_quietly(self, member: Member, order: Order) -> None:
        with suppress(OperatorError):
            await self._ask(member, order)

    # --- asking all ---------------------------------------------------------------------------------------------------

    def drain(self, timeout_s: float) -> None:
        """Start a drain at all other replicas, or change its deadline."""
        self._tell_all(Order("drain", timeout_s=timeout_s))

    def resume(self) -> None:
        """End the drain at all other replicas."""
        self._tell_all(Order("resume"))

    def drains(self) -> list[Drain]:
        """Return the progress of other replicas' drains according to their latest reports."""
        return list(self._drains.values())

    def _tell_all(self, order: Order) -> None:
        async def tell() -> None:
            self._heard(await self._ask_all(order))

        self._spawn("drain", tell())

    def _heard(self, reports: dict[str, Report]) -> None:
        self._drains = {process: report.drain for process, report in reports.items() if report.drain is not None}

    async def run(self) -> None:
        """Poll the progress of other replicas during a drain, until cancelled."""
        while True:
            await asyncio.sleep(PROGRESS_S)
            if self._here.draining or self._drains:
                self._heard(await self._ask_all(Order("progress")))
                if not self._here.draining:
                    self._drains = {each: drain for each, drain in self._drains.items() if drain.since_unix}
