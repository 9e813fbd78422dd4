"""bench.nats runs, and docs/scaling.md shows what it measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench import nats
from bench.servers import ROOT

FOUND = json.loads(nats.DATA.read_text())


@pytest.mark.timeout(300)
@pytest.mark.needs("nats-server")
def test_it_runs() -> None:
    args = [sys.executable, "-m", "bench.nats", "--quick"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "publish + fetch" in done.stdout
    assert f"{nats.REPLICAS} replicas" in done.stdout


def test_the_page_shows_the_figures_beside_it() -> None:
    page = nats.PAGE.read_text()
    assert nats.rendered(page, FOUND) == page


def test_the_figures_are_of_a_whole_run() -> None:
    assert [row["agents"] for row in FOUND["rows"]] == list(nats.AGENTS)
    assert {each["against"] for each in FOUND["figures"]} == {"publish + fetch"}
