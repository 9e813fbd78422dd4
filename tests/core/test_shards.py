"""Who has what, and for how long: the pure rules, with many replicas in virtual time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shim.core.shards import AT_ONCE, Rebalance, owner_id, plan_rebalance, shard_of, target_counts

names = st.sets(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6)


@given(st.integers(1, 256), st.binary(min_size=32, max_size=32), st.text(max_size=40))
def test_a_token_has_one_shard_whatever_it_holds(count: int, key: bytes, token: str) -> None:
    owner = owner_id(key, token)
    assert shard_of(owner, count) == shard_of(owner_id(key, token), count) in range(count)


def test_tokens_spread_over_shards() -> None:
    found = Counter(shard_of(owner_id(b"k" * 32, f"token-{n}"), 16) for n in range(4000))
    assert set(found) == set(range(16))
    assert min(found.values()) > 150


@given(st.integers(1, 64), names, st.data())
def test_shares_are_fair_and_complete(count: int, members: set[str], data: st.DataObject) -> None:
    held = {member: data.draw(st.integers(0, count)) for member in members}
    share = target_counts(count, members, held)
    assert sum(share.values()) == count
    assert max(share.values()) - min(share.values()) <= 1


def settle(count: int, members: set[str], holders: dict[int, str]) -> int:
    """Let every member do what it has to do until nobody has anything to do; how often a shard changed hands."""
    changed = 0
    for _ in range(20 * count + 20):
        todo = {member: plan_rebalance(member, count, members, holders) for member in sorted(members)}
        if not any(each.acquire or each.release for each in todo.values()):
            return changed
        for member, each in todo.items():
            assert len(each.release) <= AT_ONCE
            for shard in each.release:
                assert holders.pop(shard) == member
            for shard in each.acquire:
                assert shard not in holders
                holders[shard] = member
                changed += 1
    raise AssertionError("it never comes to rest")


@given(st.integers(1, 40), names, names, st.data())
def test_replicas_come_and_go_and_every_shard_is_held_evenly(
    count: int, before: set[str], after: set[str], data: st.DataObject
) -> None:
    holders: dict[int, str] = {}
    settle(count, before, holders)
    assert sorted(holders) == list(range(count))
    holders = {shard: holder for shard, holder in holders.items() if holder in after}
    free = count - len(holders)
    spread = Counter(holders.values())
    changed = settle(count, after, holders)
    assert sorted(holders) == list(range(count))
    now = Counter(dict.fromkeys(after, 0))
    now.update(holders.values())
    assert max(now.values()) - min(now.values()) <= 1
    # Nothing moves that need not: what was free, and what somebody had too much of.
    surplus = sum(max(0, spread[member] - count // len(after)) for member in after)
    assert changed <= free + surplus


@given(st.integers(1, 40), names)
def test_what_is_even_stays_as_it_is(count: int, members: set[str]) -> None:
    holders: dict[int, str] = {}
    settle(count, members, holders)
    assert {plan_rebalance(member, count, members, holders) for member in members} == {Rebalance()}


def test_who_is_leaving_takes_nothing_and_its_shards_wait_for_nobody() -> None:
    holders = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert plan_rebalance("b", 4, {"a"}, holders).acquire == ()
    assert plan_rebalance("a", 4, {"a"}, holders).release == ()
    assert plan_rebalance("a", 4, {"a"}, {0: "a", 1: "a"}).acquire == (2, 3)
