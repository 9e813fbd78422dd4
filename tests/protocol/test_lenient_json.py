"""JSON of other programs: what Go would read is read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

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


def best_cpu_s(work: Callable[[], object]) -> float:
    """Return the least CPU time of three runs: unlike the time on the clock, it is the same on a busy machine."""
    took = []
    for _ in range(3):
        began = time.thread_time()
        work()
        took.append(time.thread_time() - began)
    return min(took)


@pytest.mark.parametrize("number", ["1e300", "1.2345e300", "-9.9e307", "1e23", "1e-300", "0.1e-320"])
def test_no_number_takes_much_longer_than_others(number: str) -> None:
    usual, special = ((f"[{','.join([each] * 10_000)}]").encode() for each in ("1.5", number))
    assert lenient_json.decode(special) == [float(number)] * 10_000
    assert best_cpu_s(lambda: lenient_json.decode(special)) < 50 * best_cpu_s(lambda: lenient_json.decode(usual))


@pytest.mark.parametrize("number", ["1e400", "-1e309", "1.0e99999"])
def test_numbers_beyond_a_float64_are_no_json(number: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        lenient_json.decode(f"[{number}]")


@pytest.mark.parametrize(
    "text, too_many",
    [
        (b"[" + b"1," * 250_000 + b"1]", True),
        (b"[" + b'"a",' * 250_000 + b'"a"]', True),
        (b"{" + b'"a":1,' * 125_000 + b'"a":1}', True),
        (b"[" + b"1," * 249_000 + b"1]", False),
        (b'"' + b"a,b," * 250_000 + b'"', False),
        (b'"' + rb"\"," * 300_000 + b'"', False),
        (b'"' + rb"\\" * 300_000 + b"," * 300_000 + b'"', False),
        (b'["' + rb"\\" * 300_000 + b'"' + b",1" * 250_000 + b"]", True),
        (b'["' + rb"\\\"" * 300_000 + b'"' + b",1" * 250_000 + b"]", True),
    ],
)
def test_values_are_counted_outside_of_texts_in_little_time(text: bytes, too_many: bool) -> None:
    assert lenient_json.has_too_many_values(text) is too_many
    plain = b"[" + b"1," * (len(text) // 2) + b"1]"
    assert best_cpu_s(lambda: lenient_json.has_too_many_values(text)) < 20 * best_cpu_s(
        lambda: lenient_json.has_too_many_values(plain)
    )
