"""The report by one Prometheus: its queries, several real shims, and answers that are none."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from shim.cli.rollout.prometheus import QUERIES, WINDOW_QUERIES, WITHOUT_RESULT
from shim.core.failover import bucket
from tests.e2e.test_health import Agent, Health
from tests.support.processes import TOKEN, Shim, world
from tests.support.prometheus import prometheus
from tests.support.sockets import tcp_server

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference" / "rollout.md").read_text()
INSIDE = next(name for name in map("cluster-{}".format, range(999)) if bucket(name) < 10)
OUTSIDE = next(name for name in map("cluster-{}".format, range(999)) if bucket(name) > 50)
WAIT_S = 90.0

pytestmark = pytest.mark.timeout(400)


async def report(*args: str, **environ: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "rollout", "report", "--json", *args),
        env=os.environ | {"NO_PROXY": "127.0.0.1"} | environ,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_S * 2):
        out, _ = await process.communicate()
    data = json.loads(out)
    assert data["exit_code"] == process.returncode
    return data["exit_code"], data, {each["name"]: each for each in data["clusters"]}


def test_the_page_has_every_query() -> None:
    windowed = {name: f"sum by (CLUSTER) ({query})" for name, query in WINDOW_QUERIES.items()}
    queries = {**QUERIES, **windowed, "without result": WITHOUT_RESULT}
    assert dict(re.findall(r"^    # (.+)\n    (.+)$", PAGE, re.MULTILINE)) == queries


def configured(shim: Shim, url: str, percent: int, **more: Any) -> None:
    shim.write(
        {
            # A heartbeat is missed if none is acknowledged for so long: a busy machine must not make it so.
            "upstream": {"url": url, "token": TOKEN, "heartbeat_interval_s": 10},
            "poll": {"hold": "off"},
            "rollout": {"percent": percent},
            "fallback": {"url": url},
            **more,
        }
    )


@pytest.mark.needs("prometheus")
async def test_several_shims_in_one_prometheus(tmp_path: Path) -> None:
    for name in ("out", "over"):
        (tmp_path / name).mkdir()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        world(tmp_path) as (shim, controller),
        Shim(tmp_path / "out", {}) as other,
        Shim(tmp_path / "over", {}) as over,
    ):
        for each in (shim, other):
            configured(each, controller.url, 10)
            await each.start()
        configured(over, controller.url, 10, mode="http", sunset={"at": "2001-01-01"})
        await over.start()
        agents = Agent(http, shim, INSIDE), Agent(http, other, OUTSIDE)
        for agent in agents:
            assert await agent.register() == 200
        targets = {
            name: at.admin.removeprefix("http://")
            for name, at in (("agent-shim", shim), ("agent-shim-out", other), ("agent-shim-over", over))
        }
        targets |= {"agent-shim-dead": "127.0.0.1:1"}
        names = {"agent-shim": "well", "agent-shim-out": "out", "agent-shim-over": "over"}
        async with agents[0], agents[1], prometheus(tmp_path, targets, {}, names, "5s") as prom:
            await Health(http, shim).until("all_well")
            await prom.until_query('increase(agent_shim_agent_heartbeats_total{outcome="acked"}[1h]) > 5')
            await prom.until_query('agent_shim_agents_by_http{why="rollout"} > 0')
            expect = tmp_path / "names"
            expect.write_text("well\nout\nover\ngone\n")
            code, data, rows = await report("--prometheus", prom.url + "/", "--expect", str(expect), "--observe", "0")
            by_instance = (await report("--prometheus", prom.url, "--cluster-label", "instance"))[2]
            no_label = (await report("--prometheus", prom.url, "--cluster-label", "region"))[2]

            await controller.control("POST", "/control/faults", {"kind": "not_registered", "error": "quota exceeded"})
            await prom.until_query('agent_shim_health_problem{problem="heartbeats_refused"} > 0')
            ill = await report("--prometheus", prom.url)
            await shim.kill()
            await prom.until_query('up{job="agent-shim"} == 0')
            after = (await report("--prometheus", prom.url))[2]
    assert (code, data["verdict"], list(rows)) == (1, "wait", ["out", "over", "well", "gone"])
    assert rows["gone"]["gaps"] == ["expected, and not seen"]
    assert [(reason["cluster"], reason["text"]) for reason in data["reasons"]] == [
        ("over", "no agent calls its shim"),
        ("gone", "expected, and not seen"),
    ]
    assert (rows["well"]["canary"], rows["out"]["canary"], rows["well"]["percent"]) == ("in", "out", 10)
    assert rows["well"]["objectives"]["1h"]["heartbeat_success"]["state"] == "met"
    assert rows["well"]["links"] == {"up": 1}
    assert (rows["over"]["modes"], rows["over"]["canary"], rows["well"]["sunset_days"]) == (["http"], "empty", None), (
        "after the sunset there is no mode http"
    )
    assert any("heartbeat" in route for route in rows["well"]["still_used"])
    assert rows["well"]["removable"] is False
    assert set(by_instance) == set(targets.values()) - {targets["agent-shim-dead"]}
    assert any("--cluster-label" in gap for gap in no_label["(no label region)"]["gaps"])
    assert (ill[0], ill[1]["go_back"]) == (2, ["well"])
    assert "was seen in the last 24 h" in after["well"]["gaps"][-1]


@pytest.mark.needs("prometheus")
async def test_an_empty_prometheus(tmp_path: Path) -> None:
    async with prometheus(tmp_path, {}, {}) as prom:
        code, data, rows = await report("--prometheus", prom.url)
    assert (code, rows) == (1, {})
    assert "no series of a shim" in data["reasons"][0]["text"]


@asynccontextmanager
async def stand_in(answer: web.Response, asked: list[dict[str, Any]] | None = None) -> AsyncIterator[str]:
    """A server that gives one answer to every query."""

    async def handle(request: web.Request) -> web.Response:
        if asked is not None:
            asked.append(dict(await request.post()))
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "status, body, headers, expected",
    [
        (200, "<html>", {}, "something else than Prometheus' query API"),
        (200, '{"status": "success", "data": {"result": [3]}}', {}, "something else than"),
        (200, '{"data": {"result": []}, "warnings": ["store down"]}', {}, "Prometheus warns: store down"),
        (401, "Unauthorized", {}, "answers 401: not what a Prometheus answers"),
        (422, '{"status": "error", "error": "too many samples"}', {}, "answers 422: too many samples"),
        (302, "", {"Location": "http://127.0.0.1:1/login"}, "answers 302"),
    ],
)
async def test_what_is_no_answer(status: int, body: str, headers: dict[str, str], expected: str) -> None:
    async with stand_in(web.Response(status=status, text=body, headers=headers)) as address:
        code, data, rows = await report("--prometheus", f"http://user:s3cret@{address}/prom")
    assert (code, rows) == (1, {})
    assert any(expected in reason["text"] for reason in data["reasons"])
    assert "s3cret" not in json.dumps(data)


async def test_all_queries_are_evaluated_at_the_same_time() -> None:
    """One second between the good heartbeats and all of them would be a heartbeat that is missing."""
    sample = {"metric": {}, "value": [1_780_000_000, "1780000000.25"]}
    asked: list[dict[str, Any]] = []
    async with stand_in(web.Response(text=json.dumps({"data": {"result": [sample]}})), asked) as address:
        await report("--prometheus", f"http://{address}")
    assert asked[0] == {"query": "vector(time())"}
    assert {each.get("time") for each in asked[1:]} == {"1780000000.250"}


async def test_an_answer_through_a_proxy_of_the_environment_names_it() -> None:
    async with stand_in(web.Response(status=503, text="no route")) as address:
        proxy = {"http_proxy": f"http://user:s3cret@{address}", "no_proxy": "", "NO_PROXY": ""}
        code, data, _ = await report("--prometheus", "http://prom.test", **proxy)
        near = await report("--prometheus", "http://127.0.0.1:1", **proxy)
        without_scheme = await report("--prometheus", "http://prom.test", **proxy | {"http_proxy": address})
        direct = await report("--prometheus", "http://prom.test:1", **proxy | {"no_proxy": "prom.test:1"})
    where = f"http://prom.test (through http://{address}, the proxy of the environment)"
    assert (code, data["reasons"][0]["text"]) == (1, f"{where} answers 503: not what a Prometheus answers")
    # Loopback is not proxied, as for the shim's own connections.
    assert near[1]["reasons"][0]["text"] == "http://127.0.0.1:1 does not answer: Connection refused"
    assert without_scheme[1]["reasons"][0]["text"].startswith(f"{where} answers 503")
    assert direct[1]["reasons"][0]["text"].startswith("http://prom.test:1 does not answer: ")
    assert "s3cret" not in json.dumps(data)


async def test_a_port_where_nobody_listens_and_one_that_never_answers() -> None:
    code, data, _ = await report("--prometheus", "http://127.0.0.1:1")
    assert (code, data["reasons"][0]["text"]) == (1, "http://127.0.0.1:1 does not answer: Connection refused")

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            pass

    async with tcp_server(silent) as port:
        code, data, _ = await report("--prometheus", f"http://127.0.0.1:{port}", "--timeout", "2")
    assert (code, "does not answer: timed out" in data["reasons"][0]["text"]) == (1, True)
