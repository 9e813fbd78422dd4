"""Rows from the status of shims: of several shims, of older ones, and of what only looks like one."""

from __future__ import annotations

import copy
import json
from typing import Any

import click
import pytest

from shim.cli.rollout.cluster import Cluster, add_status, read_status
from shim.cli.rollout.report import Report, as_json, page, text
from shim.cli.rollout.verdict import judge
from shim.management.objectives import OBJECTIVES
from tests.support.threads import exit_code_of_first_calls

NOW = 1_800_000_000.0


def status(**changes: Any) -> dict[str, Any]:
    """A shim's status with one agent that is in; `changes` by path, like `rollout__percent`."""
    window = {"good": 10, "samples": 10, "observed_s": 60.0}
    data: dict[str, Any] = {
        "now": NOW,
        "version": "1.0",
        "started_at": NOW - 100,
        "mode": "websocket",
        "overall": {"problems": []},
        "links": {"total": 1, "online": 1, "items": [{"phase": "up", "since": NOW - 90}]},
        "sessions": {"fresh": 1, "by_http": {"rollout": 0}},
        "migration": {"routes": [], "reasons": [], "sunset": {"days_left": None}},
        "objectives": [
            {"name": each.name, "target": each.target, "windows": {"1h": window, "24h": window}} for each in OBJECTIVES
        ],
        "rollout": {"percent": 10, "since": NOW - 50, "agents": {"total": 1, "inside": 1, "items": [{"name": "prod"}]}},
        "commands": {"without_result": {"1h": {"codes": {"expired": 1, "queue_full": 0}}}},
    }
    data = copy.deepcopy(data)
    for path, value in changes.items():
        *sections, last = path.split("__")
        place = data
        for section in sections:
            place = place[section]
        place[last] = value
    return data


def test_several_shims_of_a_cluster_are_one_row() -> None:
    row = Cluster(name="prod")
    add_status(row, read_status(status()), NOW)
    add_status(row, read_status(status()), NOW)  # the same one at another address
    other = status(
        version="1.1",
        started_at=NOW - 7,
        rollout__percent=50,
        rollout__since=NOW - 5,
        rollout__agents={"total": 2, "inside": 0, "items": []},
    )
    add_status(row, read_status(other), NOW)
    assert (row.shims, row.versions, row.percent, row.since) == (2, ["1.0", "1.1"], 10, NOW - 5)
    assert (row.canary, row.inside, row.outside, row.agents) == ("part", 1, 2, 2)
    assert row.links == {"up": 2}
    assert row.objectives["1h"]["heartbeat_success"].samples == 20
    assert row.without_result["1h"] == {"expired": 2}


@pytest.mark.parametrize("ahead_s, place", [(-90_000.0, "behind"), (90_000.0, "ahead of"), (-60.0, "")])
def test_a_clock_that_is_wrong_does_not_shorten_the_day_of_a_step(ahead_s: float, place: str) -> None:
    row = Cluster(name="prod")
    add_status(row, read_status(status(now=NOW + ahead_s, rollout__since=NOW + ahead_s - 50)), NOW)
    assert row.since == (NOW - 50 if place else NOW + ahead_s - 50)  # a minute may be that of a slow answer
    assert row.notes == ([f"its clock is 1 day 1 h {place} the one here"] if place else [])


def test_an_agent_that_calls_no_longer_by_http_is_not_counted() -> None:
    for now, expected in ((None, 1), ({"rollout": 1}, 1), ({"rollout": 0}, 0)):
        row = Cluster(name="prod")
        sessions = {"fresh": 0, "by_http": {"rollout": 1}} | ({} if now is None else {"by_http_now": now})
        add_status(row, read_status(status(sessions=sessions)), NOW)
        assert row.agents == expected


@pytest.mark.parametrize("missing", ["objectives", "rollout", "commands", "overall", "links"])
def test_an_older_status_is_named_as_that(missing: str) -> None:
    older = status()
    del older[missing]
    with pytest.raises(click.ClickException, match=f"version 1.0 is too old for this report.*`{missing}`"):
        read_status(older)


@pytest.mark.parametrize(
    "changes",
    [
        {"now": 1e300},
        {"now": float("nan")},
        {"started_at": -1},
        {"rollout__percent": float("inf")},
        {"rollout__since": 1e12},
        {"rollout__agents__total": 1e400},
        {"migration__sunset": {"days_left": float("inf")}},
        {"sessions__fresh": -1},
        {"links__online": "many"},
        {"overall": {"problems": [{"code": 3}]}},
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(click.ClickException):
        read_status(json.loads(json.dumps(status(**changes))))


def test_the_first_statuses_may_be_read_at_the_same_time() -> None:
    for _ in range(10):  # about half of them ended by a segmentation fault
        assert exit_code_of_first_calls("shim.cli.rollout.cluster", "read_status", json.dumps(status())) == 0


@pytest.mark.parametrize("answer", [None, [], "text", 3, {}, {"version": 3}, {"status": "ok"}])
def test_what_is_no_status(answer: Any) -> None:
    with pytest.raises(click.ClickException, match="no shim's status"):
        read_status(answer)


def test_texts_that_no_terminal_and_no_page_should_see() -> None:
    row = Cluster(name="\ud800\x1b")
    nasty = status(
        mode="\x1b[31m",
        version="\ud800",
        overall={"problems": [{"code": "token_refused", "level": "bad", "text": "\x1b]0;x\x07\ud800"}]},
    )
    add_status(row, read_status(nasty), NOW)
    report = Report([row], judge([row], NOW, 0), NOW)
    for shown in (text(report), page(report)):
        assert "\x1b" not in shown
        shown.encode()
    json.dumps(as_json(report)).encode()
