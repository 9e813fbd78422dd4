"""Which owner a token belongs to, which shard an owner, and which replica a shard."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass


def owner_id(key: bytes, token: str) -> str:
    """The owner whose sessions a token sees: 64 hexadecimal digits, of no use without the key."""
    return hmac.digest(key, token.encode("utf-8", "surrogatepass"), "sha256").hex()


def shard_of(owner: str, count: int) -> int:
    """The link partition of an owner, below `count`."""
    return int(hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) % count


AT_ONCE = 4
"""How many shards a replica gives away at a time: their links are closed meanwhile, the others' are not."""


@dataclass(frozen=True, slots=True)
class Rebalance:
    """What a replica has to do now: shards to take, shards to give away."""

    take: tuple[int, ...] = ()
    give: tuple[int, ...] = ()


def target_counts(count: int, members: Collection[str], held: Mapping[str, int]) -> dict[str, int]:
    """How many shards each member should have. Who has more than the others already keeps the odd ones."""
    base, odd = divmod(count, len(members)) if members else (0, 0)
    favoured = sorted(members, key=lambda member: (-held.get(member, 0), member))[:odd]
    return {member: base + (member in favoured) for member in sorted(members)}


def plan_rebalance(me: str, count: int, members: Collection[str], holders: Mapping[int, str]) -> Rebalance:
    """What `me` has to do. `members` are the replicas that live and mean to stay, `holders` the leases that are held.

    A lease may be held by a replica that is no member: it is leaving, and its shards are as good as free.
    """
    if me not in members:
        return Rebalance()
    held = Counter(holders.values())
    share = target_counts(count, members, held)
    missing = {member: max(0, share[member] - held[member]) for member in share}
    if missing[me]:
        return Rebalance(take=_to_take(me, count, missing, holders))
    mine = sorted(shard for shard, holder in holders.items() if holder == me)
    unheld = count - sum(held[member] for member in share)
    wanted = sum(missing.values()) - unheld
    for member in share:
        surplus = max(0, held[member] - share[member])
        given = min(surplus, max(0, wanted))
        if member == me:
            return Rebalance(give=tuple(mine[len(mine) - min(given, AT_ONCE) :]))
        wanted -= given
    return Rebalance()


def _to_take(me: str, count: int, missing: Mapping[str, int], holders: Mapping[int, str]) -> tuple[int, ...]:
    """The free shards are dealt out in the order of names, so that two replicas seldom want the same one."""
    free = [shard for shard in range(count) if shard not in holders]
    start = sum(number for member, number in missing.items() if member < me)
    dealt = free[start : start + missing[me]]
    return tuple(dealt)
