"""Admin actions at other replicas, and agents that speak WebSocket themselves: requests over the internal listener."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from shim.bridge.admin_actions import NOT_FOUND
from shim.bridge.websocket_agents import WebSocketEvent
from shim.cluster.connection_pool import ConnectionPool, ReplicaLost
from shim.cluster.membership import Membership
from shim.cluster.shard_manager import ShardLocator
from shim.core.shards import Member
from shim.errors import OperatorError
from shim.management.command_api import CommandApi
from shim.management.subject import Answers, Subject
from shim.upstream.dialler import Spawn

WAIT_S = 2.0
PROGRESS_S = 1.0


class ReplicaClient:
    """Sender of admin actions to other replicas."""

    def __init__(self, membership: Membership, pool: ConnectionPool) -> None:
        self._membership = membership
        self._pool = pool

    async def ask_others(
        self, action: str, target: str, body: bytes, *, required: bool = False, complete: bool = False
    ) -> Answers:
        """Have all other replicas carry out an action, as `management.subject.Subject.ask_others` describes."""
        members = self._membership.others()
        asked = (self.ask(member, action, target, body) for member in members)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [(each.name, answer) for each, answer in zip(members, answers, strict=True) if isinstance(answer, dict)]
        for error in answers:
            optional = not complete and (found or not required)
            expected = isinstance(error, OperatorError) and (optional or error.status == NOT_FOUND)
            if isinstance(error, BaseException) and not expected:
                raise error
        return found

    async def ask(self, member: Member, action: str, target: str, body: bytes) -> dict[str, Any]:
        """Have a replica carry out an action and return its JSON. Raises `OperatorError`."""
        path = f"/{action}/{quote(target, safe='')}"
        head = f"POST {path} HTTP/1.1\r\nHost: replica\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = None
        try:
            async with asyncio.timeout(WAIT_S):
                connection = await self._pool.acquire(member)
                reply = await connection.exchange(head, body)
                answer = msgspec.json.decode(await reply.read(), type=dict[str, Any])
            self._pool.release(connection)
        except (ReplicaLost, TimeoutError, msgspec.MsgspecError):
            if connection is not None:
                connection.close()
            raise OperatorError(503, f"the replica {member.name} does not answer") from None
        if reply.status != 200:
            raise OperatorError(reply.status, str(answer.get("error")))
        return answer


class ClusterAdmin:
    """Handler of the admin actions of other replicas; reports agents that speak WebSocket themselves to the owner."""

    def __init__(
        self, subject: Subject, client: ReplicaClient, membership: Membership, locator: ShardLocator, spawn: Spawn
    ) -> None:
        self._subject = subject
        self._membership = membership
        self._starting = True  # until this member has asked all other replicas once if they drain
        self._actions = subject.admin_actions
        self._api = CommandApi(subject)
        self._client = client
        self._locator = locator
        self._spawn = spawn

    def lease_lost(self) -> None:
        """Ask the other replicas again if they drain: they order and cancel drains without one that is no member."""
        self._starting = True
        self._actions.end_with_others()

    async def carry_out(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Carry out a request of `ReplicaClient.ask`, and return the status and the JSON of the reply."""
        _, action, target = path.split("/", 2)
        try:
            answer = await self._carry_out(action, unquote(target), body)
        except OperatorError as error:
            return error.status, msgspec.json.encode({"error": str(error)})
        except (KeyError, msgspec.MsgspecError):
            text = "another replica's request cannot be read: do both have the same version?"
            return 502, msgspec.json.encode({"error": text})
        return 200, msgspec.json.encode(answer)

    async def _carry_out(self, action: str, target: str, body: bytes) -> dict[str, Any]:
        if action == "progress":
            drain = msgspec.to_builtins(self._actions.progress_here())
            starting = self._starting and not self._actions.draining
            return {"drain": drain, "starting": starting, "shards": self._actions.shards_here}
        if action == "websocket":
            self._apply(msgspec.json.decode(body, type=WebSocketEvent))
            return {}
        return await self._api.here(action, target, body)

    async def run(self) -> None:
        """Join a drain that goes on when this replica starts; poll the others' progress in a drain. Until cancelled."""
        while True:
            if self._starting or self._actions.draining or self._actions.drains_elsewhere:
                answers = await self._subject.ask_others("progress", "", b"")
                self._actions.follow(join=self._starting)
                membership, answered = self._membership, {name for name, _ in answers}
                member = membership.valid() and membership.me.process in membership.view.members
                if member and all(each.name in answered for each in membership.others()):
                    self._starting = False
            await self._membership.wait_for_change(PROGRESS_S)

    def websocket_event(self, event: WebSocketEvent) -> None:
        """Record an event of an agent that speaks WebSocket itself, here or at the owner of its shard."""
        owner = self._locator.remote_owner(event.token)
        if not self._apply(event) and owner is not None:
            self._spawn("websocket event", self._send(owner, event))

    def _apply(self, event: WebSocketEvent) -> bool:
        shard = self._locator.local(event.token)
        if shard is not None:
            shard.bridge.websocket_agents.record(event)
        return shard is not None

    async def _send(self, owner: Member, event: WebSocketEvent) -> None:
        try:
            await self._client.ask(owner, "websocket", "", msgspec.json.encode(event))
        except OperatorError:
            return  # the next owner learns of the agent by its next register
