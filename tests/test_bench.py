"""The bench runs, and docs/performance.md and docs/sizing.md show what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import durable, latency, memory, sizing, throughput, traffic
from bench.__main__ import PARTS
from bench.report import DATA, PAGES, rendered

ROOT = Path(__file__).parents[1]
FOUND = json.loads(DATA.read_text())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_bench_runs(part: str, tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    args = ["--quick", "--only", part, "--json", str(written)]
    done = subprocess.run([sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert found["figures"]
    assert all(each["ours"] is not None for each in found["figures"])
    assert [row["agents"] for row in found["sizing"]] == (list(sizing.FEW) if part == "sizing" else [])
    assert "ours" in done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_figures_of_the_json(name: str) -> None:
    page = PAGES[name].read_text()
    assert rendered(page, name, FOUND) == page, "python -m bench --render"


def test_the_pages_are_of_a_whole_run() -> None:
    parts = {each["part"] for each in FOUND["figures"]}
    modules = (throughput.PART, memory.PART, durable.PART, traffic.PART, sizing.PART)
    assert parts == {latency.SIMULATED, latency.REAL, *modules}
    assert [row["agents"] for row in FOUND["sizing"]] == [*sizing.FEW, *sizing.MANY]
    aims = {each["what"]: each["met"] for each in FOUND["figures"] if each["aim"] is not None}
    assert f"growth over {memory.SOAK_CALLS:,} calls" in aims
    assert f"each of {memory.HELD:,} held polls" in aims
    assert {"heartbeats", "empty polls", "idle RSS", "idle RSS, absolute"} <= aims.keys()
    against = {each["against"] for each in FOUND["figures"]}
    assert {"aiohttp", "web.Application", "naive", "plain sqlite3", "hold off", "HTTP calls", "bare commit"} <= against
