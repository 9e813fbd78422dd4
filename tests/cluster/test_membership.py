"""A replica's membership in virtual time: renewed, over by its own clock, evicted, left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.cluster.membership import Membership
from shim.core.shards import LeasePolicy, Member, View
from shim.errors import StoreError
from tests.support.virtual import VirtualClock, run_virtual

ME = Member("first", "shim-0", "127.0.0.1:1", "f")


class Rows:
    """The database as a membership sees it."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.away = False

    async def agree(self, settings: dict[str, Any], limit_s: float) -> None:
        assert not self.away

    async def join(self, me: Member, lease_s: float, settings: dict[str, Any], limit_s: float) -> bool:
        self.members.add(me.process)
        return True

    async def renew(self, process: str, limit_s: float, *, leaving: bool) -> bool:
        if self.away:
            raise StoreError("away")
        return process in self.members

    async def read(self, limit_s: float) -> View:
        return View()

    async def leave(self, me: str, limit_s: float) -> None:
        self.members.discard(me)


def made(rows: Rows, ended: list[str]) -> Membership:
    database: Any = rows
    loop = asyncio.get_running_loop()
    return Membership(database, ME, {}, LeasePolicy(5.0), VirtualClock(loop), loop, ended.append)


def test_a_right_ends_by_our_own_clock_and_is_not_the_same_afterwards() -> None:
    async def scenario() -> None:
        rows, ended = Rows(), []
        membership = made(rows, ended)
        await membership.join()
        await asyncio.sleep(3)
        assert await membership.renew()
        await asyncio.sleep(3.9)
        assert membership.valid()
        rows.away = True
        assert not await membership.renew()
        await asyncio.sleep(0.2)
        assert not membership.valid()
        assert ended == ["expired"]
        rows.away = False
        assert await membership.renew()  # nobody has evicted it: the row is the same, the right is another
        assert membership.valid()
        assert membership.me.process == "first"

    run_virtual(scenario())


def test_who_was_evicted_joins_by_another_name() -> None:
    async def scenario() -> None:
        rows, ended = Rows(), []
        membership = made(rows, ended)
        await membership.join()
        rows.members.clear()
        assert await membership.renew()
        assert ended == ["taken"]
        assert membership.me.process != "first"
        assert rows.members == {membership.me.process}
        assert membership.valid()

    run_virtual(scenario())


def test_who_has_left_does_not_come_back() -> None:
    """Others would keep shards free for it until its row ran out."""

    async def scenario() -> None:
        rows, ended = Rows(), []
        membership = made(rows, ended)
        await membership.join()
        membership.leaving = True
        await membership.leave()
        assert await membership.renew()
        assert rows.members == set()
        assert not membership.valid()

    run_virtual(scenario())
