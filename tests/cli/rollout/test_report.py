"""The report as text, JSON and one page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from shim.cli.rollout.cluster import Cluster, Trouble
from shim.cli.rollout.report import Report, as_json, cells, head, headline, page, summary, text
from shim.cli.rollout.verdict import judge
from tests.cli.rollout.conftest import DAY_S, NOW, MakeCluster, measured

NASTY = '<script>alert("1")</script>\x1b[31m&'


def report(*clusters: Cluster) -> Report:
    return Report(list(clusters), judge(clusters, NOW, DAY_S), NOW)


def test_one_row_for_each_cluster(make_cluster: MakeCluster) -> None:
    gone = Cluster(name="gone", gaps=["error: context does not exist"])
    ill = make_cluster("ill", objectives={"1h": measured(heartbeat_success=(90, 100)), "24h": measured()})
    lines = text(report(make_cluster(), gone, ill)).splitlines()
    assert re.fullmatch(r"CLUSTER +AGENT +SIDECAR .* CAN GO", lines[0])
    assert re.match(r"prod +calls +yes +1\.0 +websocket +in \(10 %\) +up +100% / 100% ", lines[1])
    assert re.match(r"gone( +\?)+", lines[2])
    assert "90%! / 100%" in lines[3]
    assert "Go back: ill." in lines
    assert any(line.startswith("  wait     gone: error: context") for line in lines)
    assert {len(cells(each)) for each in (gone, ill)} == {len(head())}


def test_the_headline_says_when_waiting_ends(make_cluster: MakeCluster) -> None:
    waiting = report(make_cluster(since=NOW - 3600))
    assert headline(waiting) == "Wait since 2027-01-15 07:00 UTC, until 2027-01-16 07:00 UTC at the latest."
    assert headline(report(make_cluster(since=NOW - 3600), Cluster(name="x", gaps=["dead"]))).endswith(
        "below are gone."
    )
    assert headline(report(make_cluster())) == "Go on."
    assert "every cluster is in" in headline(report(make_cluster(percent=100.0)))
    excluded = make_cluster("bank", percent=100.0, inside=0, outside=1)
    assert "not in are bank" in headline(report(make_cluster(percent=100.0), excluded))


def test_the_end_of_one_cluster_is_not_that_of_all(make_cluster: MakeCluster) -> None:
    dated, over = make_cluster("dated", sunset_days=20.5), make_cluster("over", sunset_days=-1.0)
    assert summary(report(dated, over)).endswith(
        "the HTTP API is over by sunset.at of over, 20 days until the HTTP API ends"
    )
    assert '<b class="">20</b><span>days until' in page(report(dated, over))
    assert summary(report(over)).endswith("the HTTP API is over")
    assert '<b class="bad">0</b><span>days until' in page(report(over))
    undated = report(make_cluster("undated"), over)
    assert summary(undated).endswith("the HTTP API is over by sunset.at of over")
    assert "days until" not in page(undated)


def test_the_json_has_what_the_text_has(make_cluster: MakeCluster) -> None:
    ill = make_cluster("ill", troubles=[Trouble("agent_unknown", "unknown")], sunset_days=3.5)
    data = json.loads(json.dumps(as_json(report(make_cluster(), ill))))
    assert (data["verdict"], data["exit_code"], data["go_back"]) == ("go back", 2, ["ill"])
    reason = data["reasons"][0]
    assert (reason["decision"], reason["cluster"], reason["text"]) == ("go back", "ill", "unknown")
    row = data["clusters"][1]
    assert (row["canary"], row["removable"], row["sunset_days"]) == ("in", False, 3.5)
    measurement = row["objectives"]["1h"]["heartbeat_success"]
    assert (measurement["state"], measurement["measured"], measurement["target"]) == ("met", 1.0, 0.999)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_needs_nothing_else_and_escapes_all(make_cluster: MakeCluster) -> None:
    ill = make_cluster(
        NASTY,
        versions=[NASTY],
        gaps=[NASTY],
        notes=[NASTY],
        still_used=[NASTY],
        keep_reasons=[NASTY],
        sidecar_faults=[NASTY],
        without_result={"1h": {NASTY: 1}},
        links={NASTY: 1},
        modes=[NASTY],
    )
    html = page(report(ill, make_cluster(sunset_days=-1.0)))
    parsed = _Page()
    parsed.feed(html)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in parsed.attributes}
    assert "url(" not in html
    assert "@import" not in html
    assert parsed.tags.count("tr") == 3
    assert "\x1b" not in html
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;?[31m&amp;" in html


@pytest.mark.parametrize("canary", ["in", "out", "http", "empty", "unknown", "part"])
def test_every_kind_of_row_has_cells(canary: str, make_cluster: MakeCluster) -> None:
    given = {
        "in": {},
        "out": {"inside": 0, "outside": 2},
        "http": {"modes": ["http"]},
        "empty": {"inside": 0, "agents": 0},
        "unknown": {"shims": 0, "agent_pods": 2},
        "part": {"outside": 1},
    }
    row = make_cluster(**given[canary])
    assert row.canary == canary
    assert len(cells(row)) == len(head())
    assert row.name in page(report(row))
    assert row.name in text(report(row))
