"""An agent in the test's own process, on the `websockets` library: a test sends and expects one message at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.frames import Close

from devtools.controller.server import DevController

TOKEN = "tok-1"
DEADLINE_S = 60


class WsAgent:
    """One connection. Frames are what `websockets` makes of them; nothing is answered by itself but pings."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.cluster_id = ""

    async def send(self, kind: str, payload: Any = None, **envelope: Any) -> None:
        await self.ws.send(json.dumps({"type": kind, "payload": payload if payload is not None else {}, **envelope}))

    async def frame(self) -> str | bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.ws.recv()

    async def receive(self, kind: str | None = None) -> dict[str, Any]:
        """The next message; `kind` says which it must be."""
        message = json.loads(await self.frame())
        assert kind is None or message["type"] == kind, message
        return message

    async def ask(self, kind: str, payload: Any = None, **envelope: Any) -> dict[str, Any]:
        await self.send(kind, payload, **envelope)
        return await self.receive()

    async def register(self, agent_id: str = "agent-1", name: str = "cluster-1", **more: Any) -> dict[str, Any]:
        """Register, and return the payload of `register_success`."""
        await self.send("register", {"agent_id": agent_id, "name": name, **more}, request_id="reg-1")
        payload = (await self.receive("register_success"))["payload"]
        self.cluster_id = payload["cluster_id"]
        return payload

    async def heartbeat(self, **envelope: Any) -> dict[str, Any]:
        return await self.ask("heartbeat", {"cluster_id": self.cluster_id, "status": "available"}, **envelope)

    async def ping(self) -> None:
        """A WebSocket ping and its pong."""
        async with asyncio.timeout(DEADLINE_S):
            await (await self.ws.ping())

    async def end(self) -> Close | None:
        """Wait for the end; the controller's close frame, `None` if it ended without one."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await self.ws.recv()
        except websockets.ConnectionClosed as closed:
            return closed.rcvd


@asynccontextmanager
async def connected(controller: DevController, token: str = TOKEN, **options: Any) -> AsyncIterator[WsAgent]:
    """An agent that is connected, but not registered."""
    options = {"close_timeout": 1, "open_timeout": DEADLINE_S, "ping_interval": None, **options}
    async with websockets.connect(f"{controller.ws_url}?token={token}", **options) as ws:
        yield WsAgent(ws)


@asynccontextmanager
async def registered(
    controller: DevController, agent_id: str = "agent-1", name: str = "cluster-1", **options: Any
) -> AsyncIterator[WsAgent]:
    """An agent that is connected and registered."""
    async with connected(controller, **options) as agent:
        await agent.register(agent_id, name)
        yield agent
