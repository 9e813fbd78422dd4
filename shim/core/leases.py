"""Leases as pure data and rules: how long a right lasts, and what is seen of others' (docs/scaling.md).

A lease is an entry that its holder renews and that the servers forget `lease_s` after they stored it. Its revision is
the fencing token: whoever renews names the revision that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class LeasePolicy:
    """Times of a lease of `lease_s` seconds."""

    lease_s: float

    @property
    def renew_s(self) -> float:
        """How often it is renewed."""
        return self.lease_s / 3

    @property
    def margin_s(self) -> float:
        """How much earlier than the servers its holder takes it as over: clocks drift, closing a socket takes time."""
        return self.lease_s / 5

    def ends_at(self, sent_at: float) -> float:
        """When the right ends that a renewal gave which was sent then: the servers count from when it was stored."""
        return sent_at + self.lease_s - self.margin_s

    def forgotten_at(self, seen_at: float) -> float:
        """When an entry that was seen then is gone from the servers, unless it was renewed."""
        return seen_at + self.lease_s


class Entry(msgspec.Struct, frozen=True):
    """The value of a lease or of a membership. `process` is empty in a lease that was given back.

    `clock` is the writer's monotonic time when it wrote. `leaving`: a member that gives its shards away.
    """

    process: str
    name: str = ""
    clock: float = 0.0
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Sighting:
    """An entry as it was last seen, and when, on our clock."""

    entry: Entry
    revision: int
    seen_at: float


class Sightings:
    """What is known of the entries of a bucket. One that is not renewed is forgotten as the servers do it."""

    def __init__(self, policy: LeasePolicy) -> None:
        self._policy = policy
        self._known: dict[str, Sighting] = {}
        self._newest: dict[str, int] = {}

    def saw(self, key: str, sighting: Sighting) -> bool:
        """An entry was seen. True if something changed but the time.

        Seen again it is as old as it was: the servers count from when it was written, and may drop it a little late.
        """
        if self._newest.get(key, 0) >= sighting.revision:
            return False
        self._newest[key] = sighting.revision
        before = self._known.get(key)
        self._known[key] = sighting
        if before is None:
            return True
        old, new = before.entry, sighting.entry
        return (old.process, old.name, old.leaving) != (new.process, new.name, new.leaving)

    def get(self, key: str) -> Sighting | None:
        """The entry of this key, `None` where there is none."""
        return self._known.get(key)

    def forget(self, now: float) -> bool:
        """Drop what the servers have dropped. True if that was any."""
        gone = [key for key, each in self._known.items() if now >= self._policy.forgotten_at(each.seen_at)]
        for key in gone:
            del self._known[key]
        return bool(gone)

    def drop(self, key: str) -> None:
        """Its holder does not count on it any more."""
        self._known.pop(key, None)

    def items(self) -> Iterator[tuple[str, Sighting]]:
        """All entries."""
        return iter(list(self._known.items()))


class Term:
    """The right to a lease that we hold. It ends by our own clock, whatever the servers may say later."""

    __slots__ = ("_policy", "ends_at", "over", "revision")

    def __init__(self, policy: LeasePolicy, sent_at: float, revision: int) -> None:
        self._policy = policy
        self.revision = revision
        self.ends_at = policy.ends_at(sent_at)
        self.over = False

    def renewed(self, sent_at: float, revision: int) -> None:
        """A renewal that was sent then was stored. One that comes too late gives nothing back."""
        self.revision = revision
        if not self.over:
            self.ends_at = max(self.ends_at, self._policy.ends_at(sent_at))

    def valid(self, now: float) -> bool:
        """Whether it is still ours. Once it was not, it never is again."""
        if now >= self.ends_at:
            self.over = True
        return not self.over

    def end(self) -> None:
        """Give it up."""
        self.over = True


class Offset:
    """How far a peer's monotonic clock is ahead of ours, at least: what it read before we heard of it.

    So that a moment of ours, told in its terms, is never later than it was.
    """

    DRIFT = 1e-3

    def __init__(self) -> None:
        self._ahead_s: float | None = None
        self._at = 0.0

    def heard(self, its: float, ours: float) -> None:
        """A message came in at `ours` that was sent at `its`."""
        ahead = its - ours
        if self._ahead_s is None or ahead > self._ahead_s - (ours - self._at) * self.DRIFT:
            self._ahead_s, self._at = ahead, ours

    def in_its_terms(self, ours: float) -> float | None:
        """The same moment on the peer's clock or earlier; `None` where nothing is known."""
        return None if self._ahead_s is None else ours + self._ahead_s - max(0.0, ours - self._at) * self.DRIFT
