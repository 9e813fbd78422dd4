"""The database fails over, and an owner is paused in the middle of a commit."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.postgres import PASSWORD, USER, Postgres
from tests.support.replicas import SHARDS, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(400)]

OUTAGE_S = 4.0


@pytest.fixture
def servers() -> Iterator[tuple[Postgres, Postgres]]:
    """A primary and its synchronous standby."""
    primary = Postgres()
    standby: Postgres | None = None
    try:
        primary.init()
        primary.start()
        primary.create("shim")
        standby = Postgres.standby_of(primary)
        yield primary, standby
    finally:
        for server in (primary, standby):
            if server is not None:
                server.remove()


def connect(url: str) -> Any:
    """A connection that sees the shim's tables."""
    import psycopg

    return psycopg.connect(url, autocommit=True, options="-c search_path=agent_shim")


def opened(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "opened"]


async def test_a_failover_that_the_lease_rides_out_closes_no_link(
    tmp_path: Path, servers: tuple[Postgres, Postgres]
) -> None:
    primary, standby = servers
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    url = f"postgresql://{USER}:{PASSWORD}@{hosts}/shim?sslmode=disable"
    async with gateway(tmp_path, url, lease_s=60) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        await gate.push(agent, "before")
        await gate.until_state(b, "before", "queued")
        await asyncio.to_thread(primary.kill)
        # Agents are served all the while: heartbeats at once, polls from memory.
        loop = asyncio.get_running_loop()
        until = loop.time() + OUTAGE_S
        while loop.time() < until:
            for replica in (a, b):
                assert await agent.heartbeat(replica) == 204
            await asyncio.sleep(0.2)
        await asyncio.to_thread(standby.promote)
        assert await agent.poll_until(b, "before") == ["before"]
        await agent.result(b, "before")
        await gate.push(agent, "after")
        assert await agent.poll_until(a, "after") == ["after"]
        for replica in (a, b):
            await gate.until_ready(replica)
            assert not replica.events("lease_lost")
        assert await gate.settled(a, b) == [SHARDS // 2, SHARDS // 2]
    assert len(opened(tmp_path)) == 1, "the link was closed"


async def test_a_replica_is_not_ready_while_its_lease_cannot_be_renewed(
    tmp_path: Path, servers: tuple[Postgres, Postgres]
) -> None:
    primary, _ = servers
    async with gateway(tmp_path, primary.url(), lease_s=5) as gate:
        (a,) = await gate.add("a")
        await gate.until_ready(a)
        await asyncio.to_thread(primary.stop)
        await a.event("lease_lost", reason="expired")
        async with asyncio.timeout(60):
            while (told := await gate.admin(a, "/readyz")) == {"status": "ready"}:  # noqa: ASYNC110 - kept for 2 s
                await asyncio.sleep(0.1)
        assert told["reasons"] == ["the store cannot be written"]
        await asyncio.to_thread(primary.start)
        await gate.until_ready(a)


async def test_a_command_that_cannot_be_stored_is_refused_before_the_lease_ends(
    tmp_path: Path, servers: tuple[Postgres, Postgres]
) -> None:
    primary, _ = servers
    async with gateway(tmp_path, primary.url(), lease_s=40) as gate:
        (a,) = await gate.add("a")
        await gate.settled(a)
        agent = gate.agent(1)
        await agent.register(a)
        await asyncio.to_thread(primary.stop)
        await gate.push(agent, "refused")
        found = await gate.controller.control("GET", "/control/commands/refused?wait=result&timeout_s=60")
        assert found["results"][0]["payload"]["code"] == "store_unavailable"


async def test_an_owner_that_is_paused_in_a_transaction_neither_blocks_nor_commits(tmp_path: Path, pg_url: str) -> None:
    # On a busy machine a short lease ends by itself, and then it is not the owner who is paused.
    async with gateway(tmp_path, pg_url, lease_s=20) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agent = gate.agent(1)
        await agent.register(a)
        owner = await gate.owner(agent)
        other = b if owner is a else a
        with closing(connect(pg_url)) as connection:
            # The owner's transaction waits for the lease's row, and gets it while the owner stands still.
            connection.execute("BEGIN")
            connection.execute("SELECT FROM leases FOR UPDATE")
            await gate.push(agent, "half")
            async with asyncio.timeout(60):
                waiting = (
                    "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                    " WHERE NOT granted AND query LIKE 'UPDATE leases SET batch = %'"
                )
                with closing(connect(pg_url)) as looking:
                    while looking.execute(waiting).fetchall()[0][0] == 0:  # noqa: ASYNC110 - another process's lock
                        await asyncio.sleep(0.05)
            owner.send(signal.SIGSTOP)
            assert not owner.events("lease_lost")
            connection.execute("COMMIT")
            assert await gate.settled(other) == [SHARDS]
            assert await agent.heartbeat(other) == 204
            await gate.until_online(other)
            await gate.push(agent, "whole")
            assert await agent.poll_until(other, "whole") == ["whole"]
            owner.send(signal.SIGCONT)
            await owner.event("lease_lost")
            await gate.settled(owner, other)
            assert connection.execute("SELECT count(*) FROM commands WHERE id = 'half'").fetchall() == [(0,)]
        await agent.result(other, "whole")
