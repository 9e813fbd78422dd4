"""Notes and headers between replicas.

The owner of a shard cannot see if a reply that another replica writes reaches the agent. That replica reports it by
notes on the connection that carried the reply: HTTP/1.1 requests that get no reply. If the connection ends without a
note, the outcome is unknown.
"""

from __future__ import annotations

import math
from enum import Enum

METHOD = "NOTIFY"
OPERATOR = "operator"
HEARTBEATS = "heartbeats"

ARRIVAL_HEADER = "X-Shim-Arrival"  # of a forwarded request: its age, and an owner's time before which it did not arrive
RECEIPT_HEADER = "X-Shim-Receipt"  # of a reply that offers commands
CLOCK_HEADER = "X-Shim-Clock"  # of a reply: the owner's monotonic clock
OWN_HEADERS = frozenset(map(str.lower, (ARRIVAL_HEADER, RECEIPT_HEADER, CLOCK_HEADER)))
"""Headers that no agent's request and no reply to an agent may carry."""


class Note(Enum):
    """Kinds of notes, by the path of their request."""

    JOIN = "/join"  # sent first: proves with `Authorization` that the sender knows the members' secret
    WRITTEN = "/written"  # the whole reply was handed to the kernel
    UNWRITTEN = "/unwritten"  # the reply was not written, or the agent hung up before
    NEXT = "/next"  # the agent sent its next request on the connection that carried the reply
    CLOSED_CLEANLY = "/closed/cleanly"  # the agent's connection ended by FIN, with everything acknowledged
    CLOSED = "/closed"  # the agent's connection ended in another way


def note(kind: Note, query: str = "", headers: str = "") -> bytes:
    """Encode a note."""
    # RFC 9112 §3.2: servers reject a request without Host
    return f"{METHOD} {kind.value}{query} HTTP/1.1\r\nHost: owner\r\n{headers}\r\n".encode("ascii")


def arrival(age_s: float, not_before: float | None) -> str:
    """Encode the arrival of a request. `not_before` is on the owner's clock, `None` if unknown."""
    bound = "" if not_before is None else f"{not_before:.6f}"
    return f"{max(0.0, age_s):.6f}&{bound}"


def read_arrival(value: str, now: float) -> tuple[float, float]:
    """Return the estimated arrival of a request and the earliest possible one, both on the owner's clock.

    Raises `ValueError` for a malformed or missing value.
    """
    age_s, _, bound = value.partition("&")
    age, not_before = float(age_s), float(bound) if bound else -math.inf
    if not (math.isfinite(age) and age >= 0) or math.isnan(not_before):
        raise ValueError("not a time")
    return now - age, min(not_before, now)
