"""`agent-shim rollout` over several real shims, one of each illness, by kubectl's contexts and by admin ports."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from shim.core.failover import bucket
from tests.e2e.test_health import Agent, Health
from tests.support import kubectl
from tests.support.processes import TOKEN, Controller, Shim, free_port, world
from tests.support.sockets import tcp_server

ROOT = Path(__file__).parents[2]
# With the default interval of 30 s a heartbeat is missed only after so long without an acknowledgement: a busy machine
# must not make it so. Illnesses of heartbeats are waited for with a short one.
CALM = {"poll": {"hold": "off"}}
FAST = {"heartbeat_interval_s": 0.1}
WAIT_S = 90.0
INSIDE = [name for name in map("cluster-{}".format, range(999)) if bucket(name) < 10]
OUTSIDE = next(name for name in map("cluster-{}".format, range(999)) if bucket(name) > 50)
ADMIN_TOKEN = "the-admin-token-of-this-test"

pytestmark = pytest.mark.timeout(600)


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), headers=headers) as session:
        yield session


async def rollout(*args: str, path: str | None = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "rollout", *args),
        env=os.environ | ({"PATH": path} if path else {}),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_S * 2):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def report(*args: str, path: str | None = None) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit code, the report and its clusters by name."""
    code, out, err = await rollout("report", "--json", *args, path=path)
    assert (code in (0, 1, 2), err) == (True, ""), (code, out, err)
    data = json.loads(out)
    assert data["exit_code"] == code
    return code, data, {each["name"]: each for each in data["clusters"]}


class Fleet:
    """Shims of several clusters with an agent each, at one controller."""

    def __init__(
        self, folder: Path, http: aiohttp.ClientSession, controller: Controller, stack: AsyncExitStack
    ) -> None:
        self._folder, self._http, self._controller, self._stack = folder, http, controller, stack
        self.shims: dict[str, Shim] = {}

    async def add(self, name: str, agent: str = "", **config: Any) -> Health:
        """Start a shim with an agent of this name, which registers and heartbeats."""
        folder = self._folder / name
        folder.mkdir()
        upstream = {"url": self._controller.url, "token": TOKEN}
        upstream |= config.pop("upstream", {})
        rest = {"poll": {"hold": "off"}, "rollout": {"percent": 10}, "fallback": {"url": self._controller.url}}
        shim = await self._stack.enter_async_context(Shim(folder, {"upstream": upstream, **rest, **config}))
        await shim.start()
        self.shims[name] = shim
        if agent:
            living = Agent(self._http, shim, agent)
            await living.register()
            await self._stack.enter_async_context(living)
        return Health(self._http, shim)

    async def fault(self, **fields: Any) -> None:
        await self._controller.control("POST", "/control/faults", fields)


async def heartbeats(http: aiohttp.ClientSession, shim: Shim, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until the heartbeats of the last hour are as wanted; their numbers do not fall within that hour."""
    async with asyncio.timeout(WAIT_S):
        while True:
            async with http.get(f"{shim.admin}/status.json") as response:
                objectives = (await response.json())["objectives"]
            if wanted(next(each for each in objectives if each["name"] == "heartbeat_success")["windows"]["1h"]):
                return
            await asyncio.sleep(0.2)


async def missed(http: aiohttp.ClientSession, shim: Shim) -> None:
    """Wait until more heartbeats are missed than are forgiven."""
    await heartbeats(http, shim, lambda hour: hour["state"] == "missed" and hour["samples"] - hour["good"] > 2)


async def measured(http: aiohttp.ClientSession, shim: Shim) -> None:
    """Wait until a heartbeat is counted."""
    await heartbeats(http, shim, lambda hour: bool(hour["samples"]))


def contexts_of(shims: dict[str, Shim]) -> dict[str, Any]:
    return {
        name: {"pods": [kubectl.pod("agent-1")], "exec": {"agent-1": ["status", "--url", shim.admin, "--json"]}}
        for name, shim in shims.items()
    }


async def test_one_of_each_illness_through_kubectl(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (_, controller), AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, http, controller, stack)
        well = await fleet.add("well", INSIDE[0])
        unknown = await fleet.add("unknown", INSIDE[1], upstream=FAST)
        missing = await fleet.add("missing", INSIDE[2], upstream=FAST)
        failing = await fleet.add("failing", OUTSIDE)
        down = await fleet.add(
            "down", upstream={"url": f"http://127.0.0.1:{free_port()}"}, identity={"name": INSIDE[3]}
        )
        refused = await fleet.add("refused", upstream={"token": "another-token"})
        for health in (well, unknown, missing):
            await health.until("all_well")
        await fleet.fault(kind="not_registered", error="quota exceeded", agent_id=f"pod-{INSIDE[1]}")
        await fleet.fault(kind="no_heartbeat_acks", agent_id=f"pod-{INSIDE[2]}")
        await controller.control("POST", "/control/legacy", {"refuse": 500})
        said = {unknown: "heartbeats_refused", failing: "fallback_failing", down: "link_down", refused: "token_refused"}
        for health, code in said.items():
            await health.until(code)
        await missed(http, fleet.shims["missing"])

        path = kubectl.install(tmp_path, contexts_of(fleet.shims))
        names = ",".join(fleet.shims)
        exit_code, data, rows = await report("--contexts", names, path=path)
        forms = [await rollout("report", "--contexts", names, *form, path=path) for form in ((), ("--html",))]
        step = await rollout("step", "--contexts", names, "--as", "helm", path=path)
    assert (exit_code, data["verdict"]) == (2, "go back")
    # A link that is down is a reason to go back after two minutes: how long it was depends on this machine.
    assert set(data["go_back"]) - {"down"} == {"unknown", "missing", "refused"}
    canary = {name: row["canary"] for name, row in rows.items()}
    assert canary == {**dict.fromkeys(fleet.shims, "in"), "failing": "out", "refused": "empty"}
    assert all(row["agent_pods"] == 1 and row["sidecar_faults"] == [] for row in rows.values())
    assert (rows["well"]["links"], rows["down"]["links"]["down"]) == ({"up": 1}, 1)
    assert rows["refused"]["links"]["refused"] == 1
    assert rows["well"]["objectives"]["1h"]["heartbeat_success"]["state"] == "met"
    assert rows["missing"]["objectives"]["24h"]["heartbeat_success"]["state"] == "missed"
    assert any("heartbeat" in route for route in rows["well"]["still_used"])
    assert rows["well"]["removable"] is False
    texts = {(each["cluster"], each["text"].partition(":")[0]) for each in data["reasons"]}
    assert ("failing", "there is no way back by HTTP") in texts
    assert ("missing", "heartbeat success missed over 1 h") in texts
    # The exit code is the verdict in every form of the report.
    assert [form[0] for form in forms] == [2, 2]
    assert ("Go back: " in forms[0][1], forms[1][1].startswith("<!doctype html>")) == (True, True)
    assert step[0] == 2
    assert {line.rpartition("=")[2] for line in step[1].splitlines()} - {"down"} == {"unknown", "missing", "refused"}
    assert "does not serve failing" in step[2]


async def test_a_step_is_taken_and_its_day_begins_anew(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path) as (_, controller), AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, http, controller, stack)
        health = await fleet.add("well", INSIDE[0])
        await health.until("all_well")
        await measured(http, fleet.shims["well"])
        path = kubectl.install(tmp_path, contexts_of(fleet.shims))
        args = ("--contexts", "well")
        code, before, _ = await report(*args, path=path)
        assert (code, before["until"] - before["since"]) == (1, 86_400)
        code, out, _ = await rollout("step", *args, path=path)
        assert (code, out) == (1, "")
        code, out, _ = await rollout("step", *args, "--observe", "0", path=path)
        assert (code, yaml.safe_load(out)) == (0, {"config": {"mode": "websocket", "rollout": {"percent": 50}}})
        fleet.shims["well"].write(yaml.safe_load(out)["config"])
        await fleet.shims["well"].event("config_reloaded")
        _, after, rows = await report(*args, path=path)
        assert (rows["well"]["percent"], after["since"] > before["since"]) == (50, True)


async def test_contexts_that_do_not_answer_as_they_should(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {**CALM, "rollout": {"percent": 100}}) as (shim, _):
        await shim.start()
        agent = Agent(http, shim, "prod")
        await agent.register()
        async with agent:
            health = Health(http, shim)
            await health.until("all_well")
            async with http.get(f"{shim.admin}/status.json") as response:
                status = await response.json()
            ancient = {key: value for key, value in status.items() if key not in ("objectives", "rollout")}
            good = ["status", "--url", shim.admin, "--json"]
            one = [kubectl.pod("agent-1")]
            forbidden = 'Error from server (Forbidden): pods is forbidden: User "ci" cannot list resource "pods"\n'
            noise = "Defaulted container\nError: no answer from the admin port\ncommand terminated with exit code 1\n"
            away = 'E1130 03:25:55 memcache.go:265] "Unhandled Error"\nThe connection to the server a:1 was refused\n'
            contexts: dict[str, Any] = {
                "good": {"pods": one, "exec": {"agent-1": good}},
                "forbidden": {"pods": {"stderr": forbidden, "code": 1}},
                "no-exec": {"pods": one, "exec": {"agent-1": {"stderr": forbidden, "code": 1}}},
                "dead": {"pods": one, "exec": {"agent-1": {"stderr": noise, "code": 1}}},
                "half": {"pods": one, "exec": {"agent-1": {"stdout": json.dumps(status)[:500]}}},
                "half-list": {"pods": {"stdout": '{"kind": "List", "items": [{"meta'}},
                "odd-list": {"pods": {"stdout": '{"kind": "List"}'}},
                "odd-pods": {"pods": {"stdout": '{"kind": "List", "items": [{"metadata": 3, "spec": [1]}]}'}},
                "ancient": {"pods": one, "exec": {"agent-1": {"stdout": json.dumps({**ancient, "version": "0.0.1"})}}},
                "stranger": {"pods": one, "exec": {"agent-1": {"stdout": "[1, 2]"}}},
                "bare": {"pods": [kubectl.pod("agent-1", "agent")]},
                "empty": {"pods": []},
                "slow": {"pods": {"sleep": str(tmp_path / "pid")}},
                "away": {"pods": {"stderr": away, "code": 1}},
                "two": {
                    "pods": [kubectl.pod("agent-1"), kubectl.pod("agent-2")],
                    "exec": {"agent-1": good, "agent-2": {"stderr": "error: container not running\n", "code": 1}},
                },
            }
            path = kubectl.install(tmp_path, contexts)
            args = ("--contexts", ",".join([*contexts, "nowhere", "good"]), "--timeout", "45", "--observe", "0")
            code, data, rows = await report(*args, path=path)
    assert (code, data["verdict"], data["go_back"], list(rows)) == (1, "wait", [], [*contexts, "nowhere"])
    expected = {
        "forbidden": "cannot list resource",
        "no-exec": "agent-1: Error from server (Forbidden)",
        "dead": "agent-1: Error: no answer from the admin port",
        "half": "agent-1: the answer is no JSON",
        "half-list": "not what `kubectl get pods",
        "odd-list": "not what `kubectl get pods",
        "odd-pods": "not what `kubectl get pods",
        "ancient": "agent-1: version 0.0.1 is too old for this report",
        "stranger": "agent-1: the answer is no shim's status",
        "bare": "no pod with a container agent-shim",
        "empty": "no pod with a container agent-shim",
        "slow": "kubectl get did not end within 45 s",
        "away": "The connection to the server a:1 was refused",
        "two": "agent-2: error: container not running",
        "nowhere": 'context "nowhere" does not exist',
    }
    for name, text in expected.items():
        assert text in rows[name]["gaps"][0], name
        assert rows[name]["removable"] is None
    assert rows["good"]["gaps"] == []
    assert rows["good"]["notes"] == ["given more than once, asked once"]
    assert rows["two"]["shims"] == 1
    assert "there is no sidecar" in rows["bare"]["sidecar_faults"][0]
    await gone(int((tmp_path / "pid").read_text()))
    held = {each["cluster"] for each in data["reasons"] if each["decision"] == "wait"}
    assert held == {*expected}


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def gone(pid: int) -> None:
    """Wait until a process has ended; nobody may have asked for its exit code."""
    async with asyncio.timeout(WAIT_S):
        while _runs(pid):  # noqa: ASYNC110 - no child of ours, so there is no event
            await asyncio.sleep(0.1)


async def test_admin_ports_of_a_file(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.5)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            pass

    token = tmp_path / "admin-token"
    token.write_text(ADMIN_TOKEN)
    config = {**CALM, "admin": {"port": 0, "token_file": str(token)}}
    async with world(tmp_path, config) as (shim, _), tcp_server(drip) as dripping, tcp_server(hang) as silent:
        await shim.start()
        agent = Agent(http, shim, "prod")
        await agent.register()
        async with agent, aiohttp.ClientSession(headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}) as admin:
            await Health(admin, shim).until("all_well")
            (tmp_path / "wrong-token").write_text("another")
            secret = "http://operator:s3cret@127.0.0.1:1"
            lines = [
                f"good {shim.admin} {token}",
                f"good {shim.admin} {token}",
                f"wrong {shim.admin} {tmp_path / 'wrong-token'}",
                f"no-file {shim.admin} {tmp_path / 'gone'}",
                "dead http://127.0.0.1:1",
                "https https://127.0.0.1:7090",
                f"long {shim.admin} a b c",
                f"user {secret}",
                f"slow http://127.0.0.1:{dripping}",
                f"hung http://127.0.0.1:{silent}",
                f"stranger {shim.url}",
                shim.admin,
                f"below {shim.admin}/good {token}",
            ]
            path = tmp_path / "urls"
            path.write_text("\r\n".join(["", *lines, ""]))
            names = tmp_path / "names"
            names.write_text("good\nnever-heard-of\n")
            args = ("--urls", str(path), "--expect", str(names), "--timeout", "20", "--observe", "0")
            code, data, rows = await report(*args)
            good = await report("--urls", str(path), "--observe", "0", "--token-file", str(token))
            text = (await rollout("report", *args))[1]
    assert (code, data["verdict"]) == (1, "wait")
    expected = {
        "wrong": "token",
        "no-file": f"the token file {tmp_path / 'gone'}: cannot be read",
        "dead": "no answer from the admin port 127.0.0.1:1",
        "https": "expected http://host:port",
        "long": "not `NAME URL [TOKEN-FILE]`",
        "user": "the URL has a user",
        "slow": f"127.0.0.1:{dripping} (timed out",
        "hung": f"127.0.0.1:{silent} (timed out",
        "stranger": "",
        "never-heard-of": "expected, and not seen",
        shim.admin.removeprefix("http://"): "or give --token-file",
        "below": f"{shim.admin}/good: expected http://host:port",
    }
    assert set(rows) == {"good", *expected}
    for name, part in expected.items():
        assert part in rows[name]["gaps"][0], name
        assert not rows[name]["shims"]
    assert (rows["good"]["gaps"], rows["good"]["shims"]) == ([], 1)
    # A line with another cluster's address must not pass for a cluster that was seen.
    assert "is that of good" in good[2][shim.admin.removeprefix("http://")]["gaps"][0]
    assert ADMIN_TOKEN not in text
    assert "s3cret" not in text


async def test_names_by_contexts_and_by_kubeconfig_files(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with world(tmp_path, {**CALM, "rollout": {"percent": 10}}) as (shim, controller):
        shim.write({"fallback": {"url": controller.url}})
        await shim.start()
        for name in (INSIDE[0], OUTSIDE):
            assert await Agent(http, shim, name).register() == 200
        pods = {"pods": [kubectl.pod("agent-1", namespace="elsewhere")]}
        good = {**pods, "exec": {"agent-1": ["status", "--url", shim.admin, "--json"]}}
        path = kubectl.install(tmp_path, {"arn:aws:eks/prod": good, "prod-eu": good, "dead": {"pods": []}})
        args = ("--contexts", "arn:aws:eks/prod, dead", "--namespace", "all")
        code, out, _ = await rollout("preview", *args, "--json", path=path)
        found = {each["cluster"]: each for each in json.loads(out)}
        assert code == 1  # one of them is not known
        assert {name: each["steps"]["10"] for name, each in found.items() if name} == {INSIDE[0]: True, OUTSIDE: False}
        assert found[""]["context"] == "dead"
        assert "no pod with a container agent-shim in any namespace" in found[""]["problem"]
        (tmp_path / "kube").mkdir()
        for name in ("prod-eu.yaml", "gone.yaml"):
            (tmp_path / "kube" / name).write_text("apiVersion: v1\n")
        code, _, rows = await report("--kubeconfig-glob", str(tmp_path / "kube" / "*.yaml"), path=path)
        assert (code, list(rows), rows["prod-eu"]["shims"], rows["prod-eu"]["canary"]) == (
            *(1, ["gone", "prod-eu"], 1, "part"),
        )


@pytest.mark.parametrize(
    "args, expected",
    [
        ((), "give one of --contexts"),
        (("--contexts", "a", "--urls", "b"), "give one of --contexts"),
        (("--prometheus", "localhost:9090"), "expected http(s)://"),
        (("--prometheus", "http://127.0.0.1:1", "--cluster-label", "a-b"), "is no label's name"),
        (("--contexts", "a", "--parallel", "0"), "not in the range"),
    ],
)
async def test_faults_on_the_command_line_are_no_verdict(args: tuple[str, ...], expected: str) -> None:
    for command in ("report", "step"):
        code, out, err = await rollout(command, *args)
        assert (code, out) == (64, "")
        assert expected in err


async def test_lists_without_a_name_are_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    for args in (
        ("--urls", str(tmp_path / "empty")),
        ("--kubeconfig-glob", str(tmp_path / "*.none")),
        ("--contexts", ","),
        ("--contexts", "a", "--expect", str(tmp_path / "empty")),
    ):
        code, out, err = await rollout("report", *args)
        assert (code, out) == (64, "")
        assert "names no cluster" in err
    code, _, rows = await report("--contexts", "a", path=str(tmp_path))
    assert code == 1
    assert "kubectl cannot be run" in rows["a"]["gaps"][0]
