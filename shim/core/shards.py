"""Shards and their leases as pure data and rules: a token's shard, each shard's holder, and how long a lease is valid.

A replica is a database row that it renews; the row is the lease of every shard it holds. The end of a lease is computed
twice: by the database's clock for the other replicas, and earlier by the holder's own monotonic clock. So the holder
always stops before another replica may take over.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter
from collections.abc import Collection, Mapping

import msgspec


class LeasePolicy(msgspec.Struct, frozen=True):
    """Times of a lease of `lease_s` seconds."""

    lease_s: float

    @property
    def renew_s(self) -> float:
        """Seconds between two renewals."""
        return self.lease_s / 3

    @property
    def margin_s(self) -> float:
        """Seconds by which the holder ends its lease early: clocks drift, and closing a socket takes time."""
        return self.lease_s / 5

    @property
    def rides_out_s(self) -> float:
        """Longest outage of the database in seconds that closes no link.

        The outage may begin just before a renewal is due.
        """
        return self.lease_s - self.margin_s - self.renew_s

    @property
    def refuse_after_s(self) -> float:
        """Longest wait in seconds of a submission for the database: its refusal goes out before the links close."""
        return min(8.0, 0.8 * self.rides_out_s)

    def ends_at(self, sent_at: float) -> float:
        """Return the monotonic time at which a lease ends that was renewed by a request sent at `sent_at`."""
        return sent_at + self.lease_s - self.margin_s


class HeldLease:
    """The lease of this replica. It ends by the local clock, even if the database still shows it as valid."""

    __slots__ = ("_policy", "ends_at", "over")

    def __init__(self, policy: LeasePolicy, sent_at: float) -> None:
        self._policy = policy
        self.ends_at = policy.ends_at(sent_at)
        self.over = False

    def renewed(self, sent_at: float) -> None:
        """Extend the lease by a stored renewal that was sent at `sent_at`. A lease that is over stays over."""
        if not self.over:
            self.ends_at = max(self.ends_at, self._policy.ends_at(sent_at))

    def valid(self, now: float) -> bool:
        """Return True if the lease is valid. Once it was not, it never is again."""
        if now >= self.ends_at:
            self.over = True
        return not self.over

    def end(self) -> None:
        """End the lease now."""
        self.over = True


class Member(msgspec.Struct, frozen=True):
    """A replica as described by its row. `process` is never reused; `fingerprint` is that of its certificate."""

    process: str
    name: str
    address: str
    fingerprint: str
    leaving: bool = False


class View(msgspec.Struct, frozen=True):
    """All rows as last read: members by process, and (holder, fence) by shard."""

    members: dict[str, Member] = msgspec.field(default_factory=dict)
    leases: dict[int, tuple[str, int]] = msgspec.field(default_factory=dict)

    def owner(self, shard: int) -> Member | None:
        """Return the replica that holds a shard. A holder without a row is gone, so its shards are free."""
        holder, _ = self.leases.get(shard, ("", 0))
        return self.members.get(holder)

    def holders(self) -> dict[int, str]:
        """Return the holder's process by shard, for shards with a living holder."""
        return {shard: holder for shard, (holder, _) in self.leases.items() if holder in self.members}


class ClockOffset:
    """Lower bound of (a peer's monotonic clock - ours).

    Converting a local time with it never yields a later time on the peer's clock. So a poll is never wrongly found to
    be later than a reply.
    """

    DRIFT = 1e-3

    def __init__(self) -> None:
        self._ahead_s: float | None = None
        self._at = 0.0

    def update(self, its: float, ours: float) -> None:
        """Record a message sent at `its` (peer's clock) and received at `ours`. An impossible time is ignored."""
        if not math.isfinite(its):
            return
        ahead = its - ours
        if self._ahead_s is None or ahead > self._ahead_s - (ours - self._at) * self.DRIFT:
            self._ahead_s, self._at = ahead, ours

    def to_peer(self, ours: float) -> float | None:
        """Convert a local time to the peer's clock, or an earlier time. Returns `None` while no message has arrived."""
        return None if self._ahead_s is None else ours + self._ahead_s - max(0.0, ours - self._at) * self.DRIFT


# --- the owner of a token, and the shards of a replica ----------------------------------------------------------------


def owner_id(key: bytes, token: str) -> str:
    """Return the owner of a token's sessions: 64 hexadecimal digits, which cannot be computed without the key."""
    return hmac.digest(key, token.encode("utf-8", "surrogatepass"), "sha256").hex()


def shard_of(owner: str, count: int) -> int:
    """Return the shard of an owner, a number below `count`."""
    return int(hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) % count


AT_ONCE = 4
"""Shards that a replica releases at a time. Their links are closed meanwhile; all others stay connected."""


class Rebalance(msgspec.Struct, frozen=True):
    """Shards that a replica has to acquire and to release now."""

    acquire: tuple[int, ...] = ()
    release: tuple[int, ...] = ()


def target_counts(count: int, members: Collection[str], held: Mapping[str, int]) -> dict[str, int]:
    """Return the number of shards for each member, of which there is at least one.

    The remainder goes to the members that hold the most already.
    """
    base, odd = divmod(count, len(members))
    favoured = sorted(members, key=lambda member: (-held.get(member, 0), member))[:odd]
    return {member: base + (member in favoured) for member in sorted(members)}


def plan_rebalance(me: str, count: int, members: Collection[str], holders: Mapping[int, str]) -> Rebalance:
    """Return the shards that `me` has to acquire or to release.

    `members` are the living replicas that are not leaving. `holders` maps each leased shard to its holder. A holder
    that is no member is leaving, so its shards count as free soon.
    """
    if me not in members:
        return Rebalance()
    held = Counter(holders.values())
    share = target_counts(count, members, held)
    missing = {member: max(0, share[member] - held[member]) for member in share}
    if missing[me]:
        return Rebalance(acquire=_to_acquire(me, count, missing, holders))
    mine = sorted(shard for shard, holder in holders.items() if holder == me)
    # The targets add up to all shards, so another member misses each shard that is too many here.
    surplus = held[me] - share[me]
    return Rebalance(release=tuple(mine[len(mine) - min(surplus, AT_ONCE) :]))


def _to_acquire(me: str, count: int, missing: Mapping[str, int], holders: Mapping[int, str]) -> tuple[int, ...]:
    """Return the free shards for `me`.

    They are dealt out by replica name, so that two replicas rarely want the same.
    """
    free = [shard for shard in range(count) if shard not in holders]
    start = sum(number for member, number in missing.items() if member < me)
    dealt = free[start : start + missing[me]]
    return tuple(dealt)
