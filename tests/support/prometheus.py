"""A real Prometheus, with the test as its Alertmanager: what it scrapes, evaluates and sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from tests.support.processes import free_port

WAIT_S = 90.0
EVERY = "500ms"


class Prometheus:
    """Its query API, and the alerts that it sent."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = self._url = url
        self._firing: set[str] = set()
        self._changed = asyncio.Condition()

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query, which must be a valid one."""
        async with self._session.post(f"{self._url}/api/v1/query", data={"query": expression}) as response:
            answer = await response.json()
            assert answer["status"] == "success", (expression, answer)
            result: list[dict[str, Any]] = answer["data"]["result"]
            return result

    async def until_query(
        self, expression: str, fits: Callable[[list[dict[str, Any]]], bool] = bool
    ) -> list[dict[str, Any]]:
        """Ask until a result fits: a scrape that a busy machine was too slow for leaves a gap of a moment."""
        async with asyncio.timeout(WAIT_S):
            while not fits(result := await self.query(expression)):  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.1)
        return result

    async def names(self) -> set[str]:
        """The names of all series."""
        async with self._session.get(f"{self._url}/api/v1/label/__name__/values") as response:
            return set((await response.json())["data"])

    async def until(self, alert: str, *, firing: bool) -> None:
        """Wait until Prometheus has sent word that the alert fires, or that it fires no more."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: (alert in self._firing) is firing)

    async def receive(self, request: web.Request) -> web.Response:
        """An Alertmanager's `POST /api/v2/alerts`: an alert that does not fire any more ended in the past."""
        now = datetime.now(UTC)
        async with self._changed:
            for alert in await request.json():
                over = datetime.fromisoformat(alert["endsAt"]) <= now
                (self._firing.discard if over else self._firing.add)(alert["labels"]["alertname"])
            self._changed.notify_all()
        return web.Response()


@asynccontextmanager
async def prometheus(
    folder: Path,
    targets: Mapping[str, str],
    rules: Mapping[str, str],
    clusters: Mapping[str, str] | None = None,
    every: str = EVERY,
) -> AsyncIterator[Prometheus]:
    """One that scrapes `targets` (job -> host:port) and evaluates `rules` (file name -> text) twice a second.

    `clusters` (job -> name) gives the label that a Prometheus of several clusters adds. A scrape may take as long as
    the time between two: where a lost one would change what is seen, give it more.
    """
    address = f"127.0.0.1:{free_port()}"
    async with aiohttp.ClientSession() as session:
        it = Prometheus(session, f"http://{address}")
        app = web.Application()
        app.router.add_post("/api/v2/alerts", it.receive)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        labels = {job: {"cluster": name} for job, name in (clusters or {}).items()}
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            manager = f"127.0.0.1:{runner.addresses[0][1]}"
            async with _running(_configure(folder, targets, rules, manager, labels, every), folder, address):
                yield it
        finally:
            await runner.cleanup()


def _configure(
    folder: Path,
    targets: Mapping[str, str],
    rules: Mapping[str, str],
    manager: str,
    labels: Mapping[str, dict[str, str]],
    every: str,
) -> Path:
    for name, text in rules.items():
        (folder / name).write_text(text)
    configuration = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(folder / name) for name in rules],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [manager]}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target], "labels": labels.get(job, {})}]}
            for job, target in targets.items()
        ],
    }
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return path


@asynccontextmanager
async def _running(configuration: Path, folder: Path, address: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--rules.alert.resend-delay=1s",
        "--log.level=info",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    lines: list[bytes] = []
    drain: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(WAIT_S):
            async for line in process.stderr:
                lines.append(line)
                if b"Server is ready" in line:
                    break
            else:
                raise AssertionError(b"".join(lines).decode())
        drain = asyncio.create_task(process.stderr.read())
        yield
    finally:
        process.kill()
        await process.wait()
        if drain is not None:
            await drain
