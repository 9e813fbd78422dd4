"""docs/concepts/promises.md shows what the harness measured, and names what is there."""

from __future__ import annotations

import json
import re

from tests.chaos.harness.faults import INJURIES
from tests.chaos.harness.pages import DATA, DOCS, PAGE, PLOT, WORDS, drawn, rendered

ROOT = DOCS.parent


def test_the_page_shows_the_figures_beside_it() -> None:
    page = PAGE.read_text()
    assert rendered(page, json.loads(DATA.read_text())) == page, "python -m tests.chaos.harness.pages"


def test_every_fault_has_its_words() -> None:
    assert set(WORDS) == set(INJURIES)


def test_the_figures_are_of_a_run_without_a_broken_promise() -> None:
    found = json.loads(DATA.read_text())
    assert found["violations"] == []
    assert found["commands"]["lost"] == 0
    assert set(found["faults"]) == set(WORDS)  # every kind was injected
    assert found["virtual"]["link_back"]["p99.9"] < 10
    assert found["virtual"]["half_open_found"]["max"] < 60
    assert found["virtual"]["stalled_found"]["max"] < 90
    assert all(herd["ratio"] <= 2 for herd in found["herd"])


def test_many_links_at_real_pace_were_given_up_within_the_bounds() -> None:
    links = json.loads(DATA.read_text())["links"]
    for kind, bound_s in (("half_open_found", 60), ("cut_found", 60), ("stalled_found", 90)):
        assert links[kind]["count"] == links["links"] >= 50
        assert links[kind]["max"] < bound_s


def test_the_soak_lost_nothing_and_is_drawn() -> None:
    found = json.loads(DATA.read_text())["soak"]
    assert sum(found["calls"].values()) > 1_000_000
    assert (found["commands"]["lost"], found["commands"]["results_lost"]) == (0, 0)
    assert (found["refused"], found["log"]["unexplained"]) == ({}, [])
    assert PLOT.read_text() == drawn(found), "python -m tests.chaos.harness.pages"


def test_the_figures_of_several_replicas_are_of_a_run_without_a_broken_promise() -> None:
    found = json.loads(DATA.read_text())["gateway"]
    assert found["violations"] == []
    assert found["commands"]["accepted"] > 1000
    for fault in ("kill shim", "cut shim", "pause shim", "promote db-primary", "restart db-primary"):
        assert found["faults"][fault] >= 2


def test_every_file_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", PAGE.read_text()):
        assert (ROOT / name).exists(), name
