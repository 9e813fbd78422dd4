"""Bytes and frames that are not quite JSON, with the real shim and the real development controller as processes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.processes import TOKEN, world

AUTH = {"Authorization": f"Bearer {TOKEN}"}
FAST = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": "off"}}
REGISTER = b'{"agent_id":"agent-1","name":"caf\xe9","hostname":"h\xf4te"}'


def command(command_id: str, rest: bytes) -> bytes:
    return b'{"type":"command","request_id":"r-%b","payload":{"id":"%b",%b}}' % (
        command_id.encode(),
        command_id.encode(),
        rest,
    )


FRAMES = {
    "text": b"\xef\xbb\xbf" + command("k1", b'"text":"caf\xe9"') + command("k2", b'"n":2'),
    "binary": command("k3", b'"n":1e400') + b"\n" + command("k4", b'"n":%b' % (b"[" * 5000 + b"]" * 5000)),
}


async def test_nothing_is_lost_over_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    async with world(tmp_path, FAST) as (shim, controller), aiohttp.ClientSession(headers=AUTH) as http:
        await shim.start()
        base = f"{shim.url}/api/v1/clusters/agent"
        async with http.post(f"{base}/register", data=REGISTER) as response:
            assert response.status == 200
            cluster_id = (await response.json())["cluster_id"]
        async with http.post(f"{base}/{cluster_id}/heartbeat", data=b'{"agent_id":"agent-1","status":"\xff"}') as beat:
            assert beat.status == 200
        heard = await controller.until(type="heartbeat", direction="in")
        assert heard[0]["payload"]["status"] == "\ufffd"
        for kind, frame in FRAMES.items():
            await controller.control(
                "POST", "/control/send", {"base64": base64.b64encode(frame).decode(), "frame": kind}
            )
        refused = await controller.until(2, type="command_result", direction="in")
        assert [(each["payload"]["command_id"], each["payload"]["code"]) for each in refused] == [
            ("k3", "malformed"),
            ("k4", "malformed"),
        ]
        commands: list[Any] = []
        while len(commands) < 2:  # the refusals do not wait for the disk, the commands do
            async with http.get(f"{base}/{cluster_id}/poll") as response:
                commands += (await response.json())["commands"]
        assert [(each["id"], each["payload"]) for each in commands] == [("k1", {"text": "caf\ufffd"}), ("k2", {"n": 2})]
        result = b'{"success":true,"output":"caf\xe9 \x80"}'
        async with http.post(f"{base}/{cluster_id}/commands/k1/result", data=result) as response:
            assert response.status == 200
        told = (await controller.until(3, type="command_result", direction="in"))[-1]
        assert told["payload"]["output"] == "caf\ufffd \ufffd"
