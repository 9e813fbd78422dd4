"""Frames that are not one plain JSON value: several values, numbers out of range, nesting without end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core import bounds
from shim.errors import MessageError
from shim.protocol.upstream_message import (
    MAX_BYTES,
    MAX_VALUES,
    NO_JSON,
    OUT_OF_RANGE,
    TOO_DEEP,
    TOO_LARGE,
    TOO_MANY,
    Message,
    decode_frame,
    values_of,
)

OBJECTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(lambda value: {"payload": value})


@given(st.lists(OBJECTS, min_size=1, max_size=5), st.sampled_from(["", " ", "\n", "\r\n", "\x1e", "\ufeff"]))
def test_every_value_of_a_frame_is_found(values: list[Any], between: str) -> None:
    frame = between.join(json.dumps(value) for value in values).encode()
    found = list(values_of(frame))
    assert [fault for _, fault in found] == [""] * len(values)
    for (decoded, _), value in zip(found, values, strict=True):
        if "\\u" not in json.dumps(value):  # unpaired surrogates are replaced
            assert decoded == value


@given(st.binary(max_size=200))
def test_nothing_is_raised_for_what_is_no_json(frame: bytes) -> None:
    assert all(json.dumps(value) for value, _ in values_of(frame))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 5000, "-" + "9" * 400, "NaN", "Infinity", "-Infinity"])
def test_a_number_out_of_range_is_left_out_and_the_rest_is_there(number: str) -> None:
    [found] = values_of(f'{{"type":"command","payload":{{"id":"k","n":{number},"m":1.5}}}}'.encode())
    assert found == ({"type": "command", "payload": {"id": "k", "n": None, "m": 1.5}}, OUT_OF_RANGE)


def deep(payload: str) -> bytes:
    return f'{{"type":"command","request_id":7,"payload":{{{payload}}},"timestamp":"t"}}'.encode()


NEST = "[" * 5000 + "]" * 5000
TRICKY = '["]",' * 5000 + "0" + "]" * 5000


@pytest.mark.parametrize("payload", [f'"id":"k","n":{NEST}', f'"n":{NEST},"id":"k"', f'"n":{TRICKY},"id":"k"'])
def test_of_what_is_nested_too_deeply_the_scalars_are_read(payload: str) -> None:
    [(found, fault)] = values_of(deep(payload))
    assert fault == TOO_DEEP
    assert found["request_id"] == 7
    assert found["payload"]["id"] == "k"


def test_what_stands_behind_a_value_that_is_nested_too_deeply_is_read() -> None:
    found = list(values_of(deep(f'"id":"k","n":{NEST}') + b'{"type":"ping"}'))
    assert [(value["type"], fault) for value, fault in found] == [("command", TOO_DEEP), ("ping", "")]


@pytest.mark.parametrize("broken", ['"id":"k","x":[1,}', '"id":"k","x":', '"id":"k" "x"', "'id':1"])
def test_of_what_is_broken_the_envelope_is_read(broken: str) -> None:
    first, fault = next(values_of(deep(broken)))
    assert fault == NO_JSON
    assert first["request_id"] == 7


def test_a_frame_is_skimmed_in_bounded_time() -> None:
    huge = b'{"type":"command","request_id":"r","payload":{"n":' + b"[" * (2 * MAX_BYTES)
    assert [(value["request_id"], fault) for value, fault in values_of(huge)] == [("r", TOO_LARGE)]
    assert len(list(values_of(b"{}" * (MAX_VALUES + 5)))) == MAX_VALUES


def test_messages_in_an_array_are_taken_one_by_one() -> None:
    command = {"type": "command", "request_id": "r", "payload": {"command_id": "k"}}
    first, second, third = decode_frame(json.dumps([command, {**command, "payload": "x"}, {"payload": {}}]).encode())
    assert isinstance(first, Message)
    assert (first.payload, first.fault) == ({"command_id": "k"}, "")
    assert isinstance(second, Message)
    assert (second.request_id, second.fault) == ("r", "the payload must be an object")
    assert isinstance(third, MessageError)
    for other in (b"[]", b"[1,2,3]", b'[{"type":"ping"},1]'):
        (found,) = decode_frame(other)
        assert isinstance(found, MessageError)


def test_a_message_with_more_values_than_memory_holds_is_answered_by_its_id() -> None:
    values = b"[]," * bounds.MAX_VALUES
    (found,) = decode_frame(b'{"type":"command","payload":{"command_id":"k","payload":[' + values + b"[]]}}")
    assert isinstance(found, Message)
    assert (found.type, found.payload["command_id"], found.fault) == ("command", "k", TOO_MANY)
    (found,) = decode_frame(b"[" + values + b"[]]")
    assert isinstance(found, MessageError)
    assert found.kind == "too_many_values"
    text = "[]," * bounds.MAX_VALUES  # as one value: a text
    (found,) = decode_frame(json.dumps({"type": "command", "payload": {"output": text}}).encode())
    assert isinstance(found, Message)
    assert found.payload["output"] == text
