"""`agent-shim status`, `drain`, `purge`, `redeliver`: the commands of a person, against a running shim."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.processes import Controller, Shim, refusing_port, world

ADMIN_TOKEN = "the-admin-token-of-this-test"
BASE = "/api/v1/clusters/agent"
# A heartbeat is missed only after an interval without an acknowledgement: a busy machine must not make it so.
CALM = {"upstream": {"heartbeat_interval_s": 30.0}}


async def run(*args: str) -> tuple[int, str, str]:
    """An `agent-shim` command: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", *args),
        env=os.environ | {"COLUMNS": "120"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def where(shim: Shim, folder: Path) -> tuple[str, ...]:
    return ("--url", shim.admin, "--token-file", str(folder / "admin-token"))


def with_token(folder: Path) -> dict[str, Any]:
    (folder / "admin-token").write_text(ADMIN_TOKEN + "\n")
    return {
        "admin": {"port": 0, "token_file": str(folder / "admin-token")},
        "poll": {"hold": "off"},
        "upstream": {"heartbeat_interval_s": 2.0},
    }


async def agent(http: aiohttp.ClientSession, shim: Shim, controller: Controller, *commands: str) -> str:
    """A registered agent for which these commands wait; its cluster id."""
    body = {"agent_id": "agent-1", "name": "prod-cluster"}
    async with http.post(f"{shim.url}{BASE}/register", json=body) as response:
        cluster_id = str((await response.json())["cluster_id"])
    await beat(http, shim, cluster_id)
    for command_id in commands:
        await controller.api.push({"id": command_id, "cluster_id": cluster_id})
        await shim.event("command_queued", command=command_id)
    return cluster_id


async def beat(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> None:
    async with http.post(f"{shim.url}{BASE}/{cluster_id}/heartbeat", json={"status": "healthy"}) as response:
        assert response.status < 300


@asynccontextmanager
async def beating(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> AsyncIterator[None]:
    """Keep an agent alive, however long the commands of the block take to start on a busy machine."""

    async def beats() -> None:
        while True:
            await beat(http, shim, cluster_id)
            await asyncio.sleep(1)

    task = asyncio.create_task(beats())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def fetch_and_answer(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> list[str]:
    async with http.get(f"{shim.url}{BASE}/{cluster_id}/poll") as response:
        ids = [command["id"] for command in (await response.json())["commands"]]
    for command_id in ids:
        path = f"{BASE}/{cluster_id}/commands/{command_id}/result"
        async with http.post(shim.url + path, json={"success": True}) as response:
            assert response.status < 300
    return ids


async def test_status_says_it_in_the_terminal_and_as_json(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path) | CALM) as (shim, controller):
        await shim.start()
        code, out, err = await run("status", *where(shim, tmp_path))
        assert (code, err) == (0, "")
        assert out.startswith("WAIT: No agent has called yet. Set the agent's PIPEOPS_API_URL to http://127.0.0.1:")
        cluster_id = await agent(http, shim, controller, "k1")
        async with beating(http, shim, cluster_id):
            code, out, err = await run("status", *where(shim, tmp_path))
        lines = out.splitlines()
        assert (code, lines[0]) == (0, "OK: All is well: the controller is connected, 1 agent alive.")
        assert f"controller  {controller.url}: connected for" in out
        assert "commands    1 waiting, 0 offered, 0 in doubt" in lines
        row = dict(zip(lines[-2].split(), lines[-1].split(), strict=False))
        assert (row["AGENT"], row["DIALECT"], row["ALIVE"]) == ("prod-cluster", "clusters_agent", "alive")
        code, out, _ = await run("status", "--json", *where(shim, tmp_path))
        assert (code, json.loads(out)["commands"]["waiting"]) == (0, 1)
        shell = ["sh", "-c", '"$0" -m shim status "$@" >&-', sys.executable, *where(shim, tmp_path)]
        closed = await asyncio.create_subprocess_exec(*shell, stderr=asyncio.subprocess.PIPE)
        assert (await closed.communicate(), closed.returncode) == ((None, b""), 0)


async def test_what_agents_call_themselves_does_not_steer_the_terminal(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, _):
        await shim.start()
        body = {"agent_id": "agent-1", "name": "\x1b]0;mine\x07prod\n" + "x" * 200}
        async with http.post(f"{shim.url}{BASE}/register", json=body) as response:
            assert response.status == 200
        code, out, _ = await run("status", *where(shim, tmp_path))
        assert code == 0
        lines = out.splitlines()
        assert max(map(len, lines)) < 300
        assert all(map(str.isprintable, lines))
        assert lines[-1].startswith("?]0;mine?prod?xxx")


class Terminal:
    """A command in a terminal."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        self._seen = b""

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        environment = os.environ | {"TERM": "xterm-256color"}
        command = (sys.executable, "-m", "shim", *args)
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=self._slave)
        os.close(self._slave)
        os.set_blocking(self._master, False)
        return process

    async def until(self, text: str) -> str:
        """Read until this text has been written; all that was seen."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            while text.encode() not in self._seen:
                readable = asyncio.Event()
                loop.add_reader(self._master, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self._master)
                self._seen += os.read(self._master, 65_536)
        seen, self._seen = self._seen, b""
        return seen.decode()

    def close(self) -> None:
        os.close(self._master)


async def test_in_a_terminal_it_has_colours_and_can_be_watched(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path) | CALM) as (shim, controller):
        await shim.start()
        cluster_id = await agent(http, shim, controller)
        for watch in ((), ("--watch",)):
            terminal = Terminal()
            async with beating(http, shim, cluster_id):
                process = await terminal.start("status", *watch, *where(shim, tmp_path))
                assert "\x1b[" in await terminal.until("All is well: the controller is connected, 1 agent alive.")
            if watch:
                await shim.stop()
                await terminal.until("no answer from the admin port")
                process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
            terminal.close()


async def test_watching_goes_on_while_the_shim_is_away(tmp_path: Path) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, _):
        await shim.start()
        watching = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shim", "status", "--watch", *where(shim, tmp_path)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert watching.stdout is not None
        async with asyncio.timeout(60):
            assert b"No agent has called yet" in await watching.stdout.readline()
            await shim.stop()
            while b"no answer from the admin port" not in await watching.stdout.readline():
                pass
            watching.send_signal(signal.SIGINT)
            assert await watching.wait() == 0


async def test_what_keeps_a_command_from_its_work_is_said_with_what_to_do(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        await agent(http, shim, controller)
        for name in ("status", "drain"):
            code, out, err = await run(name, "--url", shim.admin)
            assert (code, out) == (1, "")
            assert "the admin token is required" in err
            assert "--token-file" in err
        (tmp_path / "wrong").write_text("wrong")
        code, _, err = await run("drain", "--url", shim.admin, "--token-file", str(tmp_path / "wrong"))
        assert (code, "not accepted" in err) == (1, True)
        code, _, err = await run("drain", "--url", shim.admin, "--token-file", str(tmp_path / "none"))
        assert (code, f"the token file {tmp_path / 'none'}: cannot be read" in err) == (1, True)
        with refusing_port() as port:
            code, _, err = await run("status", "--url", f"http://127.0.0.1:{port}")
        assert (code, "no answer from the admin port" in err, "Traceback" in err) == (1, True, False)
        code, _, err = await run("status", "--url", shim.url, "--token-file", str(tmp_path / "wrong"))
        assert (code, "no such endpoint" in err or "not what a shim's admin port says" in err) == (1, True)
        code, _, err = await run("status", "--url", "ftp://127.0.0.1")
        assert (code, "expected http://host:port" in err) == (2, True)
        code, _, err = await run("purge", "nobody", *where(shim, tmp_path))
        assert (code, err) == (
            1,
            "Error: no command with this id is known; ended ones are kept for commands.retain_s\n",
        )


async def test_without_a_configured_token_nothing_can_be_changed(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        code, out, _ = await run("status", "--url", shim.admin)
        assert (code, "No agent has called yet" in out) == (0, True)
        for args in (("drain",), ("purge", "k1"), ("redeliver", "k1")):
            code, _, err = await run(*args, "--url", shim.admin)
            assert (code, "admin.token_file" in err) == (1, True)


async def test_the_configuration_says_where_to_ask(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    config = with_token(tmp_path)
    async with world(tmp_path, config) as (shim, controller):
        await shim.start()
        await agent(http, shim, controller, "k1", "k2")
        file = tmp_path / "for-the-command.yaml"
        file.write_text(yaml.safe_dump({"admin": config["admin"] | {"port": int(shim.admin.rpartition(":")[2])}}))
        code, out, err = await run("purge", "k1", "--config", str(file), "--reason", "a test")
        assert (code, out, err) == (0, "k1 is given up, and the controller is informed (undeliverable)\n", "")
        code, out, _ = await run("redeliver", "k1", "--config", str(file), "--reason", "a change of mind")
        assert (code, out) == (0, "k1 waits for its agent's next poll\n")
        told = await controller.until(type="command_result", direction="in")
        assert told[0]["payload"]["error"] == "purged by an operator: a test"
        code, _, err = await run("status", "--config", str(file), "--set", "admin.port=0")
        assert (code, "give --url" in err) == (2, True)


async def test_drain_waits_until_everything_is_handed_over(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        cluster_id = await agent(http, shim, controller, "k1", "k2")
        draining = asyncio.create_task(run("drain", "--wait", "--timeout", "60", *where(shim, tmp_path)))
        await shim.event("drain_started")
        await controller.api.push({"id": "k3", "cluster_id": cluster_id})
        rejected = await shim.event("command_rejected", command="k3")
        assert rejected["code"] == "queue_full"
        assert await fetch_and_answer(http, shim, cluster_id) == ["k1", "k2"]
        while not draining.done():
            await beat(http, shim, cluster_id)  # acknowledged heartbeats confirm the results
        code, out, err = await draining
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == "drained: 0 commands and 0 results left, 1 refused"
        assert {event["payload"]["command_id"] for event in await results(controller, 3)} == {"k1", "k2", "k3"}
        code, out, _ = await run("drain", "--cancel", *where(shim, tmp_path))
        assert (code, out) == (0, "not draining: commands are taken again\n")


async def results(controller: Controller, count: int) -> list[dict[str, Any]]:
    return await controller.until(count, type="command_result", direction="in")


async def test_a_drain_that_does_not_end_in_time_fails(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        await agent(http, shim, controller, "k1")
        code, out, _ = await run("drain", "--wait", "--timeout", "0.5", *where(shim, tmp_path))
        assert (code, out.splitlines()[-1]) == (1, "timed out: 1 command and 0 results left, 0 refused")
        code, out, _ = await run("status", *where(shim, tmp_path))
        assert out.startswith("BAD: The drain did not end in time")


async def test_an_agent_is_forgotten_only_when_it_calls_no_more(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, with_token(tmp_path)) as (shim, controller):
        await shim.start()
        cluster_id = await agent(http, shim, controller)
        code, _, err = await run("forget", cluster_id, *where(shim, tmp_path))
        assert (code, "stop it first" in err) == (1, True)
        code, _, err = await run("forget", "nobody/at all", *where(shim, tmp_path))
        assert (code, "no agent of this name or id is known" in err) == (1, True)
        code, _, err = await run("forget", cluster_id, "--url", shim.admin)
        assert code == 1
        assert ADMIN_TOKEN not in "\n".join(shim.lines)
