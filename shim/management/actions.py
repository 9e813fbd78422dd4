"""Operators' actions on all bridges of this process. `bridge.admin_actions` has those on one bridge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shim.bridge import Bridge
from shim.bridge.admin_actions import AdminActions, Drain, DrainState
from shim.core.records import CommandDetails, CommandRecord, SessionKey
from shim.errors import OperatorError

NOT_FOUND = 404
RETAINED = "ended ones are kept for commands.retain_s"


class Actions:
    """An operator's actions on all bridges of this process. With shards, a drain covers those owned when it starts.

    `drains_elsewhere` has the latest known progress of other replicas' drains, by the replica's name.
    """

    def __init__(self, bridges: Callable[[], Sequence[Bridge]]) -> None:
        self._bridges = bridges
        self.drains_elsewhere: dict[str, Drain] = {}

    @property
    def draining(self) -> bool:
        """True while this process rejects new commands because of a drain."""
        return any(bridge.admin_actions.draining for bridge in self._bridges())

    def progress_here(self) -> Drain:
        """Return the progress of this process's drain."""
        return together([bridge.admin_actions.progress() for bridge in self._bridges()])

    def progress(self) -> Drain:
        """Return the progress of the drain at all replicas."""
        return together([self.progress_here(), *self.drains_elsewhere.values()])

    def record_elsewhere(self, drains: dict[str, Drain]) -> None:
        """Record the progress of other replicas. Drains that are over are forgotten with this process's own."""
        self.drains_elsewhere = {name: each for name, each in drains.items() if self.draining or each.since_unix}

    def drain(self, timeout_s: float) -> Drain:
        """Start a drain: reject new commands until the queued ones are delivered and the results are sent."""
        return together([bridge.admin_actions.drain(timeout_s) for bridge in self._bridges()])

    def resume(self) -> Drain:
        """End the drain and accept commands again."""
        return together([bridge.admin_actions.resume() for bridge in self._bridges()])

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
            if any(not session or session in (str(each[0].session), each[0].session.ident) for each in found):
                knowing.append(bridge)
        if not knowing:
            raise OperatorError(NOT_FOUND, f"no command with this id is known; {RETAINED}")
        if len(knowing) > 1:
            raise OperatorError(409, "several tokens have a command with this id: name its session")
        return knowing[0].admin_actions

    async def forget(self, agent: str) -> SessionKey:
        """Forget an agent by name, id or whole key. Raises `OperatorError`."""
        bridges = self._bridges()
        for bridge in bridges:
            try:
                return await bridge.session_removal.forget(agent)
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
