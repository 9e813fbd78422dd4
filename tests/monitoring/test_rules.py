"""The rules and alerts by promtool, and that what they name exists: metrics, and runbooks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shim.management.health_summary import PROBLEMS
from tests.docs.test_metrics import documented

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "config" / "prometheus"
OURS = ("rules.yaml", "alerts.yaml")

BY_OTHER_METRICS = {
    "store_unwritable": "AgentShimStoreFailing",
    "configuration_faulty": "AgentShimConfigFaulty",
    "store_replaced": "AgentShimStoreLost",
    "token_refused": "AgentShimTokenRefused",
    "identity_contended": "AgentShimIdentityContended",
    "link_down": "AgentShimLinkDown",
    "commands_not_fetched": "AgentShimCommandsWaiting",
}
WITHOUT_ALERT = {
    "stopping": "it is wanted",
    "link_connecting": "it ends within seconds, or becomes link_down",
    "agents_silent": "the controller alerts on agents that do not call: here and where there is no shim",
    "commands_in_doubt": "it ends by itself, as AgentShimCommandsFailed if badly",
    "draining": "a person watches it",
    "drain_timed_out": "a person watches it",
    "drained": "a person watches it",
}


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metric_names(expression: str) -> set[str]:
    """The metrics of ours in an expression, without the endings that the exposition adds."""
    return {
        re.sub(r"_(total|bucket|count|sum)$", "", name) for name in re.findall(r"\bagent_shim_\w+(?!:)\b", expression)
    }


@pytest.mark.needs("promtool")
def test_promtool_accepts_every_rule_file() -> None:
    files = sorted(PROMETHEUS.glob("*.yaml"))
    done = subprocess.run(
        ["promtool", "check", "rules", *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SUCCESS") == len(files)


@pytest.mark.needs("promtool")
def test_promtool_tests_pass() -> None:
    command = ["promtool", "test", "rules", "rules_test.yaml"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_every_alert_and_every_objective_has_a_promtool_test() -> None:
    tested = (Path(__file__).parent / "rules_test.yaml").read_text()
    for rule in [*rules("rules.yaml"), *rules("alerts.yaml")]:
        if "alert" in rule:
            assert f"alertname: {rule['alert']}\n" in tested, rule["alert"]
        else:
            assert re.sub(r"ratio_rate\w+$", "ratio_rate", rule["record"]) in tested, rule["record"]


def test_rules_name_metrics_and_records_that_exist() -> None:
    metrics = set(documented())
    recorded = {rule["record"] for rule in rules("rules.yaml")}
    for rule in [*rules("rules.yaml"), *rules("alerts.yaml")]:
        assert metric_names(rule["expr"]) <= metrics, rule
        assert set(re.findall(r"\bagent_shim:\w+:\w+", rule["expr"])) <= recorded, rule


def test_every_alert_says_what_to_do_in_the_troubleshooting_page() -> None:
    page = (ROOT / "docs" / "how-to" / "diagnose.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^#+ (\S+)$", page, re.MULTILINE)}
    for rule in rules("alerts.yaml"):
        url = rule["annotations"]["runbook_url"]
        assert url == f"docs/how-to/diagnose.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in headings
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_problem_of_the_status_has_an_alert_or_a_reason_for_none() -> None:
    alerts = {rule["alert"]: rule["expr"] for rule in rules("alerts.yaml")}
    named = {code for code in PROBLEMS if any(re.search(rf"\b{code}\b", expr) for expr in alerts.values())}
    assert set(BY_OTHER_METRICS.values()) <= set(alerts)
    assert named | set(BY_OTHER_METRICS) | set(WITHOUT_ALERT) == set(PROBLEMS)
