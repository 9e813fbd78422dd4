"""Leases as pure data and rules: how long a replica's right to its shards lasts, and who has which shard.

A replica is a row that it renews; the row is the lease of every shard that it holds. Its end is counted twice: by the
database's clock for everybody else, and by the replica's own monotonic clock, which always says "over" first.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LeasePolicy:
    """Times of a lease of `lease_s` seconds."""

    lease_s: float

    @property
    def renew_s(self) -> float:
        """Seconds between two renewals."""
        return self.lease_s / 3

    @property
    def margin_s(self) -> float:
        """Seconds by which the holder counts less than the database: clocks drift, closing a socket takes time."""
        return self.lease_s / 5

    @property
    def rides_out_s(self) -> float:
        """The longest outage of the database that never closes a link: it may begin just before a renewal is due."""
        return self.lease_s - self.margin_s - self.renew_s

    def ends_at(self, sent_at: float) -> float:
        """Return when the right ends that a renewal gives which was sent then."""
        return sent_at + self.lease_s - self.margin_s


class HeldLease:
    """The right of this replica to its shards. It ends by our own clock, whatever the database may say later."""

    __slots__ = ("_policy", "ends_at", "over")

    def __init__(self, policy: LeasePolicy, sent_at: float) -> None:
        self._policy = policy
        self.ends_at = policy.ends_at(sent_at)
        self.over = False

    def renewed(self, sent_at: float) -> None:
        """Extend the right: a renewal that was sent then is stored. One that comes too late gives nothing back."""
        if not self.over:
            self.ends_at = max(self.ends_at, self._policy.ends_at(sent_at))

    def valid(self, now: float) -> bool:
        """Return whether the right holds. Once it did not, it never does again."""
        if now >= self.ends_at:
            self.over = True
        return not self.over

    def end(self) -> None:
        """Give the right up."""
        self.over = True


@dataclass(frozen=True, slots=True)
class Member:
    """A replica as its row describes it. `process` is never used twice; `fingerprint` is its certificate's."""

    process: str
    name: str
    address: str
    fingerprint: str
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """All rows as they were read last: members by process, and (holder, fence) by shard."""

    members: dict[str, Member] = field(default_factory=dict)
    leases: dict[int, tuple[str, int]] = field(default_factory=dict)

    def owner(self, shard: int) -> Member | None:
        """Return the living replica that holds a shard. A holder without a row is gone, and its shards are free."""
        holder, _ = self.leases.get(shard, ("", 0))
        return self.members.get(holder)

    def holders(self) -> dict[int, str]:
        """Return the process that holds each shard that is held."""
        return {shard: holder for shard, (holder, _) in self.leases.items() if holder in self.members}


class ClockOffset:
    """A lower bound of (a peer's monotonic clock - ours).

    A moment of ours that is converted with it is never later on the peer's clock than it was. So "this poll came after
    that reply" is never claimed wrongly.
    """

    DRIFT = 1e-3

    def __init__(self) -> None:
        self._ahead_s: float | None = None
        self._at = 0.0

    def heard(self, its: float, ours: float) -> None:
        """Note that a message arrived at `ours` which was sent at `its`."""
        ahead = its - ours
        if self._ahead_s is None or ahead > self._ahead_s - (ours - self._at) * self.DRIFT:
            self._ahead_s, self._at = ahead, ours

    def in_its_terms(self, ours: float) -> float | None:
        """Return the same moment on the peer's clock or earlier, `None` while nothing is known."""
        return None if self._ahead_s is None else ours + self._ahead_s - max(0.0, ours - self._at) * self.DRIFT
