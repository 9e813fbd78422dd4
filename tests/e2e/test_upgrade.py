"""The files of the version before work after an upgrade: its configuration and its database, with a real process."""

from __future__ import annotations

import gzip
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from devtools.controller.server import DevController
from tests.support.processes import Shim

BEFORE = Path(__file__).parents[1] / "fixtures" / "version-before"
AGENTS = "/api/v1/clusters/agent"
CLUSTERS = {1: "cl-8f049eace92054b7", 2: "cl-2d4427594fc3525b"}
TIMES = {"commands": ("updated", "arrived", "expires"), "sessions": ("last_seen",)}

pytestmark = pytest.mark.timeout(120)


def restored(path: Path) -> Path:
    """Unpack the database, and move its times to now: its commands and sessions have not expired yet."""
    path.write_bytes(gzip.decompress((BEFORE / "agent-shim.db.gz").read_bytes()))
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        last = database.execute("SELECT max(updated) FROM commands").fetchone()[0]
        for table, names in TIMES.items():
            shifted = ", ".join(f"{name} = {name} + {time.time() - last:.3f}" for name in names)
            database.execute(f"UPDATE {table} SET {shifted}")  # noqa: S608 - the names are those above
    return path


async def call(http: aiohttp.ClientSession, shim: Shim, agent: int, method: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer token-of-agent-{agent}"}
    async with http.request(method, f"{shim.url}{AGENTS}/{path}", json=body, headers=headers) as response:
        text = await response.text()
        assert response.status == 200, text
        return json.loads(text)


async def beat(http: aiohttp.ClientSession, shim: Shim, agent: int) -> None:
    body = {"cluster_id": CLUSTERS[agent], "agent_id": f"agent-{agent}", "status": "healthy"}
    await call(http, shim, agent, "POST", f"{CLUSTERS[agent]}/heartbeat", body)


def upgraded(folder: Path, url: str) -> tuple[Shim, list[str]]:
    """Return a shim with the whole example configuration of the version before, and its arguments."""
    shim = Shim(folder, {})
    (folder / "agent-shim.yaml").write_bytes((BEFORE / "agent-shim.yaml").read_bytes())
    path = restored(folder / "agent-shim.db")
    sets = (f"upstream.url={url}", "listen.port=0", "admin.port=0", f"store.path={path}")
    return shim, [part for pair in sets for part in ("--set", pair)]


async def test_a_database_and_a_configuration_of_the_version_before_are_used_as_they_are(tmp_path: Path) -> None:
    tokens = [f"token-of-agent-{agent}" for agent in CLUSTERS]
    async with DevController(tokens) as controller, aiohttp.ClientSession() as http:
        shim, options = upgraded(tmp_path, controller.url)
        async with shim:
            await shim.start(*options)
            doubts = [event["warning"] for event in shim.events("config_doubtful")]
            assert [doubt.partition(" ")[0] for doubt in doubts] == [
                "shards",
                "store.credentials_file",
                "store.replicas",
            ]
            assert not shim.events("store_corrupt")

            # Its owner key still tells one token from another: each agent has its own session, and no other's commands.
            await beat(http, shim, 1)
            register = await controller.received("register", timeout_s=60)
            assert register.payload is not None
            assert (register.payload["name"], register.payload["cluster_id"]) == ("cluster-1", CLUSTERS[1])
            assert (await call(http, shim, 1, "GET", f"{CLUSTERS[2]}/poll"))["commands"] == []

            # What was stored and not confirmed is sent, and what waited is delivered, in the order of arrival.
            seen = 0
            results = []
            for _ in range(2):
                event = await controller.received("command_result", after=seen, timeout_s=60)
                assert event.payload is not None
                seen = event.n
                results.append((event.payload["command_id"], event.payload["output"]))
            assert results == [("command-done", "done"), ("command-fetched", "stored while the controller was away")]
            found = (await call(http, shim, 2, "GET", f"{CLUSTERS[2]}/poll"))["commands"]
            assert [command["id"] for command in found] == ["command-waiting-1", "command-waiting-2"]
            for command in found:
                path = f"{CLUSTERS[2]}/commands/{command['id']}/result"
                await call(http, shim, 2, "POST", path, {"success": True, "output": "after the upgrade"})
            for command in found:
                event = await controller.received("command_result", after=seen, timeout_s=60)
                assert event.payload is not None
                seen = event.n
                assert (event.payload["command_id"], event.payload["output"]) == (command["id"], "after the upgrade")
            assert await shim.stop() == 0
