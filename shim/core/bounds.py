"""Bounds on the memory that agents and the controller can make the shim use.

Bounds that are settings are in `settings`. Texts from outside have one bound where they are received and a shorter one
where they are shown or logged. A longer text is cut. An id or a name that is too long is rejected instead, because two
different ones could be equal after cutting. docs/concepts/threat-model.md#bounds lists all bounds.
"""

from __future__ import annotations

MAX_ID_BYTES = 256
"""Ids of agents, clusters and commands, in paths and bodies."""
MAX_NAME_CHARS = 256
"""Names of agents and clusters; Kubernetes allows 253 characters."""
MAX_WORD_CHARS = 256
"""Short texts of one line: statuses, types, versions, regions, user agents."""
MAX_LABELS = 128
"""Labels of one registration; further labels are dropped."""
MAX_REQUEST_ID_CHARS = 1024
"""Request ids of the controller's messages, which are repeated in our replies."""
MAX_URL_CHARS = 2048
"""URLs in the controller's messages: gateways, tunnels and API servers."""
MAX_KEPT_BYTES = 65_536
"""JSON bytes of one registration, heartbeat or tunnel state. The newest of each agent is kept in memory."""
MAX_KEPT_VALUES = 2000
"""JSON values (texts, numbers, lists, objects) in one registration or heartbeat; more are answered with 413."""
MAX_ALL_KEPT_BYTES = 6_291_456
"""JSON bytes of all agents' kept heartbeats together. Waiting status reports have a bound of the same size."""
FREE_KEPT_BYTES = 1024
"""Bytes of each heartbeat that do not count towards `MAX_ALL_KEPT_BYTES`.

A heartbeat of usual size is therefore never rejected because other agents send large ones."""
MAX_DEPTH = 64
"""Levels of nested arrays and objects in a body or a command: far more than usual, far fewer than an encoder allows."""
MAX_VALUES = 250_000
"""JSON values in one body, where more are answered with 413, and in one message of the controller.

A decoded value takes more memory than its bytes."""
VALUE_BYTES = 64
"""Memory of one decoded value besides its JSON text, by which commands of many values count."""
FREE_VALUES = 1000
"""Values of one command that do not count."""
MAX_TEXT_CHARS = 4096
"""Reasons and error texts that are forwarded."""
MAX_SHOWN_CHARS = 64
"""Names, ids, types and statuses on the status page, in tables and in sentences."""
MAX_LOGGED_CHARS = 200
"""One text in a log line."""

MAX_HEAD_BYTES = 32_768
"""Request line and headers of one agent request together; more are answered with 431."""
MAX_LINE_BYTES = 16_384
"""One line of a request's head; a longer one is answered with 431."""
MAX_WAITING_BYTES = 32_768
"""Bytes read on a connection after an unanswered request. Reading pauses there until the request is answered."""
FREE_BYTES = 2048
"""Bytes of each connection that do not count towards the bound of all connections (twice the largest body).

A small request is therefore never rejected because other agents send large ones."""
LONG_TEXT_BYTES = 65_536
"""Bytes of a body or message beyond which decoding it holds the event loop: then other work gets as much time."""
MAX_EMPTY_LINES = 1000
"""Empty lines in one chunked body, each of which may be its end; more are answered with 400. JSON has none."""


def cut(text: str, limit_chars: int) -> str:
    """Return the text, shortened to the limit if necessary; a shortened text ends in `…`."""
    return text if len(text) <= limit_chars else f"{text[: limit_chars - 1]}…"


class Budget:
    """A limit on the bytes that all connections together hold: bodies being read, incomplete heads, unparsed bytes.

    A single request may be large, but not all at the same time. The first `FREE_BYTES` of a connection are not counted.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def reserve(self, size_bytes: int) -> bool:
        """Reserve `size_bytes`; return False and reserve none if that exceeds the limit."""
        if self.used_bytes + size_bytes > self._limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        """Release `size_bytes`."""
        self.used_bytes -= size_bytes
