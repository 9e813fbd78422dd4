"""Replicas as processes are driven into the sentences that only several of them can say."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.e2e.test_health import Health
from tests.support.replicas import ADMIN_TOKEN, SHARDS, gateway

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]


async def test_replicas_without_agents_and_one_that_dies(tmp_path: Path, pg_url: str) -> None:
    person = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with gateway(tmp_path, pg_url) as gate, aiohttp.ClientSession(headers=person, timeout=timeout) as http:
        first, second = await gate.add("first", "second")
        health = Health(http, first)
        await gate.settled(first, second)
        await health.until("replica_without_links")
        await second.kill()
        told = await health.until("shards_unowned")
        assert 0 < told["replicas"]["unowned"] <= SHARDS // 2  # the first takes them, as many at a time as it opens
        assert "without an owner: links are down." in str(told["overall"])
        await health.gone("shards_unowned")
        await gate.settled(first)
        await health.until("replica_without_links")
