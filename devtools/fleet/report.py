"""Report of a fleet's run, for a terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from devtools.agents import CallOutcome, EventKind, LegacyAgent
from devtools.fleet.command_load import CommandLoad
from devtools.fleet.runner import FleetStats
from devtools.latency import Summary, duration, histogram
from shim.core.text import plural

_CALLS = (EventKind.REGISTER, EventKind.HEARTBEAT, EventKind.POLL, EventKind.RESULT, EventKind.TUNNEL)
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of one kind by outcome; `took` covers those that succeeded (a held poll may take long)."""

    what: str
    ok: int
    refused: int
    undecodable: int
    failed: int
    took: Summary | None


@dataclass(frozen=True, slots=True)
class Pushed:
    """Pushed commands; `latency` is the time from the controller's send to the agent's receipt."""

    sent: int
    in_hand: int
    answered: int
    refused: dict[str, int]
    latency: Summary | None
    warm_up_s: float
    latencies_s: Sequence[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Report:
    """Report of a finished run. `failing` maps each agent that was failing at the end to a reason."""

    duration_s: float
    dialects: dict[str, int]
    connections_opened: int
    calls: list[Calls]
    commands: Pushed | None
    failing: dict[str, str]

    @property
    def good(self) -> bool:
        """Return True if every agent runs, every reply was decoded and every command that was sent arrived."""
        arrived = self.commands is None or (self.commands.sent > 0 and self.commands.in_hand == self.commands.sent)
        return arrived and not self.failing

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, without latencies of single commands."""
        shown = asdict(self) | {"good": self.good}
        if shown["commands"] is not None:
            del shown["commands"]["latencies_s"]
        return shown


def report(
    duration_s: float,
    agents: Sequence[LegacyAgent],
    tally: FleetStats,
    pusher: CommandLoad | None,
    warm_up_s: float = 0,
) -> Report:
    """Summarise a run. An agent that never had a successful response counts as failing."""
    silent = {agent.who.agent_id: "no answer to any call" for agent in agents if agent.who.agent_id not in tally.alive}
    calls = [
        Calls(
            what=what.value,
            ok=tally.counts[what, CallOutcome.OK],
            refused=tally.counts[what, CallOutcome.REFUSED],
            undecodable=tally.counts[what, CallOutcome.UNDECODABLE],
            failed=tally.counts[what, CallOutcome.FAILED],
            took=Summary.of(tally.took_s[what]),
        )
        for what in _CALLS
        if any(tally.counts[what, outcome] for outcome in CallOutcome)
    ]
    return Report(
        duration_s,
        dict(Counter(agent.profile.dialect for agent in agents)),
        sum(agent.connections_opened for agent in agents),
        calls,
        _pushed(pusher, warm_up_s) if pusher else None,
        silent | tally.failing(),
    )


def _pushed(pusher: CommandLoad, warm_up_s: float) -> Pushed:
    found = pusher.latencies_s()
    refused = dict(Counter(pusher.refused))
    return Pushed(pusher.pushed, len(found), pusher.answered, refused, Summary.of(found), warm_up_s, found)


def lines(found: Report) -> list[str]:
    """Format the report as text without colours."""
    dialects = ", ".join(f"{count} {name}" for name, count in found.dialects.items())
    herd = f"{plural(sum(found.dialects.values()), 'agent')} ({dialects})"
    shown = [
        f"{herd}, {found.duration_s:.1f} s, {found.connections_opened} connections opened",
        "",
        f"{'call':<10}{'ok':>9}{'refused':>9}{'undecod.':>9}{'failed':>9}   time to answer",
    ]
    for call in found.calls:
        counts = f"{call.ok:>9}{call.refused:>9}{call.undecodable:>9}{call.failed:>9}"
        shown.append(f"{call.what:<10}{counts}   {call.took or ''}".rstrip())
    if found.commands:
        shown += ["", *_command_lines(found.commands)]
    shown += ["", f"failing agents: {len(found.failing)}"]
    shown += [f"  {agent_id}: {reason}" for agent_id, reason in list(found.failing.items())[:_MAX_SHOWN]]
    return shown + (["  …"] if len(found.failing) > _MAX_SHOWN else [])


def _command_lines(found: Pushed) -> list[str]:
    lost = found.sent - found.in_hand
    shown = [f"commands: {found.sent} sent, {found.in_hand} in hand, {found.answered} answered, {lost} missing"]
    shown += [f"  not sent: {count} times: {reason}" for reason, count in found.refused.items()]
    if found.latency:
        after = f"after {found.warm_up_s:g} s of warm-up" if found.warm_up_s else "without a warm-up"
        shown.append(f"from the controller's send until the agent has it in hand, {after}:")
        shown.append(f"  mean {duration(found.latency.mean_s)}  {found.latency}")
        shown += [f"  {line}" for line in histogram(found.latencies_s)]
    return shown
