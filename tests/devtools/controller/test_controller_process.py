"""`agent-shim controller` as a process: ready file, signals, what survives a kill, what it prints."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import websockets
from click.testing import CliRunner

from devtools.controller import command
from tests.support.wsagent import WsAgent

TOKEN = "tok-of-the-process"


class Process:
    """A controller that serves."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any], started: str) -> None:
        self._process = process
        self.ready = ready
        self.started = started
        self.url = f"http://{ready['control']}"
        self.ws_url = f"ws://{ready['listen']}/api/v1/clusters/agent/ws"

    async def end(self, number: int) -> tuple[int, str]:
        """Send a signal; exit code and what was printed since the start."""
        self._process.send_signal(number)
        async with asyncio.timeout(60):
            stdout, _ = await self._process.communicate()
        return self._process.returncode or 0, stdout.decode()


@asynccontextmanager
async def _serving(tmp_path: Path, *options: str) -> AsyncIterator[Process]:
    ready_file = tmp_path / "ready.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "controller", "--listen", "127.0.0.1:0"),
        *("--token", TOKEN, "--ready-file", str(ready_file), *options),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            started = (await process.stdout.readline()).decode()
        yield Process(process, json.loads(ready_file.read_text()), started)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def _agent(process: Process, **options: Any) -> AsyncIterator[WsAgent]:
    async with websockets.connect(f"{process.ws_url}?token={TOKEN}", close_timeout=1, **options) as ws:
        yield WsAgent(ws)


async def test_ready_file_and_clean_stop(tmp_path: Path) -> None:
    async with _serving(tmp_path, "--verbose") as process:
        assert set(process.ready) == {"listen", "control", "pid"}
        os.kill(process.ready["pid"], 0)
        assert process.ready["listen"] in process.started
        async with _agent(process) as agent:
            await agent.register(k8s_service_token="cluster-admin")
            await agent.heartbeat()
            code, printed = await process.end(signal.SIGTERM)
            assert (await agent.end()).code == 1001
        assert code == 0
    words = [line.split()[2:4] for line in printed.splitlines()]
    assert ["<-", "register"] in words
    assert ["->", "heartbeat_ack"] in words
    assert words[-1][-1] == "stopped"
    assert TOKEN not in process.started + printed
    assert "cluster-admin" not in printed


async def test_sigint_stops_while_somebody_waits(tmp_path: Path) -> None:
    async with _serving(tmp_path) as process, aiohttp.ClientSession() as session:
        waiting = asyncio.create_task(session.get(process.url + "/control/messages?type=none&wait_s=60"))
        async with session.get(process.url + "/control") as response:
            assert response.status == 200
        assert (await process.end(signal.SIGINT))[0] == 0
        with pytest.raises(aiohttp.ClientError):
            await waiting


async def test_kill_loses_nothing_that_was_received(tmp_path: Path) -> None:
    journal, state = tmp_path / "journal.jsonl", tmp_path / "state.jsonl"
    files = ("--journal", str(journal), "--state", str(state))
    async with _serving(tmp_path, *files) as process, _agent(process) as agent:
        first = await agent.register(cluster_id="c-kept")
        for number in range(50):
            await agent.send("command_result", {"command_id": f"c-{number}", "cluster_id": "c-kept"})
        await agent.heartbeat(request_id="last")
        await process.end(signal.SIGKILL)
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    received = [event["payload"]["command_id"] for event in events if event.get("type") == "command_result"]
    assert received == [f"c-{number}" for number in range(50)]
    assert events[-1]["request_id"] == "last"

    async with _serving(tmp_path, *files) as process, _agent(process) as agent:
        agent.cluster_id = "c-kept"
        assert (await agent.heartbeat())["type"] == "heartbeat_ack", "registered before the restart"
        again = await agent.register(cluster_id="c-kept")
        assert (again["status"], again["registered_at"]) == ("re-registered", first["registered_at"])
        await process.end(signal.SIGTERM)
    numbers = [json.loads(line)["n"] for line in journal.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_faults_control_and_tls_from_the_command_line(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    (tmp_path / "token").write_text("from-a-file\n")
    (tmp_path / "faults.json").write_text('[{"kind": "binary_frames"}, {"kind": "no_heartbeat_acks", "count": 1}]')
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with _serving(
        tmp_path,
        *("--cert-file", str(tmp_path / "both.pem"), "--control", "127.0.0.1:0", "--control-token", "ct"),
        *("--faults", str(tmp_path / "faults.json"), "--token-file", str(tmp_path / "token"), "--base-path", "/b/"),
    ) as process:
        assert f"https://{process.ready['listen']}/b;" in process.started
        url = f"wss://{process.ready['listen']}/b/api/v1/clusters/agent/ws?token=from-a-file"
        async with websockets.connect(url, ssl=client) as ws:
            agent = WsAgent(ws)
            await agent.send("ping")
            assert isinstance(await agent.frame(), bytes)
            await agent.register()
            await agent.send("heartbeat")
            assert (await agent.ask("ping"))["type"] == "pong"
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer ct"}) as session:
            url = f"https://{process.ready['control']}/control/faults"
            async with session.get(url, ssl=client) as response:
                assert [f["kind"] for f in (await response.json())["faults"]] == ["binary_frames"]


@pytest.mark.parametrize(
    "options, code, text",
    [
        ([], 2, "give at least one --token"),
        (["--token", ""], 2, "give at least one --token"),
        (["--token", "t", "--listen", "nowhere"], 2, "expected HOST:PORT"),
        (["--token", "t", "--listen", "127.0.0.1:99999"], 2, "expected HOST:PORT"),
        (["--token", "t", "--control", ":x"], 2, "expected HOST:PORT"),
        (["--token", "t", "--ping-interval-s", "0"], 2, "--ping-interval-s"),
        (["--token", "t", "--faults", "FILE"], 1, "--faults: no such fault"),
        (["--token", "t", "--cert-file", "FILE"], 1, "cannot use the certificate"),
        (["--token", "t", "--listen", "127.0.0.1:0", "--journal", "missing/x"], 1, "cannot serve"),
    ],
)
def test_bad_options_are_told(tmp_path: Path, options: list[str], code: int, text: str) -> None:
    file = tmp_path / "file"
    file.write_text('{"kind": "nothing"}')
    result = CliRunner().invoke(command, [str(file) if option == "FILE" else option for option in options])
    assert result.exit_code == code, result.output
    assert text in result.output


async def test_port_in_use(tmp_path: Path) -> None:
    async with _serving(tmp_path) as process:
        taken = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shim", "controller", "--listen", process.ready["listen"], "--token", "t"),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            _, stderr = await taken.communicate()
    assert taken.returncode == 1
    assert b"cannot serve" in stderr
    assert b"Traceback" not in stderr


def test_the_command_alone_loads_no_server() -> None:
    """The list of commands must stay cheap."""
    code = "import sys; import devtools.controller; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
