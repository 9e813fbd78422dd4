"""The next step: the change that is printed, and when it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shim.cli.rollout import Target, advise, change, next_percent, previous_percent
from shim.cli.rollout.cluster import Cluster, Trouble
from shim.cli.rollout.report import Report
from shim.cli.rollout.verdict import judge
from tests.cli.rollout.conftest import DAY_S, NOW, MakeCluster

TARGET = Target("helm/agent-shim", "agent-shim", "pipeops-system", {"it's": ("--kube-context=it's",)})
STEPS = (10.0, 50.0, 100.0)
ROOT = Path(__file__).parents[3]


def advice(*clusters: Cluster, form: str = "values", start: bool = False) -> int:
    report = Report(list(clusters), judge(clusters, NOW, DAY_S, start=start), NOW)
    return advise(report, STEPS, form, TARGET, start=start)


def test_steps() -> None:
    assert [next_percent(each, STEPS) for each in (0, 10, 12, 50, 100)] == [10, 50, 50, 100, None]
    assert [previous_percent(each, STEPS) for each in (0, 10, 12, 100)] == [None, None, 10, 50]


def test_going_on_prints_the_change_and_nothing_else(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice(make_cluster()) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out) == {"config": {"mode": "websocket", "rollout": {"percent": 50}}}
    assert "Go on." in err
    assert "different modes" not in err
    assert advice(make_cluster(), form="config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"mode": "websocket", "rollout": {"percent": 50}}
    assert advice(make_cluster(), make_cluster("b", modes=["auto"])) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out) == {"config": {"rollout": {"percent": 50}}}  # each keeps its mode
    assert "if it replaces a file, keep the mode there" in err


def test_after_the_last_step_the_output_still_has_the_values(
    make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice(make_cluster(percent=100.0)) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out) == {"config": {"mode": "websocket", "rollout": {"percent": 100}}}
    assert "removal.md" in err
    assert advice(make_cluster(percent=100.0), form="helm") == 0
    assert capsys.readouterr().out == ""
    half = make_cluster(percent=50.0)
    advise(Report([half], judge([half], NOW, DAY_S), NOW), (10.0, 50.0), "values", TARGET, start=False)
    assert "--steps ends at 50 %" in capsys.readouterr().err


def test_helm_commands_name_their_cluster(make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert advice(make_cluster("it's"), make_cluster("other"), form="helm") == 0
    first, where, second = capsys.readouterr().out.splitlines()
    common = "helm upgrade agent-shim helm/agent-shim --namespace pipeops-system --reuse-values"
    assert first == f"{common} --set config.rollout.percent=50 --set config.mode=websocket '--kube-context=it'\"'\"'s'"
    assert (where, second) == ("# in other:", f"{common} --set config.rollout.percent=50 --set config.mode=websocket")


def test_a_name_does_not_end_its_comment(make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert advice(make_cluster("a\nrm -rf /\x1b[31m"), form="helm") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# in a?rm -rf /?[31m:"
    assert len(lines) == 2


def test_waiting_prints_no_change(make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert advice(make_cluster(since=NOW - 60)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Wait since" in err


def test_going_back_prints_the_way_back(make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    ill = make_cluster("ill", percent=50.0, troubles=[Trouble("agent_unknown", "unknown")])
    assert advice(ill, make_cluster(percent=50.0)) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out) == {"config": {"mode": "http"}}
    assert "In the file of ill alone" in err
    assert "percent: 10" in err
    assert "Careful" not in err
    failing = make_cluster("out", inside=0, outside=1, percent=50.0, troubles=[Trouble("fallback_failing", "500")])
    assert advice(ill, failing, form="helm") == 2
    out, err = capsys.readouterr()
    assert out.count("helm upgrade") == 1
    assert "does not serve out" in err


def test_the_start_from_mode_http(make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    blue = make_cluster(modes=["http"], percent=100.0, inside=0, objectives={})
    assert advice(blue) == 1
    assert capsys.readouterr().out == ""
    assert advice(blue, start=True) == 0
    out, err = capsys.readouterr()
    assert "every cluster is in" not in err
    assert yaml.safe_load(out) == {"config": {"mode": "websocket", "rollout": {"percent": 10}}}
    assert advice(blue, make_cluster("green"), start=True) == 1
    assert "green go by WebSocket already" in capsys.readouterr().err


def test_the_printed_values_are_the_charts(make_cluster: MakeCluster) -> None:
    schema = json.loads((ROOT / "helm" / "agent-shim" / "values.schema.json").read_text())
    keys = {"config.mode": "http", "config.rollout.percent": "50"}
    for section, names in yaml.safe_load(change(keys, "values", TARGET, ())).items():
        config = schema["properties"][section]["properties"]
        assert names.keys() <= config.keys()
        assert "percent" in config["rollout"]["properties"]
