"""Notes between replicas: HTTP/1.1 requests without a reply, in the order of the requests that they concern.

The owner of a shard cannot see what becomes of a reply that another replica writes to the agent. That replica tells it,
on the connection that carried the reply; what was not told when the connection ends is in doubt.
"""

from __future__ import annotations

import math
from enum import Enum

METHOD = "NOTIFY"
OPERATOR = "operator"
HEARTBEATS = "heartbeats"


class Note(Enum):
    """The notes, by the path of their request."""

    JOIN = "/join"  # first of all: the sender knows the members' secret (`Authorization`)
    CAME = "/came"  # the request that follows arrived so long ago, and no earlier than at this time of the owner's
    WRITTEN = "/written"  # the reply was handed to the kernel whole
    UNWRITTEN = "/unwritten"  # it was not, or the agent left before
    NEXT = "/next"  # the agent sent its next request on the connection that carried the reply
    CLOSED_CLEANLY = "/closed/cleanly"  # that connection ended by FIN, with everything acknowledged
    CLOSED = "/closed"  # it ended in another way


def note(kind: Note, query: str = "", headers: str = "") -> bytes:
    """Encode a note."""
    # RFC 9112 §3.2: a request without Host is refused
    return f"{METHOD} {kind.value}{query} HTTP/1.1\r\nHost: owner\r\n{headers}\r\n".encode("ascii")


def came(age_s: float, not_before: float | None) -> bytes:
    """Encode when a request arrived; `not_before` is on the owner's clock, `None` where that is not known."""
    bound = "" if not_before is None else f"{not_before:.6f}"
    return note(Note.CAME, f"?{max(0.0, age_s):.6f}&{bound}")


def read_came(query: str, now: float) -> tuple[float, float]:
    """Return when a request arrived, as well as the owner can know it, and the moment before which it did not.

    Raises `ValueError` for what is no such note.
    """
    age_s, _, bound = query.partition("&")
    age, not_before = float(age_s), float(bound) if bound else -math.inf
    if not (math.isfinite(age) and age >= 0) or math.isnan(not_before):
        raise ValueError("not a time")
    return now - age, min(not_before, now)


def read(target: str) -> tuple[Note, str]:
    """Return a note and its query. Raises `ValueError` for a target that is none."""
    path, _, query = target.partition("?")
    return Note(path), query
