"""The shard of a token, and the replica that owns it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.cluster.shard_manager import ShardLocator
from shim.core.shards import Member, View, owner_id, shard_of

KEY = b"k" * 32
ME, OTHER = (Member(name, name, "127.0.0.1:1", "f") for name in ("me", "other"))


class Shards:
    """Shards of this replica by number."""

    def __init__(self, *usable: int) -> None:
        self._usable = usable

    def usable(self, number: int) -> Any:
        return f"shard {number}" if number in self._usable else None


class Membership:
    me = ME

    def __init__(self, **holders: int) -> None:
        self.view = View({"me": ME, "other": OTHER}, {number: (name, 1) for name, number in holders.items()})


def made(shards: Any, membership: Any, *, own_tokens: bool = True) -> ShardLocator:
    locator = ShardLocator(shards, membership, own_tokens=own_tokens)
    locator.agree(KEY, 16)
    return locator


def number_of(token: str) -> int:
    return shard_of(owner_id(KEY, token), 16)


def test_nothing_is_found_before_the_replicas_agree() -> None:
    membership: Any = Membership()
    shards: Any = Shards(*range(16))
    locator = ShardLocator(shards, membership, own_tokens=True)
    assert locator.shard_of("t") is None
    assert locator.local("t") is None
    assert not locator.is_elsewhere("t")
    assert locator.remote_owner("t") is None


def test_a_shard_is_here_elsewhere_or_nowhere() -> None:
    number = number_of("t")
    here = made(Shards(number), Membership(me=number))
    assert (here.local("t"), here.is_elsewhere("t"), here.remote_owner("t")) == (f"shard {number}", False, None)
    elsewhere = made(Shards(), Membership(other=number))
    assert (elsewhere.local("t"), elsewhere.is_elsewhere("t"), elsewhere.remote_owner("t")) == (None, True, OTHER)
    for nowhere in (made(Shards(), Membership()), made(Shards(), Membership(gone=number))):
        assert (nowhere.local("t"), nowhere.is_elsewhere("t"), nowhere.remote_owner("t")) == (None, True, None)
    being_opened = made(Shards(), Membership(me=number))
    assert being_opened.is_elsewhere("t")
    assert being_opened.remote_owner("t") is None


def test_a_caller_without_a_token_has_no_shard_where_agents_bring_their_own() -> None:
    assert made(Shards(), Membership()).shard_of("") is None
    common = made(Shards(), Membership(), own_tokens=False)
    assert common.shard_of("") is not None
    assert common.shard_of("") == common.shard_of("t")
