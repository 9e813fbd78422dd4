"""Assignment of tokens to owners, of owners to shards, and of shards to replicas."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Collection, Mapping

import msgspec


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
    """Return the number of shards for each member. The remainder goes to the members that hold the most already."""
    base, odd = divmod(count, len(members)) if members else (0, 0)
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
    unheld = count - sum(held[member] for member in share)
    wanted = sum(missing.values()) - unheld
    for member in share:
        surplus = max(0, held[member] - share[member])
        given = min(surplus, max(0, wanted))
        if member == me:
            return Rebalance(release=tuple(mine[len(mine) - min(given, AT_ONCE) :]))
        wanted -= given
    return Rebalance()


def _to_acquire(me: str, count: int, missing: Mapping[str, int], holders: Mapping[int, str]) -> tuple[int, ...]:
    """Return the free shards for `me`.

    They are dealt out by replica name, so that two replicas rarely want the same.
    """
    free = [shard for shard in range(count) if shard not in holders]
    start = sum(number for member, number in missing.items() if member < me)
    dealt = free[start : start + missing[me]]
    return tuple(dealt)
