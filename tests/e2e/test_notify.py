"""Notifications of the real process: what a webhook and a file get while the controller goes and comes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from tests.support.processes import TOKEN, world
from tests.support.recording_server import Recorded, RecordingServer, http
from tests.support.sockets import tcp_server
from tests.test_notify import written

pytestmark = pytest.mark.timeout(400)
SECRET_PATH = "/services/T0000/B0000/hunter2-hunter2"


async def told(server: RecordingServer, event: str) -> Recorded:
    """The first call with this event."""
    await server.until(lambda: any(call.json["event"] == event for call in server.calls), within_s=90)
    return next(call for call in server.calls if call.json["event"] == event)


async def test_a_webhook_and_a_file_hear_of_the_link(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    async with RecordingServer(lambda call: http(200)) as server:
        (tmp_path / "webhook").write_text(server.url + SECRET_PATH)
        settings = {"notify": {"url_file": str(tmp_path / "webhook"), "file": str(file)}}
        async with world(tmp_path, settings) as (shim, controller), aiohttp.ClientSession() as session:
            await shim.start()
            register = {"agent_id": "pod-1", "name": "prod-eu"}
            url = f"{shim.url}/api/v1/clusters/agent/register"
            async with session.post(url, json=register, headers={"Authorization": f"Bearer {TOKEN}"}) as response:
                assert response.status == 200
            await controller.kill()
            down = await told(server, "link_down")
            await controller.start()
            await told(server, "link_up")
            await written(file, len(server.calls))
            assert await shim.stop() == 0
        assert "No connection to the controller" in down.json["text"]
        assert down.json["agents"] == ["prod-eu"]
        events = [call.json["event"] for call in server.calls]
        assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == events
        assert "hunter2" not in "\n".join(shim.lines)
        assert TOKEN not in file.read_text()


async def test_a_refused_token_is_told_and_a_webhook_that_hangs_does_not_delay_the_stop(tmp_path: Path) -> None:
    accepted = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await asyncio.Event().wait()

    async with tcp_server(hold) as port:
        settings = {
            "notify": {"url": f"http://127.0.0.1:{port}{SECRET_PATH}", "file": str(tmp_path / "events.jsonl")},
            "upstream": {"token": "another-token"},
        }
        async with world(tmp_path, settings) as (shim, _), aiohttp.ClientSession() as session:
            await shim.start()
            headers = {"Authorization": "Bearer another-token"}
            body = {"agent_id": "pod-1", "name": "prod-eu"}
            async with session.post(f"{shim.url}/api/v1/clusters/agent/register", json=body, headers=headers):
                pass
            async with asyncio.timeout(90):
                await accepted.wait()
            await written(tmp_path / "events.jsonl", 1)
            assert await shim.stop() == 0  # a process that is ended by force has another code
        assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["event"] == "token_refused"
        assert "hunter2" not in "\n".join(shim.lines)
