"""The plan on paper: its arithmetic, its page, and what it takes from the measurements."""

from __future__ import annotations

import json

import pytest

from bench import plan, sizing
from bench.plan import Cost, Fleet, Plan

ROWS = [
    {"agents": 1000, "rss_mb": 60.0, "cpu_percent": 6.0},
    {"agents": 10_000, "rss_mb": 240.0, "cpu_percent": 51.0},
    {"agents": 100, "rss_mb": 999.0, "cpu_percent": 99.0},
]
MEASURED = {"about": {"machine": "a machine", "shim": "1", "date": "2026-01-02"}, "sizing": ROWS}


def test_what_an_agent_costs_is_the_line_through_the_two_largest() -> None:
    cost = Cost.of(ROWS)
    assert (round(cost.agent_mb, 6), round(cost.base_mb, 6)) == (0.02, 40.0)
    assert (round(cost.agent_cpu, 9), round(cost.base_cpu, 6)) == (5e-5, 0.01)
    with pytest.raises(ValueError, match="make bench"):
        Cost.of(ROWS[:1])


def test_replicas_memory_and_messages_follow() -> None:
    made = Plan(Fleet(agents=49_000, commands_per_hour=36, used=0.5), Cost.of(ROWS))
    # (0.5 - 0.01) / (2 * 50 µs)
    assert (made.per_replica, made.needed, made.replicas) == (4900, 10, 11)
    assert made.commands_s == 490
    assert made.calls_s == 49_000 / 5 + 49_000 / 20 + 490
    assert made.kept == 490 * 3600
    assert round(made.replica_mb) == 40 + 98


def test_the_fleet_beats_as_fast_as_the_agents_that_were_measured() -> None:
    assert Fleet().heartbeat_s == sizing.INTERVAL_S
    assert plan.SIZING == sizing.PART


def test_the_page_keeps_what_stands_around_the_plan() -> None:
    once = plan.page(f"before\n{plan.BEGIN}\nold\n{plan.END}\nafter\n", plan.text(MEASURED, Fleet()))
    assert once.startswith(f"before\n{plan.BEGIN}\n")
    assert once.endswith(f"{plan.END}\nafter\n")
    assert "old" not in once
    assert "| replicas |" in once
    assert plan.page(once, plan.text(MEASURED, Fleet())) == once


def test_the_page_is_what_the_measurements_make_of_it() -> None:
    before = plan.PAGE.read_text()
    made = plan.text(json.loads(plan.MEASURED.read_text()), Fleet())
    assert plan.page(before, made) == before, "python -m bench.plan"


def test_what_forwarding_costs_is_what_three_replicas_took_more_than_one() -> None:
    # 0.5 of a core for the agents and 0.01 for each replica; two calls of three are forwarded, at 1.3
    fleet = {"agents": 10_000, "replicas": 3, "cpu_percent": 100 * (0.5 * (1 + 0.3 * 2 / 3) + 0.03), "rss_mb": 420.0}
    cost = Cost.of(ROWS, fleet)
    assert round(cost.forwarded, 6) == 1.3
    assert round(cost.agent_mb, 6) == 0.03
    # (0.5 - 0.01) / (1.3 * 50 µs)
    assert Plan(Fleet(), cost).per_replica == 7538
    assert "costs 1.30 times a direct one (10,000 agents over three replicas)" in "\n".join(
        plan.text({**MEASURED, "fleet": fleet}, Fleet())
    )
