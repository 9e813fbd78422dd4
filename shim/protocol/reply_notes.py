"""Notes between replicas: HTTP/1.1 requests without a reply, in the order of the requests to which they belong.

The owner of a shard cannot see if a reply that another replica writes reaches the agent. That replica reports it on the
connection that carried the reply. If the connection ends without a note, the outcome is unknown.
"""

from __future__ import annotations

import math
from enum import Enum

METHOD = "NOTIFY"
OPERATOR = "operator"
HEARTBEATS = "heartbeats"


class Note(Enum):
    """Kinds of notes, by the path of their request."""

    JOIN = "/join"  # sent first: proves with `Authorization` that the sender knows the members' secret
    CAME = "/came"  # age of the request that follows, and an owner's time before which it did not arrive
    WRITTEN = "/written"  # the whole reply was handed to the kernel
    UNWRITTEN = "/unwritten"  # the reply was not written, or the agent hung up before
    NEXT = "/next"  # the agent sent its next request on the connection that carried the reply
    CLOSED_CLEANLY = "/closed/cleanly"  # the agent's connection ended by FIN, with everything acknowledged
    CLOSED = "/closed"  # the agent's connection ended in another way


def note(kind: Note, query: str = "", headers: str = "") -> bytes:
    """Encode a note."""
    # RFC 9112 §3.2: servers reject a request without Host
    return f"{METHOD} {kind.value}{query} HTTP/1.1\r\nHost: owner\r\n{headers}\r\n".encode("ascii")


def came(age_s: float, not_before: float | None) -> bytes:
    """Encode the arrival of a request. `not_before` is on the owner's clock, `None` if unknown."""
    bound = "" if not_before is None else f"{not_before:.6f}"
    return note(Note.CAME, f"?{max(0.0, age_s):.6f}&{bound}")


def read_came(query: str, now: float) -> tuple[float, float]:
    """Return the estimated arrival of a request and the earliest possible one, both on the owner's clock.

    Raises `ValueError` for a malformed note.
    """
    age_s, _, bound = query.partition("&")
    age, not_before = float(age_s), float(bound) if bound else -math.inf
    if not (math.isfinite(age) and age >= 0) or math.isnan(not_before):
        raise ValueError("not a time")
    return now - age, min(not_before, now)


def read(target: str) -> tuple[Note, str]:
    """Return a note and its query. Raises `ValueError` for an unknown target."""
    path, _, query = target.partition("?")
    return Note(path), query
