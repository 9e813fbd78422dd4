"""A command is brought into the shape that every agent decodes, or refused (docs/reference/protocol.md#3-commands)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.agent_calls import Commands, OfferedCommand
from shim.core.bounds import MAX_DEPTH, VALUE_BYTES
from shim.core.records import SessionKey
from shim.protocol import dialects
from shim.protocol.command_message import MAX_ECHO_CHARS, MalformedCommand, ParsedCommand, parse_command
from shim.protocol.dialects import Call
from shim.protocol.rfc3339 import rfc3339
from shim.protocol.upstream_message import Message
from tests.support.generations import GUIDE, Verdict

WALL = 1_795_555_683.0
NOW = "2026-11-24T21:28:03.000Z"
TTL_S = 86_400.0


def normal(payload: dict[str, Any], request_id: str = "r-1", timestamp: str = "") -> ParsedCommand:
    return parse_command(Message("command", payload, request_id, timestamp), WALL, TTL_S, lambda: "made-up")


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload, request_id, found",
    [
        ({"command_id": "c", "id": "i"}, "r", "c"),
        ({"command_id": "", "id": "i"}, "r", "i"),
        ({"command_id": None, "id": "i"}, "r", "i"),
        ({"command_id": True, "id": "i"}, "r", "i"),
        ({"command_id": {"x": 1}, "id": ["i"]}, "r", "r"),
        ({}, "r", "r"),
        ({}, "", "made-up"),
        ({"command_id": 42}, "r", "42"),
        ({"id": 1.5}, "r", "1.5"),
        ({"id": 0}, "r", "0"),
        ({"id": "a b"}, "r", "a b"),
        ({"id": "ü" * 128}, "r", "ü" * 128),
        ({"id": "..."}, "r", "..."),
    ],
)
def test_the_id_is_the_first_there_is(payload: dict[str, Any], request_id: str, found: str) -> None:
    assert normal(payload, request_id).id == found


@pytest.mark.parametrize(
    "command_id", ["a/b", "/", ".", "..", "a?b", "a#b", "a%2f", "x" * 257, "ü" * 129, "a\nb", "\x00", "a\u202eb"]
)
def test_an_id_that_no_agent_could_answer_is_refused_by_its_name(command_id: str) -> None:
    with pytest.raises(MalformedCommand) as refused:
        normal({"command_id": command_id}, "r")
    assert refused.value.command_id == command_id, "the controller knows it by no other"


def test_a_huge_id_goes_back_shortened() -> None:
    with pytest.raises(MalformedCommand) as refused:
        normal({"command_id": "x" * 5000})
    assert refused.value.command_id == "x" * MAX_ECHO_CHARS


# --- type and payload -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload, found",
    [
        ({"type": "t", "command": "c", "action": "a"}, "t"),
        ({"command": "c", "action": "a"}, "c"),
        ({"action": "a"}, "a"),
        ({"type": "", "action": "a"}, "a"),
        ({"type": None, "command": "c"}, "c"),
        ({"type": 5, "command": "c"}, "c"),
        ({}, "command"),
        ({"type": "", "command": None}, "command"),
    ],
)
def test_the_type_is_the_first_text(payload: dict[str, Any], found: str) -> None:
    assert normal(payload).type == found


@pytest.mark.parametrize("value", [5, 0.5, True, ["x"], {"x": 1}])
def test_a_type_that_is_no_text_is_refused_with_the_id(value: Any) -> None:
    with pytest.raises(MalformedCommand) as refused:
        normal({"id": "k1", "type": value})
    assert refused.value.command_id == "k1"


@pytest.mark.parametrize(
    "payload, found",
    [
        ({"payload": {"a": 1}, "params": {"b": 2}}, {"a": 1}),
        ({"params": {"b": 2}, "args": {"c": 3}}, {"b": 2}),
        ({"args": {"c": 3}}, {"c": 3}),
        ({"payload": None, "params": {"b": 2}}, {"b": 2}),
        ({"payload": {}}, {}),
        ({"payload": "x"}, {"value": "x"}),
        ({"payload": [1]}, {"value": [1]}),
        ({"payload": False}, {"value": False}),
        ({"args": 0}, {"value": 0}),
        ({"command_id": "c", "type": "t", "replicas": 3, "name": "web"}, {"replicas": 3, "name": "web"}),
        ({"payload": None, "x": 1}, {"x": 1}),
        ({"cluster_id": "c", "agent_id": "a", "ttl_seconds": 5, "expires_at": NOW, "created_at": NOW}, {}),
    ],
)
def test_the_payload_is_always_an_object(payload: dict[str, Any], found: dict[str, Any]) -> None:
    assert normal(payload).payload == found


def nested(depth: int) -> Any:
    value: Any = {}
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


@pytest.mark.parametrize(
    "value",
    [10**309, -(10**309), {"deep": [[{"n": 10**400}]]}, nested(MAX_DEPTH), nested(5000)],
    ids=["above", "below", "inside", "one level", "deep"],
)
def test_what_agents_cannot_decode_is_refused_with_the_id(value: Any) -> None:
    with pytest.raises(MalformedCommand) as refused:
        normal({"command_id": "k1", "payload": {"v": value}})
    assert refused.value.command_id == "k1"


def test_large_numbers_that_fit_a_float_pass() -> None:
    assert normal({"payload": {"n": 10**308, "m": -(2**70)}}).payload == {"n": 10**308, "m": -(2**70)}
    assert normal({"payload": nested(MAX_DEPTH - 2)})


# --- times and targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "created_at, timestamp, found",
    [
        ("2026-11-24T22:28:03+01:00", "", "2026-11-24T21:28:03Z"),
        ("2026-11-24T21:28:03.123456789Z", "", "2026-11-24T21:28:03.123456Z"),
        (None, "2026-11-24T20:00:00Z", "2026-11-24T20:00:00Z"),
        ("yesterday", "2026-11-24T20:00:00Z", "2026-11-24T20:00:00Z"),
        (1_795_555_683, "2026-11-24T20:00:00Z", "2026-11-24T20:00:00Z"),
        ("2026-11-24t21:28:03z", "", NOW),
        (None, "", NOW),
        (None, "soon", NOW),
        ("0001-01-01T00:00:00+10:00", "", NOW),
        ("9999-12-31T23:59:59-10:00", "2026-11-24T20:00:00Z", "2026-11-24T20:00:00Z"),
    ],
)
def test_created_at_is_utc(created_at: Any, timestamp: str, found: str) -> None:
    assert normal({"created_at": created_at}, timestamp=timestamp).created_at == found


@pytest.mark.parametrize(
    "payload, timestamp, after_s",
    [
        ({"expires_at": "2026-11-24T21:29:03Z"}, "", 60),
        ({"expires_at": "2026-11-24T22:01:00Z"}, "2026-11-24T22:00:00Z", 60),  # its clock is half an hour ahead
        ({"expires_at": "2026-11-24T20:01:00Z"}, "2026-11-24T20:00:00Z", 60),  # or behind
        ({"expires_at": "2026-11-24T21:27:03Z"}, "", -60),
        ({"expires_at": "never", "ttl_seconds": 5}, "", 5),
        ({"ttl_seconds": 90.5}, "", 90.5),
        ({"ttl_seconds": 0}, "", 0),
        ({"ttl_seconds": -1}, "", TTL_S),
        ({"ttl_seconds": "60"}, "", TTL_S),
        ({"ttl_seconds": True}, "", TTL_S),
        ({"ttl_seconds": 1e300}, "", TTL_S),
        ({}, "2020-01-01T00:00:00Z", TTL_S),
    ],
)
def test_expiry_is_measured_by_the_senders_clock(payload: dict[str, Any], timestamp: str, after_s: float) -> None:
    assert normal(payload, timestamp=timestamp).expires_unix == pytest.approx(WALL + after_s)


@pytest.mark.parametrize(
    "payload, target",
    [
        ({"cluster_id": "c-1", "agent_id": "a-1"}, ("c-1", "a-1")),
        ({"cluster_id": 7}, ("7", "")),
        ({"cluster_id": None, "agent_id": ["a"]}, ("", "")),
        ({}, ("", "")),
    ],
)
def test_targets_are_texts(payload: dict[str, Any], target: tuple[str, str]) -> None:
    command = normal(payload)
    assert (command.cluster_id, command.agent_id) == target


# --- whatever comes ---------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
KEYS = st.sampled_from(
    [
        "command_id",
        "id",
        "type",
        "command",
        "action",
        "payload",
        "params",
        "args",
        "created_at",
        "expires_at",
        "ttl_seconds",
        "cluster_id",
        "agent_id",
    ]
)
TIMES = st.floats(-1e12, 1e12).map(rfc3339) | st.sampled_from(
    [NOW, "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"]
)
PAYLOADS = st.dictionaries(KEYS | st.text(max_size=6), JSON | TIMES, max_size=10)


@given(PAYLOADS, st.text(max_size=6), TIMES | st.text(max_size=6))
def test_never_anything_but_malformed_and_always_decodable(
    payload: dict[str, Any], request_id: str, timestamp: str
) -> None:
    try:
        command = normal(payload, request_id, timestamp)
    except MalformedCommand:
        return
    offered = OfferedCommand(command.id, command.type, command.payload, command.created_at)
    [dialect] = [each for each in dialects.load() if each.NAME == "clusters_agent"]
    reply = dialect.render("poll", Commands((offered,), 5), Call({"cluster_id": "c"}))
    reading = GUIDE.read("poll", reply.status, json.dumps(reply.body).encode())
    assert reading.verdict is Verdict.CONTENT, reading.reason
    [read] = reading.value
    assert read["id"] == command.id
    assert read["type"] == command.type != ""
    assert command.expires_unix == command.expires_unix


@pytest.mark.parametrize("payload", [{"x": [[]] * 50_000}, {"x": [1] * 50_000}, {str(n): "" for n in range(50_000)}])
def test_a_command_of_many_values_counts_with_the_memory_that_they_take(payload: dict[str, Any]) -> None:
    parsed = parse_command(Message("command", {"command_id": "k", "payload": payload}), 0.0, 60.0, str)
    record = parsed.record(SessionKey("default", "cluster", "c"), "", 0.0, "")
    assert record.size_bytes > 49_000 * VALUE_BYTES


def test_a_command_of_long_texts_counts_as_its_json() -> None:
    payload = {"script": 'echo "a,b,c:[{"' * 10_000, "args": ["x"] * 100}
    parsed = parse_command(Message("command", {"command_id": "k", "payload": payload}), 0.0, 60.0, str)
    record = parsed.record(SessionKey("default", "cluster", "c"), "", 0.0, "")
    assert record.size_bytes < len(msgspec.json.encode(payload)) + 200
