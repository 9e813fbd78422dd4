"""The sentences of the status that only several replicas can have."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.e2e.test_health import Health
from tests.support.replicas import ADMIN_TOKEN, SHARDS, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(400)]


HELD_BY = "SELECT FROM leases JOIN members ON holder = process WHERE name = 'second' FOR UPDATE OF leases"


async def test_replicas_without_agents_and_one_that_dies(tmp_path: Path, pg_url: str) -> None:
    from tests.support.postgres import locking  # noqa: PLC0415 - the driver is an extra

    person = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with gateway(tmp_path, pg_url) as gate, aiohttp.ClientSession(headers=person, timeout=timeout) as http:
        first, second = await gate.add("first", "second")
        health = Health(http, first)
        assert await gate.settled(first, second) == [SHARDS // 2, SHARDS // 2]
        await health.until("replica_without_links")
        with locking(pg_url, HELD_BY) as locked:
            assert locked == SHARDS // 2
            await second.kill()
            told = await health.until("shards_unowned")
            assert told["replicas"]["unowned"] == SHARDS // 2
            assert "without an owner: the links are down." in str(told["overall"])
        await health.gone("shards_unowned")
        assert await gate.settled(first) == [SHARDS]
        await health.until("replica_without_links")
