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


def test_owners_and_shards_never_change() -> None:
    """Replicas of different versions must agree, and an owner is a key in the database."""
    key = b"k" * 32
    owner = "cbe2d061385212d1a27772f68ba2721e3d0d27c5caf5d43bb7f28ecf178a6de4"
    assert owner_id(key, "token") == owner
    assert [shard_of(owner, count) for count in (1, 16, 64, 1000)] == [0, 2, 50, 138]
    half = owner_id(key, "\udcff")  # a byte of a header that is no UTF-8
    assert 0 <= shard_of(half, 16) < 16
    assert 0 <= shard_of("\udcff", 16) < 16


def test_the_remainder_stays_where_most_shards_are() -> None:
    assert target_counts(5, {"a", "b"}, {"b": 1}) == {"a": 2, "b": 3}
    assert target_counts(5, {"a", "b"}, {}) == {"a": 3, "b": 2}


def test_shards_beyond_the_own_share_are_released_a_few_at_a_time() -> None:
    holders = dict.fromkeys(range(6), "a")
    assert plan_rebalance("a", 8, {"a", "b"}, holders) == Rebalance(release=(4, 5))
    assert plan_rebalance("a", 20, {"a", "b"}, dict.fromkeys(range(20), "a")) == Rebalance(release=(16, 17, 18, 19))
    assert plan_rebalance("c", 8, {"a", "b"}, holders) == Rebalance()
