"""The recorded calls of real clients: each parses to exactly this call, and each recorded answer is a good one.

`tests/fixtures/*.jsonl` were recorded from the vendor's agents at f1473b7 (A), 40acdc9 (B7) and 51845ae (WebSocket).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from shim.agent_api.admission import Router
from shim.core.agent_calls import (
    Accepted,
    AgentCall,
    Commands,
    HealthCall,
    Healthy,
    HeartbeatCall,
    OfferedCommand,
    Outcome,
    PollCall,
    RegisterCall,
    Registered,
    ResultCall,
    SessionTarget,
    StatusCall,
    TargetKind,
    TunnelPollCall,
    TunnelState,
)
from shim.protocol import dialects
from shim.protocol.dialects import Call, Match
from tests.support.generations import ALL, Verdict

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROUTER = Router(dialects.load())
BY_LABEL = {generation.label: generation for generation in ALL}

A = SessionTarget(TargetKind.AGENT, "agent-a")
B_VERSION = "v1.2.3"
EXPECTED: dict[tuple[str, str], AgentCall] = {
    ("common", "health"): HealthCall(),
    ("common", "tunnel_poll"): TunnelPollCall(SessionTarget(TargetKind.ALIAS, "agent-b")),
    ("agents", "register"): RegisterCall(
        dialect="agents",
        agent_id="agent-a",
        name="prod-cluster",
        payload={
            "agent_id": "agent-a",
            "name": "prod-cluster",
            "agent_version": "1.28.3",
            "labels": {"env": "prod"},
        },
        known_by_agent=True,
    ),
    ("agents", "heartbeat"): HeartbeatCall(
        dialect="agents",
        target=A,
        agent_id="agent-a",
        status="healthy",
        tunnel_status="disconnected",
        payload={"metadata": {"version": "1.0.0"}},
        known={"name": "prod-cluster", "agent_version": "1.0.0"},
    ),
    ("agents", "status"): StatusCall(
        dialect="agents",
        target=A,
        body={
            "nodes": None,
            "namespaces": None,
            "deployments": None,
            "services": None,
            "pods": None,
            "metrics": {"cpu_usage": 0, "memory_usage": 0, "pod_count": 0, "node_count": 0},
            "timestamp": "TIMESTAMP",
        },
    ),
    ("agents", "poll"): PollCall("agents", A),
    ("agents", "result"): ResultCall(
        "agents", A, "cmd-1", {"success": True, "output": "done scale", "timestamp": "TIMESTAMP"}
    ),
    ("clusters_agent", "register"): RegisterCall(
        dialect="clusters_agent",
        agent_id="agent-b",
        name="prod-cluster",
        payload={
            "agent_id": "agent-b",
            "name": "prod-cluster",
            "k8s_version": "v1.28.3+k3s1",
            "hostname": "node-1",
            "agent_version": B_VERSION,
            "server_ip": "10.0.0.7",
            "region": "agent-managed",
            "cloud_provider": "agent",
            "tunnel_port_config": {"kubernetes_api": 6443, "kubelet": 10250, "agent_http": 8080},
            "server_specs": {"cpu_cores": 4, "memory_gb": 16, "disk_gb": 100, "os": "linux"},
            "metadata": {"agent_mode": "vm-agent", "registration_timestamp": "2026-11-23T05:08:14Z"},
            "labels": {"agent.pipeops.io/version": B_VERSION, "hostname": "node-1"},
        },
        secret="sa-token",
    ),
    ("clusters_agent", "heartbeat"): HeartbeatCall(
        dialect="clusters_agent",
        target=SessionTarget(TargetKind.CLUSTER, "c-1"),
        agent_id="agent-b",
        status="healthy",
        tunnel_status="connected",
        payload={
            "metadata": {
                "cpu_usage": "0%",
                "k8s_nodes": 3,
                "k8s_pods": 25,
                "memory_usage": "0%",
                "version": B_VERSION,
            }
        },
        known={"agent_version": B_VERSION},
    ),
}
ANSWERS: dict[str, Outcome] = {
    "health": Healthy(),
    "register": Registered("c-1", "c-1", "prod-cluster", "agent-a", workspace_id=12),
    "heartbeat": Accepted(),
    "status": Accepted(),
    "result": Accepted(),
    "poll": Commands((OfferedCommand("cmd-1", "scale", {"replicas": 3}, "2025-10-08T00:00:00Z"),), 5),
    "tunnel_poll": TunnelState(None, 5),
}


def recorded(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / file).read_text().splitlines()]


def calls() -> list[Any]:
    return [
        pytest.param(label, call, id=f"{label}-{at}-{call['method']}-{call['path']}")
        for label, file in (("A1", "legacy-agents-v1.jsonl"), ("B7", "legacy-clusters-agent-v1.jsonl"))
        for at, call in enumerate(recorded(file))
    ]


def read(recording: dict[str, Any]) -> tuple[Match, Call]:
    match = ROUTER.match(recording["method"], recording["path"])
    headers = dict(recording["headers"])
    body = json.loads(recording["body"]) if recording["body"] else None
    return match, Call(match.params, body, headers["User-Agent"])


@pytest.mark.parametrize("label, recording", calls())
def test_a_recorded_call_is_exactly_this_call(label: str, recording: dict[str, Any]) -> None:
    match, call = read(recording)
    expected = EXPECTED[match.dialect.NAME, match.route.operation]
    sent = call.body or {}
    if isinstance(expected, (StatusCall, ResultCall)):  # their timestamp is passed on as it came
        assert expected.body["timestamp"] == "TIMESTAMP"
        expected = type(expected)(**{**fields_of(expected), "body": expected.body | {"timestamp": sent["timestamp"]}})
    assert match.dialect.parse(match.route.operation, call) == expected


def fields_of(call: StatusCall | ResultCall) -> dict[str, Any]:
    return {name: getattr(call, name) for name in call.__slots__}


def test_every_operation_that_was_recorded_is_compared() -> None:
    seen = set()
    for param in calls():
        match, _ = read(param.values[1])
        seen.add((match.dialect.NAME, match.route.operation))
    assert seen == set(EXPECTED)


@pytest.mark.parametrize("label, recording", calls())
def test_the_recorded_client_takes_our_answer(label: str, recording: dict[str, Any]) -> None:
    match, call = read(recording)
    operation = match.route.operation
    reply = match.dialect.render(operation, ANSWERS[operation], call)
    raw = b"" if reply.body is None else json.dumps(reply.body).encode()
    assert BY_LABEL[label].read(operation, reply.status, raw).verdict is Verdict.CONTENT
    if isinstance(ANSWERS[operation], Accepted):
        assert (reply.status, raw) == (204, b"")  # anything else costs this client its connection


@pytest.mark.parametrize("label, recording", calls())
def test_the_decoders_agree_with_what_the_client_took(label: str, recording: dict[str, Any]) -> None:
    match, _ = read(recording)
    answer = recording["response"]
    raw = json.dumps(answer["body"]).encode()
    reading = BY_LABEL[label].read(match.route.operation, answer["status"], raw)
    assert reading.verdict is Verdict.CONTENT


def test_a_register_goes_up_as_the_websocket_client_sends_it() -> None:
    """Compare with the recorded register frame (docs/reference/legacy-agents.md#4-field-mapping-http-to-websocket)."""
    frame = next(json.loads(line["data"]) for line in recorded("websocket-agent.jsonl") if line["ws"] == "recv")
    assert frame["type"] == "register"
    match, call = read(recorded("legacy-clusters-agent-v1.jsonl")[1])
    register = match.dialect.parse(match.route.operation, call)
    assert isinstance(register, RegisterCall)
    sent = register.payload | {"k8s_service_token": register.secret}
    # two agents with two names, and only the HTTP client has a version label and metadata
    assert sent.pop("metadata")
    assert sent["labels"].pop("agent.pipeops.io/version") == B_VERSION
    assert sent | {"agent_id": "agent-ws"} == frame["payload"]


def test_a_heartbeat_goes_up_as_the_websocket_client_sends_it() -> None:
    frames = [json.loads(line["data"]) for line in recorded("websocket-agent.jsonl") if line["ws"] == "recv"]
    frame = next(frame for frame in frames if frame["type"] == "heartbeat")
    match, call = read(recorded("legacy-clusters-agent-v1.jsonl")[2])
    heartbeat = match.dialect.parse(match.route.operation, call)
    assert isinstance(heartbeat, HeartbeatCall)
    assert (heartbeat.status, heartbeat.tunnel_status) == (
        frame["payload"]["status"],
        frame["payload"]["tunnel_status"],
    )
    shared = frame["payload"]["metadata"]
    assert {key: heartbeat.payload["metadata"][key] for key in shared} == shared
