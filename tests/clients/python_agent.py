"""A small agent with the `websockets` library, after the vendor's guide. Its sisters: node_agent.js, go_agent/main.go.

Arguments: WebSocket URL without the token, token, agent id, cluster name, heartbeat interval in milliseconds. Prints
what it lives through, one JSON object a line; reconnects for ever.
"""

import asyncio
import itertools
import json
import sys
from datetime import UTC, datetime

import websockets

_numbers = itertools.count(1)


def tell(event, **more):
    print(json.dumps({"event": event, **more}), flush=True)


def envelope(kind, payload, request_id=""):
    message = {"type": kind, "payload": payload, "timestamp": datetime.now(UTC).isoformat()}
    return json.dumps(message | ({"request_id": request_id} if request_id else {}))


async def heartbeats(ws, cluster_id, agent_id, interval_s):
    while True:
        payload = {"cluster_id": cluster_id, "agent_id": agent_id, "status": "available", "tunnel_status": "connected"}
        await ws.send(envelope("heartbeat", payload))
        await asyncio.sleep(interval_s)


async def handle(ws, message, agent_id, interval_s, tasks):
    kind, payload, request_id = message["type"], message["payload"], message.get("request_id", "")
    if kind == "register_success":
        tell("registered", cluster_id=payload["cluster_id"], status=payload["status"])
        tasks.create_task(heartbeats(ws, payload["cluster_id"], agent_id, interval_s))
    elif kind == "ping":
        await ws.send(envelope("pong", {"timestamp": datetime.now(UTC).isoformat()}, request_id))
    elif kind == "command":
        result = {"command_id": payload["command_id"], "success": True, "output": "done"}
        await ws.send(envelope("command_result", result, request_id))
    else:
        tell(kind, error=payload.get("error", ""))


async def session(url, token, agent_id, name, interval_s):
    async with websockets.connect(f"{url}?token={token}") as ws:
        tell("connected")
        payload = {"agent_id": agent_id, "name": name, "k8s_version": "1.27.0", "agent_version": "1.0.0"}
        await ws.send(envelope("register", payload, f"req_{next(_numbers)}"))
        async with asyncio.TaskGroup() as tasks:
            async for frame in ws:
                await handle(ws, json.loads(frame), agent_id, interval_s, tasks)
            raise ConnectionResetError("closed")


async def main(url, token, agent_id, name, interval_ms):
    delay_s = 0.05
    while True:
        try:
            await session(url, token, agent_id, name, int(interval_ms) / 1000)
        except* (OSError, websockets.WebSocketException) as errors:
            error = errors.exceptions[0]
            tell("closed", reason=type(error).__name__)
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, 60)


asyncio.run(main(*sys.argv[1:6]))
