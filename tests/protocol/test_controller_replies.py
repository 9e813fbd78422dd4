"""What the controller answers is read with suspicion.

Rules: docs/reference/protocol.md#11-register, #14-adoption, #15-tunnel-poll.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol.controller_replies import (
    LEFTOVER_TYPES,
    REASON,
    REFUSED_TYPES,
    conflict_reply,
    error_status,
    error_text,
    forgotten,
    refuse,
    register_reply,
    tunnel_state,
    url_safe_id,
)


@pytest.mark.parametrize(
    "payload, status",
    [
        ({"error": "Unauthorized"}, 401),
        ({"error": "INVALID TOKEN given"}, 401),
        ({"error": "access Forbidden: missing scope"}, 401),
        ({"error": "invalid token: required"}, 401),
        ({"error": "cluster already registered"}, 409),
        ({"error": "name conflict"}, 409),
        ({"error": "name is not unique"}, 409),
        ({"error": "invalid: already there"}, 409),
        ({"error": "name is required"}, 400),
        ({"error": "Invalid name"}, 400),
        ({"error": "missing agent_id"}, 400),
        ({"error": "validation failed"}, 400),
        ({"error": "the database is on fire"}, 502),
        ({"error": ""}, 502),
        ({}, 502),
        ({"error": {"nested": "unauthorized"}}, 502),
        ({"message": "unauthorized"}, 401),
        ({"error": "unauthorized", "code": 500}, 502),
        ({"error": "boom", "code": 401}, 401),
        ({"error": "boom", "code": 403}, 401),
        ({"error": "boom", "code": 409}, 409),
        ({"error": "boom", "code": 422.0}, 400),
        ({"error": "boom", "code": "400"}, 400),
        ({"error": "boom", "code": "503"}, 502),
        ({"error": "boom", "code": "INVALID_TOKEN"}, 401),
        ({"error": "boom", "code": "name-conflict"}, 409),
        ({"error": "unauthorized", "code": "E42"}, 502),
        ({"error": "unauthorized", "code": 0}, 401),
        ({"error": "unauthorized", "code": ""}, 401),
        ({"error": "unauthorized", "code": None}, 401),
        ({"error": "unauthorized", "code": True}, 401),
    ],
)
def test_error_status(payload: dict[str, Any], status: int) -> None:
    assert error_status(payload) == status


def test_error_text_is_short_and_printable() -> None:
    assert error_text({"error": "a\nb\x00c"}) == "a b c"
    assert len(error_text({"error": "x" * 5000})) == 200


@pytest.mark.parametrize(
    "text, known",
    [("Cluster not registered", True), ("CLUSTER NOT FOUND: c-1", True), ("not found", False), ("registered", False)],
)
def test_forgotten(text: str, known: bool) -> None:
    assert forgotten({"error": text}) is known


@pytest.mark.parametrize(
    "payload, found",
    [
        ({"cluster_id": "c-1"}, "c-1"),
        ({"cluster": {"id": "c-2"}}, "c-2"),
        ({"cluster_id": "a/b", "cluster": {"id": "c-2"}}, "c-2"),
        ({"cluster": "c-3"}, ""),
        ({}, ""),
    ],
)
def test_the_id_of_a_conflict(payload: dict[str, Any], found: str) -> None:
    assert conflict_reply(payload).get("cluster_id", "") == found


def test_a_conflict_tells_of_the_cluster_and_its_status_is_not_the_clusters() -> None:
    told = {"error": "already", "status": "conflict", "cluster": {"id": "c-2", "uuid": "u-2", "name": "prod"}}
    assert conflict_reply(told) == {"cluster_id": "c-2", "cluster_uuid": "u-2", "name": "prod"}


@pytest.mark.parametrize("value", ["c-1", "A.b_c~9", "a:b@c", "..."])
def test_ids_that_may_stand_in_a_path(value: str) -> None:
    assert url_safe_id(value) == value
    assert url_safe_id(42) == "42"


@pytest.mark.parametrize("value", ["", ".", "..", "a b", "a/b", "a%2f", "ü", "x" * 257, None, True, 1.5, ["a"], "a\n"])
def test_ids_that_may_not(value: Any) -> None:
    assert url_safe_id(value) == ""


def test_register_reply_passes_on_what_agents_may_see() -> None:
    said = {
        "cluster_id": "c-1",
        "cluster_uuid": "u-1",
        "name": "prod",
        "status": "active",
        "tunnel_url": "https://t",
        "api_server": "https://a",
        "workspace_id": 7.0,
        "registered_at": "2026-11-24T21:28:03Z",
        "token": "secret",
        "gateway_ws_url": "wss://g",
    }
    assert register_reply(said) == {
        "cluster_id": "c-1",
        "cluster_uuid": "u-1",
        "name": "prod",
        "status": "active",
        "tunnel_url": "https://t",
        "api_server": "https://a",
        "workspace_id": 7,
        "registered_at": "2026-11-24T21:28:03Z",
    }


def test_register_reply_without_a_usable_id_is_none() -> None:
    assert register_reply({"cluster_uuid": "u-1"}) == {}
    assert register_reply({"cluster_id": "../x"}) == {}


@given(
    st.dictionaries(
        st.sampled_from(
            ["cluster_uuid", "name", "status", "tunnel_url", "api_server", "workspace_id", "registered_at"]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.just({}),
    )
)
def test_register_reply_has_exact_types(payload: dict[str, Any]) -> None:
    reply = register_reply({"cluster_id": "c-1", **payload})
    assert reply["cluster_id"] == "c-1"
    for key, value in reply.items():
        assert type(value) is (int if key == "workspace_id" else str)
    assert -(2**63) <= reply.get("workspace_id", 0) < 2**63


def test_tunnel_state_is_the_tunnels_own() -> None:
    said = {"cluster_id": "c-1", "status": "REQUIRED", "forwards": [], "request_id": "x", "poll_frequency": 9}
    assert tunnel_state(said) == {"status": "REQUIRED", "forwards": [], "poll_frequency": 9}


# --- What only a WebSocket agent can serve is refused as a real agent would refuse it ---


@pytest.mark.parametrize(
    "kind, request_id, payload, answer",
    [
        ("proxy_request", "r", {"method": "GET"}, ("proxy_error", "r", {"error": REASON})),
        (
            "proxy_request",
            "r",
            {"supports_response_streaming": True},
            ("proxy_response_abort", "r", {"error": REASON}),
        ),
        ("proxy_request", "r", {"supports_response_streaming": "yes"}, ("proxy_error", "r", {"error": REASON})),
        ("proxy_request", "", {"method": "GET"}, None),
        ("proxy_request", "r", {}, None),
        ("tcp_tunnel_start", "r", {}, ("tcp_tunnel_close", "r", {"reason": "connection_failed", "error": REASON})),
        ("tcp_tunnel_start", "", {"tunnel_id": "t"}, None),
        ("ws_start", "r", {"stream_id": "s"}, ("proxy_error", "s", {"request_id": "s", "error": REASON})),
        ("proxy_websocket_start", "", {"stream_id": "s"}, ("proxy_error", "s", {"request_id": "s", "error": REASON})),
        ("ws_start", "r", {}, ("proxy_error", "r", {"request_id": "r", "error": REASON})),
        ("ws_start", "r", {"stream_id": 5}, ("proxy_error", "r", {"request_id": "r", "error": REASON})),
        ("ws_start", "", {}, None),
    ],
)
def test_refuse(kind: str, request_id: str, payload: dict[str, Any], answer: Any) -> None:
    assert kind in REFUSED_TYPES
    assert refuse(kind, request_id, payload) == answer


def test_nothing_is_both_refused_and_dropped() -> None:
    assert not REFUSED_TYPES & LEFTOVER_TYPES
