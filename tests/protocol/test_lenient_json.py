"""JSON of other programs: what Go would read is read."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol import lenient_json

HALVES = st.characters(min_codepoint=0xD7F0, max_codepoint=0xE00F)
TEXTS = st.text(st.one_of(HALVES, st.sampled_from('\\"ude8\n😀')))


@pytest.mark.parametrize(
    "text, value",
    [
        (rb'"\ud83d"', "\ufffd"),
        (rb'"a\udcffb"', "a\ufffdb"),
        (rb'"\ud83d\ude00\uD83D"', "😀\ufffd"),
        (rb'"\udc00\ud83d"', "\ufffd\ufffd"),
        (rb'"\ud83d\u0041"', "\ufffdA"),
        (rb'"\\ud83d"', r"\ud83d"),
        (rb'["\ud83d", "\\ud83d"]', ["\ufffd", r"\ud83d"]),
        (rb'{"\ud83d": 1}', {"\ufffd": 1}),
        (r'"\ud83d"', "\ufffd"),
        (b'"caf\xe9"', "caf\ufffd"),
        (b'"\xe2\x82"', "\ufffd\ufffd"),  # as Go: one for each byte
        (b'"\xed\xa0\xbd\xc0\xafx"', "\ufffd" * 5 + "x"),
        (b'{"\xff":"\xe2\x82\xac"}', {"\ufffd": "€"}),
        (b'"a?\xff?\xc3"', "a?\ufffd?\ufffd"),
        (b'"\xff\\ud83d"', "\ufffd\ufffd"),
        (b'\xef\xbb\xbf{"a":1}', {"a": 1}),
    ],
)
def test_what_is_no_character_is_replaced(text: str | bytes, value: object) -> None:
    assert lenient_json.decode(text) == value


@given(st.one_of(TEXTS, st.lists(TEXTS)))
def test_every_text_that_python_writes_is_read(value: object) -> None:
    text = json.dumps(value)
    paired = json.loads(text)  # two halves that happen to fit are one character

    def fit(found: object) -> object:
        if isinstance(found, list):
            return [fit(item) for item in found]
        assert isinstance(found, str)
        return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in found)

    assert lenient_json.decode(text) == fit(paired)


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b"\xff", rb'"\ud8"', rb'{"\ud83d"', rb'"\ud83d', '"\ud83d"'])
def test_what_is_no_json_stays_none(text: str | bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeError)):
        lenient_json.decode(text)


@pytest.mark.parametrize("text, times", [(b'"caf\xe9 \xff"', 1), (rb'"\ud83d"', 0), (b'\xef\xbb\xbf""', 0), (b'""', 0)])
def test_a_replacement_of_bytes_is_told(text: bytes, times: int) -> None:
    told: list[int] = []
    lenient_json.decode(text, lambda: told.append(1))
    assert len(told) == times


@given(st.binary(max_size=60))
def test_bytes_are_read_as_go_reads_them(raw: bytes) -> None:
    """Go's `range` over a string: a character, or U+FFFD for one byte."""
    expected, at = "", 0
    while at < len(raw):
        for size in (1, 2, 3, 4):
            try:
                expected += raw[at : at + size].decode()
            except UnicodeDecodeError:
                continue
            at += size
            break
        else:
            expected, at = expected + "\ufffd", at + 1
    if b"\0" not in raw and not raw.startswith(b"\xef\xbb\xbf"):
        assert lenient_json.as_characters(raw.replace(b"\\", b"/")).decode() == expected.replace("\\", "/")
