"""Bounds on what others can make the shim hold, all in one place; those that are settings stand in `settings`.

Texts that others choose have one bound where they enter and a shorter one where they are shown or logged. A text beyond
its bound is cut, except where it identifies something: an id or a name that is too long is refused, because a cut one
could be another's. docs/concepts/threat-model.md#bounds lists all bounds.
"""

from __future__ import annotations

MAX_ID_BYTES = 256
"""Ids of agents, clusters and commands, in paths and bodies."""
MAX_NAME_CHARS = 256
"""Names of agents and clusters; Kubernetes allows 253 characters."""
MAX_WORD_CHARS = 256
"""Statuses, types, versions, regions, user agents: what fits on a line."""
MAX_LABELS = 128
"""Labels of one registration; further ones are left out."""
MAX_REQUEST_ID_CHARS = 1024
"""Request ids of the controller's messages, which go back with what answers them."""
MAX_URL_CHARS = 2048
"""Addresses that the controller names: of gateways, tunnels and API servers."""
MAX_KEPT_BYTES = 65_536
"""JSON bytes of one registration, heartbeat or tunnel state: the newest of each agent is kept in memory."""
MAX_KEPT_VALUES = 2000
"""Texts, numbers, lists and objects in one registration or heartbeat; beyond: 413."""
MAX_ALL_KEPT_BYTES = 6_291_456
"""JSON bytes of the heartbeats of all agents that are kept, and as much again for status reports that wait."""
FREE_KEPT_BYTES = 1024
"""Bytes of each heartbeat that are not counted there: a usual one is never refused for others' large ones."""
MAX_VALUES = 250_000
"""Values in one body; each takes more memory than it has bytes. Beyond: 413."""
MAX_TEXT_CHARS = 4096
"""Reasons and error texts that are passed on."""
MAX_SHOWN_CHARS = 64
"""Names, ids, types and statuses on the status page, in tables and in sentences."""
MAX_LOGGED_CHARS = 200
"""One text in a log line."""

MAX_HEAD_BYTES = 32_768
"""Request line and headers of one request of an agent together; beyond: 431."""
MAX_LINE_BYTES = 16_384
"""One line of them; beyond: 431."""
MAX_WAITING_BYTES = 32_768
"""Bytes of a connection behind an unanswered request; beyond, nothing is read before that is answered."""
FREE_BYTES = 2048
"""Bytes of each connection that are not counted among those of all connections together, which may be twice the largest
body: a small request is never refused for others' large ones."""
MAX_EMPTY_LINES = 1000
"""Empty lines in one chunked body, each of which may be its end; JSON has none. Beyond: 400."""


def cut(text: str, limit_chars: int) -> str:
    """Return the text, shortened to the limit with `…` as its last character where it is longer."""
    return text if len(text) <= limit_chars else f"{text[: limit_chars - 1]}…"
