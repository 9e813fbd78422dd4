"""`agent-shim run` as a process: start, signals, configuration that changes, bad input, the admin port."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests.chaos.harness.waiting import last
from tests.support.processes import TOKEN, Shim, world

REGISTER = {"agent_id": "agent-1", "name": "prod-cluster"}


async def register(http: aiohttp.ClientSession, shim: Shim) -> str:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with http.post(f"{shim.url}/api/v1/clusters/agent/register", json=REGISTER, headers=headers) as response:
        assert response.status == 200
        return str((await response.json())["cluster_id"])


async def heartbeat(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> int:
    body = {"cluster_id": cluster_id, "agent_id": "agent-1", "status": "healthy"}
    async with http.post(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/heartbeat", json=body) as response:
        return response.status


async def test_ready_file_start_line_and_clean_stop(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, controller):
        ready = tmp_path / "ready.json"
        await shim.start("--ready-file", str(ready))
        told = json.loads(ready.read_text())
        assert told == {
            "listen": shim.url.removeprefix("http://"),
            "admin": shim.admin.removeprefix("http://"),
            "pid": shim.pid,
        }
        serving = shim.events("serving")[0]
        assert serving["mode"] == "websocket"
        assert serving["upstream"] == controller.url
        assert serving["version"]
        assert await shim.stop() == 0
        assert shim.events("stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_answers_held_polls_and_ends_with_0(
    number: signal.Signals, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with world(tmp_path, {"poll": {"hold": 20}}) as (shim, controller):
        await shim.start()
        cluster_id = await register(http, shim)
        connections = [asyncio.create_task(poll(http, shim, f"{cluster_id}-{index}")) for index in range(10)]
        await gauge(http, shim, "agent_shim_polls_held", 10)
        shim.send(number)
        answers = await asyncio.gather(*connections)
        assert [(status, body["commands"]) for status, body in answers] == [(200, [])] * 10
        assert await shim.wait() == 0
        # the controller saw a normal closure
        closed = await controller.until(kind="closed")
        assert closed[0]["code"] == 1000


async def poll(http: aiohttp.ClientSession, shim: Shim, cluster_id: str) -> tuple[int, Any]:
    async with http.get(f"{shim.url}/api/v1/clusters/agent/{cluster_id}/poll") as response:
        return response.status, await response.json()


async def gauge(http: aiohttp.ClientSession, shim: Shim, name: str, value: float) -> None:
    """Ask for metrics until a gauge has a value."""
    async with asyncio.timeout(60):
        while True:
            async with http.get(f"{shim.admin}/metrics") as response:
                if f"{name} {value:.1f}" in (await response.text()).splitlines():
                    return


async def test_the_same_command_is_not_offered_twice_across_a_stop(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {"poll": {"hold": "off"}}) as (shim, controller):
        await shim.start()
        cluster_id = await register(http, shim)
        assert await heartbeat(http, shim, cluster_id) == 200
        await controller.api.push({"id": "c-1", "cluster_id": cluster_id})
        await shim.event("command_queued")
        _, drained = await poll(http, shim, cluster_id)
        assert [c["id"] for c in drained["commands"]] == ["c-1"]
        assert await heartbeat(http, shim, cluster_id) == 200  # the next request on the same connection: evidence
        assert await shim.stop() == 0
        await shim.start()
        assert (await poll(http, shim, cluster_id))[1]["commands"] == []
        # and the controller may send it again: it is known
        await controller.until(2, type="register", direction="in")  # the poll was contact: its session is replayed
        await controller.api.push({"id": "c-1", "cluster_id": cluster_id})
        await shim.event("command_duplicate")
        assert (await poll(http, shim, cluster_id))[1]["commands"] == []


async def test_sighup_and_a_changed_file_reload_what_may_change(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {"poll": {"hold": "off", "frequency_s": 5}}) as (shim, _):
        await shim.start()
        cluster_id = await register(http, shim)
        for _ in range(2):
            assert (await poll(http, shim, cluster_id))[1]["poll_frequency"] == 5
        shim.write({"poll": {"hold": "off", "frequency_s": 9}, "listen": {"port": 7}})
        shim.send(signal.SIGHUP)
        reloaded = await shim.event("config_reloaded")
        assert reloaded["needs_restart"] == ["listen.port"]
        assert (await poll(http, shim, cluster_id))[1]["poll_frequency"] == 9
        # a faulty file keeps the old configuration, and says so in the log and a metric
        shim.write({"poll": {"hold": "sometimes"}})
        faulty = await shim.event("config_faulty")  # no signal: the change itself is noticed
        assert "poll.hold" in faulty["faults"][0]
        await gauge(http, shim, "agent_shim_config_valid", 0)
        assert (await poll(http, shim, cluster_id))[1]["poll_frequency"] == 9


async def test_a_swapped_token_file_is_used_at_once(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    """Kubernetes swaps a symlink to a directory."""
    for name, token in (("one", "tok-that-is-wrong"), ("two", TOKEN)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(token + "\n")
    data = tmp_path / "data"
    data.symlink_to("one")
    config = {"upstream": {"token": "", "token_file": str(data / "token")}}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        await shim.event("token_refused")
        async with http.post(f"{shim.url}/api/v1/clusters/agent/register", json=REGISTER) as response:
            assert response.status == 401
        swap = tmp_path / "swap"
        swap.symlink_to("two")
        swap.replace(data)
        await shim.event("link_state", state="online")
        await register(http, shim)
        assert "tok-that-is-wrong" not in "\n".join(shim.lines)
        assert TOKEN not in "\n".join(shim.lines)


async def test_a_link_outlives_a_token_file_without_a_token_and_one_that_was_only_written_again(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    config = {"upstream": {"token": "", "token_file": str(token)}, "listen": {"auth": "required"}}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        await register(http, shim)
        token.write_text("")
        assert "upstream.token_file: the file is empty" in (await shim.event("token_unreadable"))["error"]
        await register(http, shim)
        token.write_text(f"{TOKEN}\n")
        # Both files are looked at together: what follows from this one comes after all that follows from the other.
        shim.write({**config, "poll": {"frequency_s": 7}})
        await shim.event("config_reloaded")
        token.write_text("tok-another")
        await shim.event("token_changed")
        assert len(shim.events("token_changed")) == 1
        states = [each["state"] for each in shim.events("link_state")]
        assert states.count("online") == 1


async def test_a_link_gets_the_new_token_although_a_call_by_http_has_read_the_file_before(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    token = tmp_path / "token"
    token.write_text("tok-that-is-wrong")
    config = {
        "upstream": {"token": "", "token_file": str(token)},
        "fallback": {"use_upstream_token": True},
        "rollout": {"exclude": ["by-http"]},
    }
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        await shim.event("token_refused")
        token.write_text(TOKEN)
        by_http = {"agent_id": "agent-2", "name": "by-http"}
        async with http.post(f"{shim.url}/api/v1/clusters/agent/register", json=by_http) as response:
            assert response.status == 200
        await shim.event("token_changed")
        await shim.event("link_state", state="online")


async def test_bad_input_gets_json_and_hurts_nobody(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        base = f"{shim.url}/api/v1/clusters/agent"
        calls: list[tuple[str, str, bytes, int]] = [
            ("POST", f"{base}/register", b"{", 400),
            ("POST", f"{base}/register", b"[]", 400),
            ("POST", f"{base}/register", b'{"agent_id": 1, "name": {}}', 400),
            ("POST", f"{base}/register", b'{"name": "' + b"x" * 2_000_000 + b'"}', 413),
            ("GET", f"{base}/a%2fb/poll", b"", 400),
            ("GET", f"{base}/%2e%2e/poll", b"", 400),
            ("GET", f"{base}/{'x' * 4096}/poll", b"", 400),
            ("GET", f"{base}/register", b"", 405),
            ("GET", f"{shim.url}/nowhere", b"", 404),
            ("POST", f"{base}/c-1/commands/c/result", b'{"success": "yes"}', 400),
        ]
        for method, url, body, status in calls:
            # encoded: yarl would decode the path
            async with http.request(method, URL(url, encoded=True), data=BytesIO(body)) as response:
                answer = await response.json()
                assert (response.status, answer["success"]) == (status, False), url
                assert set(answer) == {"success", "error"}
        async with http.get(f"{shim.url}/api/v1/health") as response:
            assert response.status == 200


async def test_admin_port(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {"admin": {"port": 0, "ready_requires_upstream": True}}) as (shim, controller):
        await shim.start()
        await shim.event("link_state", state="online")
        async with http.get(f"{shim.admin}/healthz") as response:
            assert response.status == 200
        async with http.get(f"{shim.admin}/readyz") as response:
            assert response.status == 200
        await controller.kill()
        await shim.event("link_lost")
        async with http.get(f"{shim.admin}/readyz") as response:
            assert (response.status, (await response.json())["reasons"]) == (503, ["no upstream link is online"])


async def test_faults_that_prevent_a_start_have_their_exit_codes(tmp_path: Path) -> None:
    async with Shim(tmp_path, {"pol": {}}) as shim:
        await shim.launch()
        assert await shim.wait() == 2
    async with Shim(tmp_path, {}) as first:
        await first.start()
        async with Shim(tmp_path / "..", {"listen": {"port": int(first.url.rsplit(":", 1)[1])}}) as second:
            await second.launch()
            assert await second.wait() == 70
            assert not second.events("link_state")  # nothing was dialled
            error = second.events("stopped_by_fault")[0]["error"]
            assert error.startswith(f"listen.port {first.url.rsplit(':', 1)[1]} on listen.host 127.0.0.1 is taken")
            assert error.endswith("or change listen.port")
    database = tmp_path / "newer.db"
    async with Shim(tmp_path, {"store": {"path": str(database)}}) as shim:
        await shim.start()
        assert await shim.stop() == 0
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE meta SET value = 99 WHERE key = 'min_reader_version'")
        before = database.read_bytes()
        await shim.launch()
        assert await shim.wait() == 78
        assert database.read_bytes() == before


@pytest.mark.parametrize(
    "ready,told",
    [("none/ready", "does not exist: make it first"), (".", "not a regular file"), ("pipe", "not a regular")],
)
async def test_a_ready_file_that_cannot_be_written_is_refused_before_anything_starts(
    ready: str, told: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with Shim(tmp_path, {}) as shim:
        await shim.launch("--ready-file", str(tmp_path / ready))
        assert await shim.wait() == 2
        assert told in shim.lines[-1]
        assert "--ready-file" in shim.lines[-1]
        assert not (tmp_path / "agent-shim.db").exists()


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "mode: !!int abc", "listen: {port: " + "9" * 5000 + "}", "[" * 5000]
)
async def test_a_file_that_cannot_be_used_leaves_the_running_configuration(text: str, tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        (tmp_path / "agent-shim.yaml").write_text(text)
        await shim.event("config_faulty")
        assert await shim.stop() == 0


async def test_what_takes_the_place_of_the_file_leaves_the_running_configuration(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        file = tmp_path / "agent-shim.yaml"
        for make in (os.mkfifo, os.mkdir, lambda path: Path(path).write_bytes(b"\xff\xfe\x00mode")):
            kept, after = file.rename(tmp_path / "kept"), len(shim.lines)
            make(file)
            shim.send(signal.SIGHUP)
            await shim.event("config_faulty", after)
            file.rmdir() if file.is_dir() else file.unlink()
            kept.rename(file)
        after = len(shim.lines)
        shim.send(signal.SIGHUP)
        assert (await shim.event("config_reloaded", after))["mode"] == "websocket"


async def test_closed_standard_streams_are_not_given_to_the_database(tmp_path: Path) -> None:
    async with Shim(tmp_path, {"upstream": {"url": "http://127.0.0.1:1", "token": TOKEN}}) as shim:
        shim.program = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *shim.program)
        ready = tmp_path / "ready.json"
        await shim.launch("--ready-file", str(ready))
        async with asyncio.timeout(60):
            while not ready.exists():
                await last(0.05)
        told = {number: (Path("/proc") / str(shim.pid) / "fd" / str(number)).readlink() for number in range(3)}
        assert set(told.values()) == {Path("/dev/null")}
        assert await shim.stop() == 0
