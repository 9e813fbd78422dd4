"""The bench runs, and docs/reference/performance.md and docs/reference/sizing.md show what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import (
    database,
    durable,
    first_minutes,
    idle,
    latency,
    libraries,
    memory,
    overload,
    sizing,
    throughput,
    traffic,
)
from bench.__main__ import OF_DATABASE, PARTS
from bench.report import DATA, PAGES, merged, rendered
from bench.report import OF_DATABASE as TITLES
from tests.support.processes import UNMEASURED

ROOT = Path(__file__).parents[2]
FOUND = json.loads(DATA.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Every part, a little of it, all at the same time: what they find is no figure."""
    folder = tmp_path_factory.getbasetemp()
    command = [sys.executable, "-m", "bench", "--quick", "--only"]
    running = {
        part: subprocess.Popen(
            [*command, part, "--json", str(folder / f"{part}.json")],
            cwd=ROOT,
            env=os.environ | UNMEASURED,  # simulated hours, which measuring makes twice as long
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in PARTS
    }
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_bench_runs(
    part: str, runs: dict[str, subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shown, told = runs[part].communicate(timeout=500)
    assert runs[part].returncode == 0, told
    if part in OF_DATABASE and database.missing():
        assert f"{part}: SKIPPED, {database.missing()}" in told
        return
    found = json.loads((tmp_path_factory.getbasetemp() / f"{part}.json").read_text())
    assert found["figures"]
    assert all(each["ours"] is not None for each in found["figures"])
    assert [row["agents"] for row in found["sizing"]] == (list(sizing.FEW) if part == "sizing" else [])
    names = {row["name"] for row in found["libraries"]}
    assert names >= {"agent-shim", "aiohttp", "uvloop", libraries.PYTHON} if part == "idle" else not names
    assert "ours" in shown


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_figures_of_the_json(name: str) -> None:
    page = PAGES[name].read_text()
    assert rendered(page, name, FOUND) == page, "python -m bench --render"


def test_the_pages_are_of_a_whole_run() -> None:
    parts = {each["part"] for each in FOUND["figures"]}
    parts -= {*TITLES, overload.PART}  # measured by themselves, or newer than the run that is shown
    modules = (throughput.PART, memory.PART, durable.PART, traffic.PART, idle.PART, sizing.PART)
    assert parts == {latency.SIMULATED, latency.REAL, *first_minutes.PARTS, *modules}
    assert [row["agents"] for row in FOUND["sizing"]] == [*sizing.FEW, *sizing.MANY]
    aims = {each["what"]: each["met"] for each in FOUND["figures"] if each["aim"] is not None}
    assert f"growth over {memory.SOAK_CALLS:,} calls" in aims
    assert f"each of {memory.HELD:,} held polls" in aims
    assert {"heartbeats", "empty polls", "idle RSS", "idle RSS, absolute"} <= aims.keys()
    against = {each["against"] for each in FOUND["figures"]}
    assert {"aiohttp", "web.Application", "naive", "plain sqlite3", "hold off", "HTTP calls", "bare commit"} <= against


def test_no_bridge_can_beat_the_bound_of_a_burst() -> None:
    """A poll that is held takes the first command; the others wait for the agent's next one."""
    assert first_minutes.best_s([31.0, 37.0, 43.0, 60.0], 0.0, 30.0) == [0.0, 23.0, 17.0, 0.0]
    assert first_minutes.best_s([55.0], 0.0, 30.0) == [5.0]
    assert first_minutes.best_s([7.0, 8.0, 9.0], 0.0, 5.0) == [0.0, 2.0, 1.0]
    assert first_minutes.best_s([17.0, 18.0], 0.0, 5.0) == [0.0, 0.0], (
        "a tick that was missed during a hold comes at once"
    )


def test_a_part_that_is_measured_alone_takes_its_own_place_and_names_its_machine() -> None:
    run = {"about": {"machine": "another"}, "load": 0.5}
    figures = [{"part": idle.PART, "what": "anything"}, {"part": "a new one", "what": "anything"}]
    empty: dict[str, Any] = {"sizing": [], "libraries": [], "fleet": {}}
    shown = merged({**run, "figures": figures, **empty}, whole=False)
    order = list(dict.fromkeys(each["part"] for each in FOUND["figures"]))
    assert list(dict.fromkeys(each["part"] for each in shown["figures"])) == [*order, "a new one"]
    assert [each for each in shown["figures"] if each["part"] in (idle.PART, "a new one")] == figures
    assert shown["apart"] == {**FOUND["apart"], idle.PART: run, "a new one": run}
    kinds = ("about", "load", "sizing", "libraries", "fleet")
    assert {kind: shown[kind] for kind in kinds} == {kind: FOUND[kind] for kind in kinds}


def test_a_whole_run_keeps_what_it_could_not_measure() -> None:
    of_database = {each["part"] for each in FOUND["figures"]} & set(TITLES)
    run = {"about": {"machine": "another"}, "load": 0.5, "libraries": [{"name": "one"}]}
    others = [each for each in FOUND["figures"] if each["part"] not in TITLES]
    shown = merged({**FOUND, **run, "figures": others, "fleet": {}}, whole=True)
    assert [each["part"] for each in shown["figures"]] == [each["part"] for each in FOUND["figures"]]
    assert (shown["about"], shown["libraries"], shown["fleet"]) == (run["about"], run["libraries"], FOUND["fleet"])
    assert shown["apart"].keys() == of_database
