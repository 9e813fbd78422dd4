"""tests.support.generations against what was observed of real agents: the yardstick itself.

Rules: docs/reference/legacy-agents.md#1-legacy-http-endpoints.
"""

import json
from typing import Any

import pytest

from tests.support.generations import ALL, GENERATIONS, Generation, Verdict
from tests.support.gojson import GoError, Map, Time, decode

BY_LABEL = {generation.label: generation for generation in ALL}
REGISTERING = [BY_LABEL[label] for label in ("A1", "B1", "B2", "B3", "B4", "B7")]
# docs/reference/legacy-agents.md#11-register: one reply that satisfies all generations
SUPERSET = {
    "success": True,
    "message": "ok",
    "cluster_id": "u",
    "cluster_uuid": "u",
    "name": "n",
    "status": "registered",
    "cluster": {"id": "u", "name": "n", "status": "registered"},
}


def register(label: str, status: int, body: Any) -> Verdict:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return BY_LABEL[label].read("register", status, raw).verdict


@pytest.mark.parametrize("generation", REGISTERING, ids=lambda g: g.label)
@pytest.mark.parametrize("status", [200, 201])
def test_one_register_reply_satisfies_all(generation: Generation, status: int) -> None:
    assert generation.read("register", status, json.dumps(SUPERSET).encode()).verdict is Verdict.CONTENT


@pytest.mark.parametrize("generation", REGISTERING, ids=lambda g: g.label)
@pytest.mark.parametrize("status", [202, 204, 206])
def test_any_other_2xx_is_a_failure_everywhere(generation: Generation, status: int) -> None:
    assert generation.read("register", status, json.dumps(SUPERSET).encode()).verdict is Verdict.BROKEN


@pytest.mark.parametrize("generation", REGISTERING, ids=lambda g: g.label)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 502, 503])
def test_errors_are_refusals(generation: Generation, status: int) -> None:
    assert generation.read("register", status, json.dumps(SUPERSET).encode()).verdict is Verdict.REFUSED


@pytest.mark.parametrize("body", [b"", b"invalid json", b'{"success": true} junk', b"null", b"[]"])
def test_a_body_that_is_no_object_fails_all_but_a(body: bytes) -> None:
    assert register("A1", 200, body) is Verdict.CONTENT
    assert {register(label, 201, body) for label in ("B1", "B2", "B3", "B4", "B7")} == {Verdict.BROKEN}


@pytest.mark.parametrize(
    "body",
    [
        {"cluster_uuid": "u"},
        {"cluster": {"id": "u"}},
        {"cluster": {"uuid": "u"}},
        {"data": {"cluster_id": "u"}},
        {"cluster_id": ""},
        {"cluster_id": None},
        {"cluster_id": 7},
        SUPERSET | {"cluster": {"id": "u", "workspace_id": "12"}},
        SUPERSET | {"cluster": {"id": "u", "workspace_id": 12.0}},
        SUPERSET | {"cluster": {"id": "u", "workspace_id": 2**63}},
        SUPERSET | {"cluster": {"id": "u", "registered_at": ""}},
        SUPERSET | {"data": {"registered_at": "yesterday"}},
        SUPERSET | {"success": "true"},
    ],
)
def test_what_makes_b4_exit(body: dict[str, Any]) -> None:
    assert register("B4", 200, body) is Verdict.BROKEN


@pytest.mark.parametrize(
    "body",
    [
        {"cluster_id": "u"},
        {"CLUSTER_ID": "u"},
        SUPERSET | {"cluster": None, "data": None},
        SUPERSET | {"cluster": {"id": "u", "workspace_id": 12, "registered_at": "2025-10-16T12:00:00.5Z"}},
        SUPERSET | {"unknown": [{}]},
    ],
)
def test_what_b4_takes(body: dict[str, Any]) -> None:
    assert register("B4", 200, body) is Verdict.CONTENT


def test_b1_to_b3_need_the_nested_id() -> None:
    for label in ("B1", "B2", "B3"):
        assert register(label, 200, {"cluster_id": "u"}) is Verdict.BROKEN
        assert register(label, 200, {"cluster": {"id": "u"}}) is Verdict.CONTENT


def test_a_conflict_with_ids_is_a_success_from_b1_on() -> None:
    both = {"success": False, "error": "conflict", "cluster_id": "u", "cluster": {"id": "u"}}
    assert register("A1", 409, both) is Verdict.REFUSED
    for label in ("B1", "B2", "B3", "B4", "B7"):
        assert register(label, 409, both) is Verdict.CONTENT
        assert register(label, 409, {"success": False}) is Verdict.REFUSED


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda g: g.label)
def test_heartbeats_take_200_and_204_only(generation: Generation) -> None:
    verdicts = {status: generation.read("heartbeat", status, b"").verdict for status in (200, 204, 201, 202, 404, 500)}
    assert verdicts == {
        200: Verdict.CONTENT,
        204: Verdict.CONTENT,
        201: Verdict.BROKEN,
        202: Verdict.BROKEN,
        404: Verdict.REFUSED,
        500: Verdict.REFUSED,
    }


def test_commands_need_200_and_exact_types() -> None:
    a1 = BY_LABEL["A1"]
    good = {"id": "c", "type": "scale", "payload": {"replicas": 3}, "created_at": "2025-10-08T00:00:00Z"}
    assert a1.read("poll", 200, json.dumps({"commands": [good]}).encode()).value == [
        good | {"payload": {"replicas": 3}}
    ]
    assert a1.read("poll", 200, b'{"commands": null}').value == []
    assert a1.read("poll", 200, b"{}").value == []
    assert a1.read("poll", 204, b"").verdict is Verdict.BROKEN
    assert a1.read("poll", 200, b"").verdict is Verdict.BROKEN
    spoils: list[dict[str, Any]] = [{"created_at": "now"}, {"id": 1}, {"payload": "x"}, {"payload": []}]
    for spoilt in spoils:
        raw = json.dumps({"commands": [good, good | spoilt]}).encode()
        assert a1.read("poll", 200, raw).verdict is Verdict.BROKEN
    huge = b'{"commands": [{"id": "c", "payload": {"n": 1e400}}]}'
    assert a1.read("poll", 200, huge).verdict is Verdict.BROKEN


def test_tunnel_polls_are_typed_and_may_be_empty_objects() -> None:
    a2 = BY_LABEL["A2"]
    for fine in (b"{}", b'{"status":"IDLE","poll_frequency":5}', b'{"forwards":[{"name":"k","remote_port":1}]}'):
        assert a2.read("tunnel_poll", 200, fine).verdict is Verdict.CONTENT
    for bad in (b"", b'{"poll_frequency":5.0}', b'{"poll_frequency":"5"}', b'{"forwards":{}}'):
        assert a2.read("tunnel_poll", 200, bad).verdict is Verdict.BROKEN
    assert a2.read("tunnel_poll", 404, b"").verdict is Verdict.REFUSED


def test_ids_that_cannot_stand_in_a_path_break_agents() -> None:
    for unusable in ("a/b", "a b", "a?b", "..", "ü", "a%2f"):
        assert register("B4", 200, {"cluster_id": unusable}) is Verdict.BROKEN


def test_go_reads_repeated_names_in_order_and_merges_structs() -> None:
    shape = {"a": str, "s": {"x": int, "y": int}, "t": Time, "m": Map}
    assert decode(b'{"a":"1","A":"2","s":{"x":1},"S":{"y":2},"m":{"k":[1]}}', shape) == {
        "a": "2",
        "s": {"x": 1, "y": 2},
        "m": {"k": [1.0]},
    }


@pytest.mark.parametrize(
    "raw", [b'{"a":NaN}', b'{"t":"2025-10-08"}', b'{"s":[]}', b'{"a":true}', b"{'a':1}", b"[" * 5000]
)
def test_go_refuses(raw: bytes) -> None:
    with pytest.raises(GoError):
        decode(raw, {"a": str, "s": {}, "t": Time})
