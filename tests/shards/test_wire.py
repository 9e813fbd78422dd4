"""What replicas say to each other: everything comes back as it was, and nothing else is believed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core import calls
from shim.shards import wire

TARGET = calls.Target(calls.Kind.CLUSTER, "cl-1")
CALLS = [
    calls.RegisterCall("clusters_agent", "a-1", "prod", {"name": "prod", "n": 2**70, "x": [1.5, None]}, "secret"),
    calls.HeartbeatCall("agents", TARGET, "a-1", "healthy", "connected", {"metadata": {"ü": 1}}, {"name": "prod"}),
    calls.StatusCall("agents", TARGET, {"pods": [{"name": "x"}]}),
    calls.PollCall("clusters", TARGET),
    calls.ResultCall("clusters", TARGET, "c-1", {"success": True}),
    calls.TunnelPollCall(TARGET),
    calls.TunnelInfoCall(TARGET),
]
OUTCOMES = [
    calls.Registered("cl-1", "uuid", "prod", "a-1", workspace_id=7),
    calls.Accepted(),
    calls.Commands((calls.OfferedCommand("c", "command", {"a": [1]}, "2026-01-01T00:00:00Z"),), 5),
    calls.TunnelState({"open": True}, 5),
    calls.TunnelInfo(calls.Registered("cl-1", "uuid", "prod", "a-1")),
    calls.Failed(409, "conflict", 3, "cl-1"),
]


@pytest.mark.parametrize("call", CALLS, ids=wire.kind_of)
def test_a_call_comes_back_as_it_was(call: Any) -> None:
    kind, body = wire.pack(call)
    assert wire.unpack_call(kind, body) == call
    assert kind in wire.KINDS


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda each: type(each).__name__)
def test_an_outcome_comes_back_as_it_was(outcome: Any) -> None:
    assert wire.unpack_outcome(*wire.pack(outcome)) == outcome


@given(st.text(st.characters(codec=None), max_size=50))
def test_a_token_travels_whatever_it_holds(token: str) -> None:
    assert wire.token_text(wire.token_bytes(token)) == token


def test_neither_tokens_nor_keys_are_shown() -> None:
    asked = wire.Ask(1, 2, b"secret-token", 3, None, "poll", msgspec.Raw(b"{}"))
    assert "secret" not in repr(asked)


def deliver(messages: list[bytes], assembler: wire.Assembler) -> list[wire.Envelope]:
    return [found for message in messages if (found := assembler.take(message)) is not None]


def asked(size_bytes: int) -> wire.Ask:
    kind, body = wire.pack(calls.StatusCall("agents", TARGET, {"x": "y" * size_bytes}))
    return wire.Ask(7, 1, b"t", 3, 1.5, kind, body)


@pytest.mark.parametrize("size_bytes", [10, 5_000, 150_000])
def test_a_message_of_any_size_arrives_whole(size_bytes: int) -> None:
    said = asked(size_bytes)
    messages = wire.encode("me", said, 9, 8192)
    assert all(len(message) <= 8192 for message in messages)
    (found,) = deliver(messages, wire.Assembler())
    assert found == wire.Envelope("me", said)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(wire.WireError, match="max_payload"):
        wire.encode("me", asked(wire.MAX_PIECES * 8192), 9, 8192)


def test_pieces_that_do_not_fit_are_refused() -> None:
    first, second, *_ = wire.encode("me", asked(20_000), 9, 8192)
    with pytest.raises(wire.WireError):
        wire.Assembler().take(second)
    assembler = wire.Assembler()
    assert assembler.take(first) is None
    with pytest.raises(wire.WireError):
        assembler.take(first)


def test_messages_that_are_never_finished_take_no_room() -> None:
    assembler = wire.Assembler()
    begun = [wire.encode("me", asked(20_000), number, 8192) for number in range(wire.MAX_UNFINISHED + 1)]
    for first, *_ in begun:
        assert assembler.take(first) is None
    assert len(deliver(begun[-1][1:], assembler)) == 1
    with pytest.raises(wire.WireError):
        deliver(begun[0][1:], assembler)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b'{"sender": "x"}',
        b'{"sender": "x", "said": {"type": "Nothing"}}',
        b'{"sender": "x", "said": {"type": "Written", "lease": "one"}}',
        b'{"sender": 1, "said": {"type": "Written", "lease": 1}}',
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.Assembler().take(data)


def test_calls_and_outcomes_are_not_taken_for_each_other() -> None:
    with pytest.raises(wire.WireError):
        wire.unpack_call(*wire.pack(calls.Accepted()))
    with pytest.raises(wire.WireError):
        wire.unpack_call("poll", msgspec.Raw(b'{"dialect": 1, "target": null}'))
    with pytest.raises(wire.WireError):
        wire.pack(object())
    with pytest.raises(wire.WireError):
        wire.pack(calls.StatusCall("agents", calls.Target(calls.Kind.CLUSTER, "\ud800"), {}))
    with pytest.raises(wire.WireError):
        wire.token_text(b"\xff\xfe")
