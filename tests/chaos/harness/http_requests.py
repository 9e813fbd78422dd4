"""A grammar of HTTP requests: the recorded calls of real agents, and what clients, proxies and attackers make of them.

Everything is drawn from a `Random`: hypothesis gives one whose choices it can shrink, and a seed gives the same again.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from shim.core.bounds import MAX_HEAD_BYTES, MAX_LINE_BYTES
from tests.chaos.harness.mutation import mutated

FIXTURES = Path(__file__).parents[2] / "fixtures"
TOKEN = "upstream-token"  # as in `tests.support.world`


@dataclass(slots=True)
class Draft:
    """A request that is being written. `body` is sent as it is; `headers` say how long it is."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    version: bytes = b"HTTP/1.1"
    line_end: bytes = b"\r\n"
    before: bytes = b""
    parts: tuple[bytes, bytes] = field(default=(b" ", b" "))

    def render(self) -> bytes:
        """Return the request as bytes."""
        one, two = self.parts
        lines = [self.method + one + self.target + two + self.version]
        lines += [name + b": " + value for name, value in self.headers]
        return self.before + self.line_end.join([*lines, b"", b""]) + self.body

    def without(self, *names: bytes) -> list[tuple[bytes, bytes]]:
        """Return the headers except those of these names."""
        return [header for header in self.headers if header[0].lower() not in names]

    def put(self, name: bytes, value: bytes) -> None:
        """Set a header, in place of one of the same name."""
        self.headers = [*self.without(name.lower()), (name, value)]


def _recorded() -> tuple[Draft, ...]:
    found: dict[tuple[str, str], Draft] = {}
    for path in sorted(FIXTURES.glob("legacy-*.jsonl")):
        for line in path.read_text().splitlines():
            call = json.loads(line)
            names = [(name.encode(), value.encode()) for name, value in call["headers"]]
            headers = [(n, b"Bearer " + TOKEN.encode() if n == b"Authorization" else v) for n, v in names]
            draft = Draft(call["method"].encode(), call["path"].encode(), headers, call["body"].encode())
            found.setdefault((call["method"], call["path"]), draft)
    return tuple(found.values())


RECORDED = _recorded()
"""One call of every kind that real agents made, with their headers in their order, and this shim's token."""


def chunks(body: bytes, rng: Random) -> bytes:
    """Return a body in chunks of any size, sometimes with an extension or a trailer."""
    coded, at = b"", 0
    while at < len(body):
        size = rng.choice((1, 2, 7, 64, len(body)))
        piece = body[at : at + size]
        digits = (b"%x" if rng.random() < 0.7 else b"%X") % len(piece)
        coded += digits.rjust(rng.choice((0, 0, 4)), b"0") + rng.choice((b"", b"", b";a=b")) + b"\r\n" + piece + b"\r\n"
        at += size
    return coded + b"0\r\n" + rng.choice((b"", b"", b"X-Trailer: y\r\n")) + b"\r\n"


# --- changes that leave a request valid -----------------------------------------------------------------------------


def _chunked(draft: Draft, rng: Random) -> None:
    draft.headers = draft.without(b"content-length")
    draft.put(b"Transfer-Encoding", rng.choice((b"chunked", b"chunked", b"Chunked")))
    draft.body = chunks(draft.body, rng)


def _compressed(draft: Draft, rng: Random) -> None:
    draft.body = gzip.compress(draft.body, mtime=0)[: None if rng.random() < 0.7 else -3]
    draft.put(b"Content-Encoding", b"gzip")
    draft.put(b"Content-Length", b"%d" % len(draft.body))


def _expectant(draft: Draft, rng: Random) -> None:
    draft.put(b"Expect", rng.choice((b"100-continue", b"100-continue", b"100-Continue", b"tea")))


def _other_target(draft: Draft, rng: Random) -> None:
    path = draft.target
    draft.target = rng.choice(
        (
            *(
                b"/" + path,
                b"http://localhost" + path,
                b"https://user@localhost:1" + path,
                path + b"?a=b",
                path + b"#f",
            ),
            *(b"*", b"localhost:80", path + b"/", path.replace(b"/", b"%2f"), path + b"\xff", b"/\xc3\xa4" + path, b""),
            *(b"http://[::1" + path, b"//" + path, path + b"?" + b"q" * 3000, path.replace(b"agent", b"..", 1)),
        )
    )


def _other_method(draft: Draft, rng: Random) -> None:
    draft.method = rng.choice(
        (b"HEAD", b"OPTIONS", b"GET", b"POST", b"PUT", b"CONNECT", b"TRACE", b"get", b"X", b"PRI")
    )


def _other_version(draft: Draft, rng: Random) -> None:
    draft.version = rng.choice(
        (b"HTTP/1.0", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b"HTTP/1.1 ")
    )


def _other_connection(draft: Draft, rng: Random) -> None:
    draft.put(b"Connection", rng.choice((b"close", b"keep-alive", b"Close", b"Upgrade", b"close, keep-alive", b"x")))
    if rng.random() < 0.3:
        draft.put(b"Upgrade", rng.choice((b"websocket", b"h2c", b"TLS/1.0")))


def _other_token(draft: Draft, rng: Random) -> None:
    draft.headers = draft.without(b"authorization")
    for _ in range(rng.randrange(3)):
        value = rng.choice((b"Bearer wrong", b"Bearer", b"Basic eDp5", b"bearer " + TOKEN.encode(), b"Bearer \xff"))
        draft.headers.append((b"Authorization", value))


def _other_host(draft: Draft, rng: Random) -> None:
    draft.headers = draft.without(b"host")
    for _ in range(rng.randrange(3)):
        draft.headers.append((b"Host", rng.choice((b"localhost", b"evil.example", b"[::1]:7080", b"", b"a b"))))


def _one_header_more(draft: Draft, rng: Random) -> None:
    more = (
        *((b"X-Request-Id", b"given.%d" % rng.randrange(9)), (b"X-Request-Id", b"\xff"), (b"Origin", b"http://x")),
        *((b"Sec-Fetch-Mode", b"cors"), (b"User-Agent", b"\xe4gent"), (b"X", b""), (b"Cookie", b"a=b")),
        *((b"Accept-Encoding", b"gzip"), (b"Content-Type", b"text/plain"), (b"Trailer", b"X-Trailer"), (b"Date", b"x")),
    )
    draft.headers.insert(rng.randrange(len(draft.headers) + 1), rng.choice(more))


def _empty_lines_before(draft: Draft, rng: Random) -> None:
    draft.before = rng.choice((b"\r\n", b"\n", b"\r\n\r\n", b"\r", b"\r\n" * 20, b" \r\n"))


# --- changes that make it ambiguous or wrong ------------------------------------------------------------------------


def _wrong_length(draft: Draft, rng: Random) -> None:
    size = len(draft.body)
    wrong = (
        b"%d" % (size + 1),
        b"%d" % max(0, size - 1),
        b"+%d" % size,
        b"0x%x" % size,
        b"%d " % size,
        b"-1",
        b"",
        b"0",
    )
    wrong += (b"%d, %d" % (size, size), b"%d,%d" % (size, size + 1), b"9" * 30, b"1e1", b"\xb2", b"0%d" % size, b"1_0")
    draft.put(b"Content-Length", rng.choice(wrong))


def _two_lengths(draft: Draft, rng: Random) -> None:
    size = len(draft.body)
    draft.headers.append(
        (rng.choice((b"Content-Length", b"content-length")), b"%d" % rng.choice((size, size, 0, size + 5)))
    )


def _two_framings(draft: Draft, rng: Random) -> None:
    codings = (
        b"chunked",
        b"xchunked",
        b"chunked, chunked",
        b"identity",
        b"gzip, chunked",
        b"chunked, gzip",
        b"\tchunked",
    )
    draft.headers.append(
        (rng.choice((b"Transfer-Encoding", b"transfer-encoding")), rng.choice((*codings, b"chunked\x0b")))
    )
    if rng.random() < 0.5:
        draft.body = chunks(draft.body, rng)
    if rng.random() < 0.3:
        draft.headers.append((b"Transfer-Encoding", b"chunked"))


def _wrong_chunk(draft: Draft, rng: Random) -> None:
    _chunked(draft, rng)
    wrong = (
        b"zz\r\n",
        b"-1\r\n",
        b"f" * 17 + b"\r\n",
        b"5\r\nab\r\n",
        b"2\nab\n",
        b"2 \r\nab\r\n",
        b"0\r\n",
        b"2;\nx\r\nab\r\n",
    )
    draft.body = rng.choice(wrong) + draft.body if rng.random() < 0.5 else draft.body[: -rng.randrange(1, 6)]


def _wrong_header(draft: Draft, rng: Random) -> None:
    wrong = (
        *(
            (b"X ", b"y"),
            (b"", b"y"),
            (b"X\x00", b"y"),
            (b"X", b"a\x00b"),
            (b"X", b"a\rb"),
            (b"X", b"a\nb"),
            (b"X\xe4", b"y"),
        ),
        *((b" X", b"folded"), (b"\tX", b"folded"), (b"Content-Length ", b"1"), (b"X", b"\x7f"), (b"X", b"a\r\n b")),
        *(
            (b"Transfer-Encoding ", b"chunked"),
            (b"Transfer_Encoding", b"chunked"),
            (b"X", b"y\r\nno colon"),
            (b"(", b"y"),
        ),
        (b"X", b"a\n\nGET /api/v1/health HTTP/1.1"),
    )
    draft.headers.insert(rng.randrange(len(draft.headers) + 1), rng.choice(wrong))


def _wrong_first_line(draft: Draft, rng: Random) -> None:
    draft.parts = rng.choice(
        ((b"  ", b" "), (b" ", b"  "), (b"\t", b" "), (b"", b" "), (b" ", b""), (b" ", b"\x00 "), (b"\r", b" "))
    )


def _bare_line_ends(draft: Draft, rng: Random) -> None:
    draft.line_end = rng.choice((b"\n", b"\r", b"\n\r", b"\r\r\n"))


def _long(draft: Draft, rng: Random) -> None:
    """Bring the head, its number of lines, or one line to the limit or just beyond."""
    off = rng.choice((-2, -1, 0, 1, 2))
    if rng.random() < 0.4:
        draft.put(b"X-Long", b"x" * (MAX_LINE_BYTES - len(b"X-Long: ") + off))
        return
    if rng.random() < 0.2:
        draft.headers += [(b"X-%d" % number, b"y") for number in range(128 + off - len(draft.headers))]
        return
    if rng.random() < 0.3:
        draft.target += b"?" + b"q" * (MAX_LINE_BYTES - len(draft.target) - 1 + off)
        return
    size = len(draft.render()) - len(draft.body)
    while size < MAX_HEAD_BYTES + off:
        line = min(8000, max(10, MAX_HEAD_BYTES + off - size))
        draft.headers.append((b"X", b"y" * (line - len(b"X: \r\n"))))
        size += line


def other_body(draft: Draft, rng: Random) -> None:
    """Change the body in any way, and its announced length with it."""
    draft.body = mutated(draft.body, rng) if rng.random() < 0.8 else draft.body * 30
    draft.put(b"Content-Length", b"%d" % len(draft.body))


Change = Callable[[Draft, Random], None]

HARMLESS: tuple[Change, ...] = (_chunked, _compressed, _expectant, _other_token, _one_header_more, _other_connection)
HARMLESS += (other_body, _empty_lines_before, _other_method, _other_version, _other_target, _other_host)
HOSTILE: tuple[Change, ...] = (
    _wrong_length,
    _two_lengths,
    _two_framings,
    _wrong_chunk,
    _wrong_header,
    _wrong_first_line,
)
HOSTILE += (_bare_line_ends, _long)


def draft_of(rng: Random) -> Draft:
    """Return a recorded call that can be changed."""
    found = rng.choice(RECORDED)
    return Draft(found.method, found.target, list(found.headers), found.body)


def request(rng: Random) -> bytes:
    """Return one request: often valid, sometimes changed in a few ways, sometimes cut off or changed anywhere."""
    draft = draft_of(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        rng.choice(HARMLESS)(draft, rng)
    if rng.random() < 0.4:
        rng.choice(HOSTILE)(draft, rng)
    data = draft.render()
    match rng.randrange(12):
        case 0:
            return mutated(data, rng)
        case 1:
            return data[: rng.randrange(1, len(data) + 1)]
        case _:
            return data


def conversation(rng: Random) -> list[bytes]:
    """Return the requests of one connection, most of which end with a valid one: it shows where the last one ended."""
    found = [request(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.7:
        found.append(draft_of(rng).render())
    return found


def pieces_of(data: bytes, rng: Random) -> list[bytes]:
    """Return the same bytes, cut in a few places."""
    cuts = sorted({rng.randrange(1, len(data)) for _ in range(rng.choice((1, 2, 5)))}) if len(data) > 1 else []
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
