"""Traces of commands, as a collector gets them from the real process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.test_health import BASE, Agent
from tests.support.processes import TOKEN, world
from tests.support.recording_server import RecordingServer, http
from tests.support.sockets import tcp_server

pytest.importorskip("opentelemetry.sdk", reason="needs agent-shim[otel]")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.timeout(400)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def spans(server: RecordingServer) -> list[tuple[dict[str, Any], Any]]:
    """Every span that arrived, with the attributes of its resource."""
    found = []
    for call in server.calls:
        assert call.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(call.body).resource_spans:
            about = {each.key: each.value.string_value for each in resource.resource.attributes}
            found += [(about, span) for scope in resource.scope_spans for span in scope.spans]
    return found


async def test_a_command_is_one_trace_from_arrival_to_result(tmp_path: Path) -> None:
    async with RecordingServer(lambda call: http(200)) as server:
        settings = {"telemetry": {"otlp_url": f"{server.url}/v1/traces"}}
        async with world(tmp_path, settings) as (shim, controller), aiohttp.ClientSession(headers=HEADERS) as session:
            shim.environment |= {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_RESOURCE_ATTRIBUTES": "cluster=prod-eu"}
            await shim.start()
            agent = Agent(session, shim)
            await agent.register()
            await controller.api.push({"id": "k1", "cluster_id": agent.cluster_id})
            await shim.event("command_queued")
            assert await agent.poll() == ["k1"]
            body = {"success": True, "output": "hunter2"}
            assert (await agent.call("POST", f"{BASE}/{agent.cluster_id}/commands/k1/result", body))[0] == 200
            async with agent:  # an acknowledged heartbeat confirms the result
                await server.until(lambda: any(span.name == "command" for _, span in spans(server)))
            assert await shim.stop() == 0
        found = {span.name: span for _, span in spans(server)}
        ((about, _), *_) = spans(server)
        assert (about["service.name"], about["cluster"]) == ("agent-shim", "prod-eu")
        root = found["command"]
        attributes = {each.key: each.value.string_value for each in root.attributes}
        assert attributes["agent_shim.command.id"] == "k1"
        assert attributes["agent_shim.command.end"] == "closed"
        names = ("wait for the agent", "at the agent", "return the result")
        phases = [found[name] for name in names]
        assert all((span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id) for span in phases)
        ends = [root.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
        assert [span.start_time_unix_nano for span in phases] == ends[:-1]
        assert ends[-1] == root.end_time_unix_nano
        assert [event.name for event in root.events][:2] == ["arrived", "offered"]
        assert b"hunter2" not in b"".join(call.body for call in server.calls)


async def test_a_collector_that_hangs_delays_neither_commands_nor_the_stop(tmp_path: Path) -> None:
    async with tcp_server(lambda reader, writer: reader.read()) as port:
        settings = {"telemetry": {"otlp_url": f"http://127.0.0.1:{port}/v1/traces"}}
        async with world(tmp_path, settings) as (shim, controller), aiohttp.ClientSession(headers=HEADERS) as session:
            shim.environment |= {"OTEL_BSP_SCHEDULE_DELAY": "50"}
            await shim.start()
            agent = Agent(session, shim)
            await agent.register()
            for number in range(3):
                await controller.api.push({"id": f"k{number}", "cluster_id": agent.cluster_id})
                await controller.until(number + 1, type="command")
            polled: list[str] = []
            while len(polled) < 3:
                polled += await agent.poll()
            assert polled == ["k0", "k1", "k2"]
            assert await shim.stop() == 0  # bounded by the harness and by the shim's own limit


async def test_a_collector_that_is_away_is_one_event_of_the_log_without_the_query(tmp_path: Path) -> None:
    with socket.socket() as bound:  # it does not listen, so a connection is refused
        bound.bind(("127.0.0.1", 0))
        settings = {"telemetry": {"otlp_url": f"http://127.0.0.1:{bound.getsockname()[1]}/v1/traces?api-key=hunter2"}}
        async with world(tmp_path, settings) as (shim, controller), aiohttp.ClientSession(headers=HEADERS) as session:
            shim.environment |= {"OTEL_BSP_SCHEDULE_DELAY": "50"}
            await shim.start()
            agent = Agent(session, shim)
            await agent.register()
            await controller.api.push({"id": "k1", "cluster_id": agent.cluster_id})
            assert await agent.poll() == ["k1"]
            line = await shim.event("traces_not_exported")
            assert await shim.stop() == 0
    assert "Connection refused" in line["reason"]
    assert "hunter2" not in "\n".join(shim.lines)
    assert all('"traces_not_exported"' in line for line in shim.lines if '"opentelemetry.exporter' in line)


async def test_without_the_extra_the_start_names_it(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    async with world(tmp_path, {"telemetry": {"otlp_url": "http://127.0.0.1:4318/v1/traces"}}) as (shim, _):
        shim.environment |= {"PYTHONPATH": str(tmp_path / "hidden")}
        await shim.launch()
        await shim.output("telemetry.otlp_url needs agent-shim[otel]")
        assert await shim.wait() == 70
