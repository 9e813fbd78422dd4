"""Rows of members and leases on a real PostgreSQL: whoever has a right, and who ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shim.config import settings
from shim.core.shards import Member
from shim.errors import ConfigError, StoreError

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(400)]

LIMIT_S = 30.0
AGREED = {"cluster.lease_s": 1}


def member(process: str) -> Member:
    return Member(process, f"replica {process}", "127.0.0.1:1", "fingerprint")


class Replicas:
    """Connections of several replicas to one database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._made: list[Any] = []

    def of(self, process: str, **store: Any) -> Any:
        from shim.cluster.database import Database  # noqa: PLC0415 - the driver is an extra
        from shim.store.postgres.dsn import application, conninfo  # noqa: PLC0415

        configured = settings.Store(url=self._url, **store)
        self._made.append(Database(lambda: conninfo(configured, application(process))))
        return self._made[-1]

    async def close(self) -> None:
        for each in self._made:
            await each.close()


@pytest.fixture
async def replicas(pg_url: str) -> AsyncIterator[Replicas]:
    from shim.store.postgres.database import prepare  # noqa: PLC0415 - the driver is an extra

    await asyncio.to_thread(prepare, settings.Store(url=pg_url))
    made = Replicas(pg_url)
    yield made
    await made.close()


async def joined(replicas: Replicas, process: str, lease_s: float = 60) -> Any:
    database = replicas.of(process)
    await database.agree(AGREED, LIMIT_S)
    assert await database.join(member(process), lease_s, AGREED, LIMIT_S)
    return database


async def test_joining_may_be_repeated_because_its_answer_may_be_lost(replicas: Replicas) -> None:
    a = await joined(replicas, "a")
    assert await a.join(member("a"), 60, AGREED, LIMIT_S)
    assert not await a.join(member("a"), 60, {"cluster.lease_s": 2}, LIMIT_S)
    assert set((await a.read(LIMIT_S)).members) == {"a"}


async def test_a_password_file_that_is_away_ends_no_task_of_a_replica(replicas: Replicas, tmp_path: Path) -> None:
    from tests.support.postgres import PASSWORD  # noqa: PLC0415 - the driver is an extra

    a = await joined(replicas, "a")
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    other = replicas.of("a", password_file=str(file))
    assert set((await other.read(LIMIT_S)).members) == {"a"}
    await other.close()
    file.unlink()
    with pytest.raises(StoreError, match=r"store\.password_file"):
        await other.read(LIMIT_S)
    file.write_text(PASSWORD)
    assert (await other.read(LIMIT_S)) == await a.read(LIMIT_S)


async def test_a_shard_has_one_holder_until_it_is_given_back(replicas: Replicas) -> None:
    a, b = await joined(replicas, "a"), await joined(replicas, "b")
    assert await a.acquire(3, "a", LIMIT_S) == 1
    assert await b.acquire(3, "b", LIMIT_S) is None
    assert await a.acquire(3, "a", LIMIT_S) == 2  # after its own count was over: its earlier self is fenced
    await a.release([3], "a", LIMIT_S)
    assert await b.acquire(3, "b", LIMIT_S) == 3
    view = await a.read(LIMIT_S)
    assert view.holders() == {3: "b"}
    assert set(view.members) == {"a", "b"}
    assert len(view.leases) == 16


async def test_who_is_evicted_cannot_renew_and_its_shards_are_free(replicas: Replicas) -> None:
    a, b = await joined(replicas, "a", lease_s=0.3), await joined(replicas, "b")
    assert await a.acquire(0, "a", LIMIT_S) == 1
    assert await b.acquire(0, "b", LIMIT_S) is None
    async with asyncio.timeout(60):
        while "a" in (await b.read(LIMIT_S)).members:  # noqa: ASYNC110 - the database's clock
            await asyncio.sleep(0.05)
    assert await b.acquire(0, "b", LIMIT_S) == 2
    with pytest.raises(StoreError):  # its connections were ended, too
        await a.renew("a", LIMIT_S, leaving=False)
    assert not await a.renew("a", LIMIT_S, leaving=False)
    assert await replicas.of("a").acquire(1, "a", LIMIT_S) is None  # who is no member takes nothing


async def test_a_row_that_was_not_evicted_may_be_renewed_late(replicas: Replicas) -> None:
    a = await joined(replicas, "a", lease_s=0.05)
    await asyncio.sleep(0.2)
    assert await a.renew("a", LIMIT_S, leaving=True)


async def test_a_row_that_another_server_dated_waits_one_lease_longer(replicas: Replicas, pg_url: str) -> None:
    from tests.support.postgres import query  # noqa: PLC0415 - the driver is an extra

    b = await joined(replicas, "b")
    await joined(replicas, "a")
    for late_s, stays in ((30, True), (90, False)):
        until = f"until = clock_timestamp() - make_interval(secs => {late_s})"
        statement = f"UPDATE members SET {until}, server = server - interval '1 day' WHERE process = 'a'"  # noqa: S608
        await asyncio.to_thread(query, pg_url, statement)
        assert ("a" in (await b.read(LIMIT_S)).members) is stays


async def test_what_is_agreed_on_changes_only_while_nobody_lives(replicas: Replicas) -> None:
    a = await joined(replicas, "a")
    other = replicas.of("c")
    with pytest.raises(ConfigError, match=r"cluster\.lease_s: the replicas that run on this database"):
        await other.agree({"cluster.lease_s": 2}, LIMIT_S)
    assert not await other.join(member("c"), 60, {"cluster.lease_s": 2}, LIMIT_S)
    await a.leave("a", LIMIT_S)
    first = await other.agree({"cluster.lease_s": 2}, LIMIT_S)
    assert await other.join(member("c"), 60, {"cluster.lease_s": 2}, LIMIT_S)
    second = await replicas.of("d").agree({"cluster.lease_s": 2}, LIMIT_S)
    assert (first.owner_key, first.secret, first.shards) == (second.owner_key, second.secret, second.shards)
    assert "secret" not in repr(first) or first.secret not in repr(first)


async def test_a_change_is_hinted_at(replicas: Replicas) -> None:
    a, b = await joined(replicas, "a"), await joined(replicas, "b")
    hinted = asyncio.Event()

    async def listen() -> None:
        async for _ in b.notifications():
            hinted.set()

    task = asyncio.create_task(listen())
    async with asyncio.timeout(60):
        while not hinted.is_set():
            await a.acquire(5, "a", LIMIT_S)
            await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
