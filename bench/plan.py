"""`python -m bench.plan [--json FILE]`: a fleet on paper, from what was measured (docs/how-to/several-replicas.md).

Nothing but arithmetic: the sizing rows of the benchmark's JSON give what an agent costs, the fleet below what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "several-replicas.md"
MEASURED = ROOT / "docs" / "reference" / "performance.json"
SIZING = "CPU of a thousand agents"
"""The part of the benchmark with the sizing rows (`bench.sizing.PART`)."""
BEGIN = "<!-- plan: begin -->"
END = "<!-- plan: end -->"

KEPT_BYTES = 1700
"""What the store keeps of a command that ended, without its payload."""
MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A fleet to plan for. `used` is the share of a core that a replica may use: the rest is for restarts and peaks."""

    agents: int = 100_000
    tokens: int = 200
    heartbeat_s: float = 5.0
    hold_s: float = 20.0
    upstream_heartbeat_s: float = 27.5
    commands_per_hour: float = 6.0
    payload_bytes: int = 1000
    kept_s: float = 3600.0
    used: float = 0.5


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a replica without agents and of each agent: the line through the two largest measurements.

    `forwarded` is what a call costs that one replica passes on to another, both together, in calls that are not; as
    measured with `fleet_agents` agents over several replicas, or 2 if that was not measured.
    """

    base_mb: float
    agent_mb: float
    base_cpu: float
    agent_cpu: float
    measured: int
    forwarded: float = 2.0
    fleet_agents: int = 0

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], fleet: Mapping[str, Any] | None = None) -> Cost:
        """Raises `ValueError` where there are not two sizes."""
        if len(rows) < 2:
            raise ValueError("the JSON has no sizing rows: measure with `make bench ONLY=sizing`")
        less, more = sorted(rows, key=lambda row: row["agents"])[-2:]
        between = more["agents"] - less["agents"]
        agent_mb = (more["rss_mb"] - less["rss_mb"]) / between
        agent_cpu = (more["cpu_percent"] - less["cpu_percent"]) / between / 100
        base_mb = more["rss_mb"] - agent_mb * more["agents"]
        base_cpu = max(0.0, more["cpu_percent"] / 100 - agent_cpu * more["agents"])
        made = cls(max(0.0, base_mb), agent_mb, base_cpu, agent_cpu, more["agents"])
        return made.over_replicas(fleet) if fleet else made

    def over_replicas(self, fleet: Mapping[str, Any]) -> Cost:
        """The same with what agents took whose calls were forwarded as often as replicas are others."""
        agents, count = fleet["agents"], fleet["replicas"]
        direct_cpu = self.agent_cpu * agents
        more_cpu = fleet["cpu_percent"] / 100 - count * self.base_cpu - direct_cpu
        forwarded = 1 + max(0.0, more_cpu / direct_cpu) * count / (count - 1)
        agent_mb = max(self.agent_mb, (fleet["rss_mb"] - count * self.base_mb) / agents)
        return replace(self, agent_mb=agent_mb, forwarded=forwarded, fleet_agents=agents)


@dataclass(frozen=True, slots=True)
class Plan:
    """The fleet on replicas: how many, and what each of them has to do."""

    fleet: Fleet
    cost: Cost

    @property
    def per_replica(self) -> int:
        """Agents to a replica. Nearly every call comes in where its link is not owned, and is forwarded."""
        room = self.fleet.used - self.cost.base_cpu
        return max(1, int(room / (self.cost.forwarded * self.cost.agent_cpu)))

    @property
    def shards(self) -> int:
        """Four to a replica, and no fewer than there are."""
        return max(16, 4 * self.replicas)

    @property
    def needed(self) -> int:
        """Replicas without a spare one."""
        return ceil(self.fleet.agents / self.per_replica)

    @property
    def replicas(self) -> int:
        """With one to lose."""
        return self.needed + 1

    @property
    def shares(self) -> float:
        """Agents to a replica while one is lost."""
        return self.fleet.agents / self.needed

    @property
    def commands_s(self) -> float:
        return self.fleet.agents * self.fleet.commands_per_hour / 3600

    @property
    def calls_s(self) -> float:
        """Heartbeats, polls that were held to their end, and results."""
        fleet = self.fleet
        return fleet.agents / fleet.heartbeat_s + fleet.agents / fleet.hold_s + self.commands_s

    @property
    def kept(self) -> float:
        """Commands that the store keeps."""
        return self.commands_s * self.fleet.kept_s

    @property
    def kept_mb(self) -> float:
        return self.kept * (self.fleet.payload_bytes + KEPT_BYTES) / MB

    @property
    def replica_mb(self) -> float:
        """Memory of a replica while one is lost."""
        return self.cost.base_mb + self.cost.agent_mb * self.shares

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how it follows, number)."""
        fleet, cost = self.fleet, self.cost
        return [
            ("**Replicas**", "", ""),
            ("an agent", _measured(cost), _agent(cost)),
            (
                "agents to a replica",
                f"{fleet.used:.0%} of a core; {_forwarded(cost)}",
                f"{self.per_replica:,}",
            ),
            ("replicas", "agents / that, and one to lose", f"{self.replicas}"),
            ("memory of each", "its agents, while one is lost", f"{self.replica_mb:,.0f} MB"),
            ("**Connections**", "", ""),
            ("agents' TCP connections", "2 each: control and polls", f"{2 * fleet.agents:,}"),
            (
                "to a replica, one lost",
                "`listen.max_connections` and open files above that",
                f"{ceil(2 * self.shares):,}",
            ),
            ("links to the controller", "one a token", f"{fleet.tokens:,}"),
            ("agents on a link", "one owner each; `sessions.max_per_owner`", f"{ceil(fleet.agents / fleet.tokens):,}"),
            ("links to a replica, one lost", "", f"{ceil(fleet.tokens / self.needed):,}"),
            ("shards", "`agent-shim store shards`: four to a replica", f"{self.shards}"),
            (
                "to the database",
                "one for each shard, three for each replica: `max_connections` above that",
                f"{self.shards + 3 * self.replicas}",
            ),
            ("**Messages per second**", "", ""),
            ("agents' calls", "heartbeats, polls held to their end, results", f"{self.calls_s:,.0f}"),
            ("up to the controller", "coalesced heartbeats, results", f"{self._up_s:,.0f}"),
            ("commands", "", f"{self.commands_s:,.0f}"),
            ("**Store**", "", ""),
            ("commands kept", "`commands.retain_s`, `commands.dedupe_s`", f"{self.kept:,.0f}"),
            ("disk", "with their payloads, twice over", f"{2 * self.kept_mb / 1000:,.1f} GB"),
        ]

    @property
    def _up_s(self) -> float:
        return self.fleet.agents / self.fleet.upstream_heartbeat_s + self.commands_s


def _agent(cost: Cost) -> str:
    return f"{cost.agent_mb * 1000:.1f} KB, {cost.agent_cpu * 1e6:.0f} µs of CPU a second"


def _measured(cost: Cost) -> str:
    largest = f"between the two largest measurements, up to {cost.measured:,} agents"
    if not cost.fleet_agents:
        return largest
    return f"CPU: {largest}; memory: {cost.fleet_agents:,} agents over three replicas"


def _forwarded(cost: Cost) -> str:
    if not cost.fleet_agents:
        return "a call that another replica passes on is taken as two"
    measured = f"{cost.fleet_agents:,} agents over three replicas"
    return f"a call that another replica passes on costs {cost.forwarded:.2f} times a direct one ({measured})"


def text(measured: Mapping[str, Any], fleet: Fleet) -> list[str]:
    """Return the text between the markers."""
    plan = Plan(fleet, Cost.of(measured["sizing"], measured.get("fleet")))
    about = measured.get("apart", {}).get(SIZING, measured)["about"]
    for_whom = (
        f"{fleet.agents:,} agents with {fleet.tokens} tokens, a heartbeat every {fleet.heartbeat_s:g} s, polls",
        f"held for {fleet.hold_s:g} s; {fleet.commands_per_hour:g} commands an hour of {fleet.payload_bytes:,} bytes",
        f"for each agent, kept for {fleet.kept_s:,.0f} s. Measured on {about['machine']};",
        f"agent-shim {about['shim']}, {about['date']}.",
    )
    return [
        "",
        *for_whom,
        "",
        "| | how it follows | |",
        "|---|---|--:|",
        *(f"| {what} | {how} | {number} |" for what, how, number in plan.rows()),
        "",
    ]


def page(before: str, lines: Sequence[str]) -> str:
    """The page with the plan between its markers."""
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, *lines, END + tail])


def write(measured: Mapping[str, Any]) -> None:
    """Write the page anew."""
    PAGE.write_text(page(PAGE.read_text(), text(measured, Fleet())))


def main() -> int:
    """Write the page; with `--check` say whether it is what the JSON makes of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument(
        "--json", type=Path, default=MEASURED, metavar="FILE", help="the JSON beside docs/reference/sizing.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page would change")
    given = parser.parse_args()
    before = PAGE.read_text()
    after = page(before, text(json.loads(given.json.read_text()), Fleet()))
    if given.check:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
