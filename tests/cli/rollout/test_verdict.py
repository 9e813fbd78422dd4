"""The verdict: each reason to wait or to go back, and that nothing unseen counts as good."""

from __future__ import annotations

from typing import Any

import pytest

from shim.cli.rollout.cluster import Cluster, Trouble
from shim.cli.rollout.verdict import Decision, Verdict, judge, percentage
from shim.management.health_summary import PROBLEMS
from tests.cli.rollout.conftest import DAY_S, NOW, MakeCluster, measured

HOUR_S = 3_600.0


def verdict(*clusters: Cluster, **given: Any) -> Verdict:
    return judge(clusters, NOW, DAY_S, **given)


def test_clusters_that_are_well_for_a_day_go_on(make_cluster: MakeCluster) -> None:
    out = make_cluster("late", inside=0, outside=1, objectives={}, links={"idle": 1})
    found = verdict(make_cluster(), out)
    assert (found.decision, found.reasons, found.percent) == (Decision.GO_ON, [], 10)


def test_no_cluster_is_no_reason_to_go_on() -> None:
    found = verdict()
    assert (found.decision, found.percent, found.until) == (Decision.WAIT, None, None)


def test_a_step_is_watched_for_a_day(make_cluster: MakeCluster) -> None:
    since = NOW - HOUR_S
    found = verdict(make_cluster(), make_cluster("late", since=since))
    assert (found.decision, found.since, found.until) == (Decision.WAIT, since, since + DAY_S)
    assert "late" in found.reasons[0].cluster
    assert judge([make_cluster(since=since)], NOW, HOUR_S).decision is Decision.GO_ON
    assert verdict(make_cluster(since=None)).decision is Decision.WAIT
    outside = make_cluster("out", since=since, inside=0, outside=1)
    assert verdict(make_cluster(), outside).decision is Decision.GO_ON


def test_a_day_that_a_restart_began_anew_says_so(make_cluster: MakeCluster) -> None:
    since = NOW - HOUR_S
    (restarted,) = verdict(make_cluster(since=since, started=[since + 0.1])).reasons
    assert restarted.text == (
        "in for 1 h of 24 h, counted from the shim's start: what was before it is not known without Prometheus"
    )
    (stepped,) = verdict(make_cluster(since=since, started=[since - DAY_S])).reasons
    assert stepped.text == "in for 1 h of 24 h"


@pytest.mark.parametrize("name", ["connection_success", "reconnection", "heartbeat_success", "message_latency"])
def test_a_missed_objective(name: str, make_cluster: MakeCluster) -> None:
    missed = measured(**{name: (80, 100)})
    found = verdict(make_cluster(), make_cluster("ill", objectives={"1h": missed, "24h": measured()}))
    assert (found.decision, found.clusters, found.until) == (Decision.GO_BACK, ["ill"], None)
    assert "80 % (20 of 100)" in found.reasons[0].text
    few = make_cluster(objectives={"1h": measured(**{name: (1, 3)}), "24h": measured()})
    assert (verdict(few).decision, verdict(few).until) == (Decision.WAIT, NOW + HOUR_S)
    over = make_cluster(objectives={"1h": measured(), "24h": missed})
    assert (verdict(over).decision, verdict(over).until) == (Decision.WAIT, NOW + DAY_S - HOUR_S)
    outside = make_cluster(inside=0, outside=1, objectives={"1h": missed, "24h": missed})
    assert verdict(make_cluster("other"), outside).decision is Decision.GO_ON


def test_nothing_measured_is_not_well(make_cluster: MakeCluster) -> None:
    nothing = {"1h": measured(heartbeat_success=(0, 0)), "24h": measured()}
    assert verdict(make_cluster(objectives=nothing)).decision is Decision.WAIT
    assert verdict(make_cluster(objectives={})).decision is Decision.WAIT
    quiet = {window: measured(0, 0, heartbeat_success=(10, 10)) for window in ("1h", "24h")}
    assert verdict(make_cluster(objectives=quiet)).decision is Decision.GO_ON  # a link that lasts, no command


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"gaps": ["did not answer"]}, "did not answer"),
        ({"shims": 0, "gaps": ["error: context does not exist"]}, "does not exist"),
        ({"sidecar_faults": ["agent-1 has no sidecar"]}, "has no sidecar"),
        ({"modes": ["http", "websocket"]}, "different modes"),
        ({"agents": 0}, "no agent calls"),
        ({"agent_pods": 0, "agents": 0}, "no pod of the agent"),
        ({"without_result": {"1h": {}, "24h": {"expired": 2}}}, "2 commands ended without a result"),
    ],
)
def test_what_makes_it_wait(given: dict[str, Any], expected: str, make_cluster: MakeCluster) -> None:
    found = verdict(make_cluster("other"), make_cluster(**given))
    assert found.decision is Decision.WAIT
    assert any(expected in reason.text and reason.cluster == "prod" for reason in found.reasons)


def test_every_problem_of_the_status_has_an_effect_that_was_thought_of(make_cluster: MakeCluster) -> None:
    decisions = {code: verdict(make_cluster(troubles=[Trouble(code, "the text")])).decision for code in PROBLEMS}
    back = {code for code, decision in decisions.items() if decision is Decision.GO_BACK}
    assert back == {
        *("token_refused", "identity_contended", "registration_refused", "registration_unanswered"),
        *("name_unknown", "agent_unknown", "heartbeats_refused", "not_registered"),
    }
    noted = {code for code, decision in decisions.items() if decision is Decision.GO_ON}
    assert noted == {"log_lines_lost", "store_log_pinned", "commands_not_fetched", "commands_in_doubt"}


def test_a_problem_of_a_cluster_outside_is_no_reason_to_go_back(make_cluster: MakeCluster) -> None:
    ill = make_cluster("ill", inside=0, outside=1, troubles=[Trouble("token_refused", "refused")])
    assert verdict(make_cluster(), ill).decision is Decision.WAIT
    # The agent cannot even register: its place is not known, and it is not served.
    ill = make_cluster("ill", inside=0, agents=0, troubles=[Trouble("token_refused", "refused")])
    assert verdict(make_cluster(), ill).clusters == ["ill"]


def test_a_link_that_is_down_for_two_minutes(make_cluster: MakeCluster) -> None:
    for lasts_s, decision in ((None, Decision.WAIT), (119.0, Decision.WAIT), (120.0, Decision.GO_BACK)):
        ill = make_cluster(troubles=[Trouble("link_down", "down", lasts_s)])
        assert verdict(ill).decision is decision


def test_a_fallback_that_fails_is_no_way_back(make_cluster: MakeCluster) -> None:
    for code in ("fallback_failing", "fallback_failed"):
        found = verdict(make_cluster(), make_cluster("out", inside=0, outside=1, troubles=[Trouble(code, "500")]))
        assert found.decision is Decision.WAIT
        assert "no way back" in found.reasons[0].text


def test_the_worst_reason_decides(make_cluster: MakeCluster) -> None:
    ill = make_cluster("ill", troubles=[Trouble("agent_unknown", "unknown")])
    found = verdict(make_cluster("gone", shims=0, gaps=["dead"]), ill, make_cluster())
    assert (found.decision, found.clusters) == (Decision.GO_BACK, ["ill"])
    assert [reason.decision for reason in found.reasons] == [Decision.GO_BACK, Decision.WAIT]
    assert verdict(make_cluster(), faults=["Prometheus warns"]).decision is Decision.WAIT


def test_mode_http_everywhere(make_cluster: MakeCluster) -> None:
    blue = make_cluster(modes=["http"], inside=0, objectives={})
    assert verdict(blue).decision is Decision.WAIT
    assert judge([blue], NOW, DAY_S, start=True).decision is Decision.GO_ON
    ill = make_cluster("out", modes=["http"], troubles=[Trouble("fallback_failing", "500")])
    assert judge([blue, ill], NOW, DAY_S, start=True).decision is Decision.WAIT


def test_after_the_end_of_the_http_api_mode_http_is_websocket(make_cluster: MakeCluster) -> None:
    over = make_cluster(modes=["http"], sunset_days=-1.0, troubles=[Trouble("token_refused", "refused")])
    assert (over.canary, verdict(over).clusters) == ("in", ["prod"])
    assert not any("mode http" in reason.text for reason in verdict(over).reasons)


def test_a_canary_without_a_cluster_in_it(make_cluster: MakeCluster) -> None:
    out = make_cluster(inside=0, outside=1)
    assert verdict(out).decision is Decision.WAIT
    assert "rollout.include" in verdict(out).reasons[0].text
    assert verdict(make_cluster(inside=0, outside=1, percent=0.0)).decision is Decision.GO_ON  # not begun


def test_the_percentage_is_that_of_most_clusters_and_others_hold_it(make_cluster: MakeCluster) -> None:
    fleet = [make_cluster("a", percent=50.0), make_cluster("b", percent=50.0)]
    ahead = verdict(*fleet, make_cluster("ahead", percent=100.0))
    assert (ahead.decision, ahead.percent) == (Decision.GO_ON, 50)
    behind = verdict(*fleet, make_cluster("late", percent=10.0))
    assert (behind.decision, behind.percent, behind.reasons[0].cluster) == (Decision.WAIT, 50, "late")
    assert verdict(make_cluster(percent=50.0), make_cluster(percent=10.0)).percent == 10


def test_a_cluster_that_was_taken_back_holds_the_others(make_cluster: MakeCluster) -> None:
    found = verdict(make_cluster(), make_cluster("back", modes=["http"], objectives={}))
    assert found.decision is Decision.WAIT
    assert found.reasons[0].cluster == "back"
    assert "mode http" in found.reasons[0].text


def test_percentages_are_cut_and_not_rounded_up() -> None:
    assert percentage(0.99996) == "99.99 %"
    assert (percentage(1.0), percentage(0.5), percentage(None)) == ("100 %", "50 %", "none")
