"""Rendering: every reply that can be rendered is one that every generation decodes.

Rules: docs/reference/protocol.md#11-register, #12-heartbeat-status-results-the-short-answers, #13-poll,
#14-adoption, #15-tunnel-poll.
"""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.agent_calls import (
    Accepted,
    Commands,
    Failed,
    Healthy,
    OfferedCommand,
    Outcome,
    Registered,
    TunnelInfo,
    TunnelState,
)
from shim.protocol import dialects
from shim.protocol.dialects import Call, Reply, error_reply
from tests.support.generations import ALL, Generation, Reading, Verdict, Who
from tests.support.outcomes import COMMANDS, FAILURES, REGISTERED, TUNNELS

DIALECTS = {dialect.NAME: dialect for dialect in dialects.load()}
GO = "Go-http-client/1.1"

WHO = Who()


def render(generation: Generation, operation: str, outcome: Outcome) -> Reply:
    name = "common" if operation in ("health", "tunnel_poll") else generation.dialect
    agent = generation.request(operation, WHO).user_agent
    return DIALECTS[name].render(operation, outcome, Call({}, None, agent))


def raw(reply: Reply) -> bytes:
    return b"" if reply.body is None else msgspec.json.encode(reply.body)


def readings(operation: str, outcome: Outcome) -> dict[str, Reading]:
    """What each generation that makes this call reads of our answer."""
    found = {}
    for generation in ALL:
        if operation in generation.routes:
            reply = render(generation, operation, outcome)
            found[generation.label] = generation.read(operation, reply.status, raw(reply))
    assert found
    return found


@given(REGISTERED)
def test_every_generation_takes_every_registration(outcome: Registered) -> None:
    for label, reading in readings("register", outcome).items():
        assert reading.verdict is Verdict.CONTENT, reading.reason
        assert reading.value == (None if label.startswith("A") else outcome.cluster_id)


@given(COMMANDS)
def test_every_generation_takes_every_batch(outcome: Commands) -> None:
    for reading in readings("poll", outcome).values():
        assert reading.verdict is Verdict.CONTENT, reading.reason
        assert [(c["id"], c["type"]) for c in reading.value] == [(c.id, c.type) for c in outcome.commands]


@given(TUNNELS)
def test_every_generation_takes_every_tunnel_state(outcome: TunnelState) -> None:
    for reading in readings("tunnel_poll", outcome).values():
        assert reading.verdict is Verdict.CONTENT, reading.reason
        assert reading.value["poll_frequency"] >= 1


@given(REGISTERED)
def test_the_guides_client_takes_every_tunnel_info(known: Registered) -> None:
    for reading in readings("tunnel_info", TunnelInfo(known)).values():
        assert reading.verdict is Verdict.CONTENT, reading.reason
        assert (reading.value["success"], reading.value["cluster_id"]) == (True, known.cluster_id)


@pytest.mark.parametrize("operation", ["heartbeat", "status", "result", "health"])
def test_every_generation_takes_the_short_answers(operation: str) -> None:
    outcome = Healthy() if operation == "health" else Accepted()
    assert {reading.verdict for reading in readings(operation, outcome).values()} == {Verdict.CONTENT}


@given(st.sampled_from(["register", "heartbeat", "status", "poll", "result", "tunnel_poll", "tunnel_info"]), FAILURES)
def test_a_failure_is_never_taken_for_a_broken_success(operation: str, failed: Failed) -> None:
    for label, reading in readings(operation, failed).items():
        conflict = operation == "register" and failed.status == 409 and failed.cluster_id and not label.startswith("A")
        assert reading.verdict is (Verdict.CONTENT if conflict else Verdict.REFUSED)
        if conflict:
            assert reading.value == failed.cluster_id


def test_a_conflict_with_an_id_that_agents_cannot_use_stays_a_failure() -> None:
    for reading in readings("register", Failed(409, "conflict", cluster_id="a/b")).values():
        assert reading.verdict is Verdict.REFUSED


@given(FAILURES)
def test_errors_have_one_shape(failed: Failed) -> None:
    reply = error_reply(failed)
    ids = {"cluster_id": failed.cluster_id, "cluster": {"id": failed.cluster_id}} if failed.cluster_id else {}
    assert reply == Reply(failed.status, {"success": False, "error": failed.error} | ids, failed.retry_after_s)


def test_go_clients_get_no_body_and_others_a_word() -> None:
    dialect = DIALECTS["clusters_agent"]
    assert dialect.render("heartbeat", Accepted(), Call({}, None, GO)) == Reply(204)
    for agent in ("", "curl/8.5.0", "PipeOps-Agent/1.0"):
        assert dialect.render("heartbeat", Accepted(), Call({}, None, agent)) == Reply(200, {"success": True})


def test_a_registration_says_all_that_is_known() -> None:
    known = Registered(
        cluster_id="c-1",
        cluster_uuid="u-1",
        name="prod",
        agent_id="a-1",
        tunnel_url="https://t",
        api_server="https://s",
        workspace_id=12,
        registered_at="2025-10-16T12:00:00Z",
    )
    reply = DIALECTS["agents"].render("register", known, Call({}))
    assert reply.status == 200
    assert reply.body == {
        "success": True,
        "message": "registered",
        "cluster_id": "c-1",
        "cluster_uuid": "u-1",
        "name": "prod",
        "status": "registered",
        "tunnel_url": "https://t",
        "api_server": "https://s",
        "cluster": {
            "id": "c-1",
            "uuid": "u-1",
            "name": "prod",
            "status": "registered",
            "agent_id": "a-1",
            "workspace_id": 12,
            "registered_at": "2025-10-16T12:00:00Z",
        },
        "data": {
            "cluster_id": "c-1",
            "status": "registered",
            "tunnel_url": "https://t",
            "registered_at": "2025-10-16T12:00:00Z",
        },
    }


def body_of(outcome: Outcome, operation: str, dialect: str = "clusters_agent") -> dict[str, Any]:
    reply = DIALECTS[dialect].render(operation, outcome, Call({}))
    assert reply.body is not None
    return reply.body


def test_a_cached_registration_says_so() -> None:
    assert "(cached)" in body_of(Registered("c", "c", "n", "a", cached=True), "register")["message"]
    assert "(cached)" not in body_of(Registered("c", "c", "n", "a"), "register")["message"]


@pytest.mark.parametrize("cluster_id", ["", ".", "..", "a/b", "a b", "a%2f", "a?b", "a#b", "ü", "c-1\n", "x" * 257])
def test_an_id_that_agents_cannot_use_is_no_success(cluster_id: str) -> None:
    reply = DIALECTS["clusters_agent"].render("register", Registered(cluster_id, "u", "n", "a"), Call({}))
    assert reply.status == 502
    assert reply.body is not None
    assert reply.body["success"] is False


def test_an_integral_workspace_id_is_written_as_an_integer() -> None:
    known = Registered("c", "c", "n", "a", workspace_id=12.0)  # type: ignore[arg-type]
    assert repr(body_of(known, "register")["cluster"]["workspace_id"]) == "12"


def test_integers_that_go_cannot_hold_are_left_out() -> None:
    known = Registered("c", "c", "n", "a", workspace_id=2**63)
    assert "workspace_id" not in body_of(known, "register")["cluster"]
    state = {"poll_frequency": 2**63, "forwards": [{"name": "a", "remote_port": -(2**63) - 1}]}
    shown = body_of(TunnelState(state, 5), "tunnel_poll", "common")
    assert shown == {"status": "IDLE", "poll_frequency": 5, "forwards": []}


def test_a_poll_is_the_superset() -> None:
    command = OfferedCommand("cmd-1", "scale", {"replicas": 3}, "2025-10-08T00:00:00Z")
    expected = {"id": "cmd-1", "type": "scale", "payload": {"replicas": 3}, "created_at": "2025-10-08T00:00:00Z"}
    for dialect in ("agents", "clusters_agent"):
        assert body_of(Commands((command,), 5), "poll", dialect) == {
            "success": True,
            "commands": [expected],
            "status": "IDLE",
            "poll_frequency": 5,
        }
    assert body_of(Commands((), 30), "poll")["commands"] == []


@pytest.mark.parametrize("payload", [None, {}])
def test_a_tunnel_poll_is_idle_by_default(payload: dict[str, Any] | None) -> None:
    assert body_of(TunnelState(payload, 5), "tunnel_poll", "common") == {"status": "IDLE", "poll_frequency": 5}


def test_a_tunnel_state_is_passed_on() -> None:
    state = {
        "status": "REQUIRED",
        "forwards": [{"name": "kubernetes_api", "remote_port": 30001}],
        "credentials": "dXNlcjpwYXNz",
        "poll_frequency": 10,
        "tunnel_server_addr": "wss://t",
        "server_fingerprint": "fp",
    }
    assert body_of(TunnelState(state, 5), "tunnel_poll", "common") == state


def test_what_agents_could_not_decode_of_a_tunnel_state_is_left_out() -> None:
    state = {
        "status": 1,
        "forwards": [{"name": "a", "remote_port": 1.0}, {"name": "b", "remote_port": "2"}, {"remote_port": 3}, "x"],
        "credentials": None,
        "poll_frequency": 0,
        "Status": 7,
    }
    shown = body_of(TunnelState(state, 5), "tunnel_poll", "common")
    assert shown == {"status": "IDLE", "poll_frequency": 5, "forwards": [{"name": "a", "remote_port": 1}]}
    assert isinstance(shown["forwards"][0]["remote_port"], int)
