"""One sentence about the whole, and what is wrong with what to do about it: pure, from the JSON of a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from shim.core.words import brief, plural, span

LEVELS = ("good", "waiting", "warning", "bad")
SETTLING_S = 10.0
"""A link is back within 10 s of its controller's return: until then its loss is no reason for alarm."""
_REASONS = {
    "dns": "its name cannot be resolved",
    "tcp": "it cannot be reached",
    "tls": "the TLS handshake fails",
    "timeout": "it does not answer in time",
    "proxy": "the proxy does not let us through",
    "token": "the token cannot be read",
    "handshake": "it does not speak WebSocket there",
    "half_open": "it has gone silent",
    "stalled": "it does not acknowledge heartbeats",
    "connection lost": "the connection was lost",
}


class Problem(NamedTuple):
    """What is wrong, and what to do about it (`""`: nothing, it is temporary)."""

    level: str
    text: str
    hint: str = ""


def judge(status: dict[str, Any]) -> dict[str, Any]:
    """`level` (one of `LEVELS`), `text` (the sentence) and `problems`, the worst first."""
    problems = sorted(_problems(status), key=lambda problem: -LEVELS.index(problem.level))
    level = problems[0].level if problems else "good"
    if level == "good":
        level, text = _all_well(status)
    else:
        text = problems[0].text
    return {"level": level, "text": text, "problems": [problem._asdict() for problem in problems]}


def reason_text(reason: str | None) -> str:
    """The words for `LinkRunner.last_failure`."""
    if not reason:
        return "the reason is not known"
    kind, _, number = reason.partition(" ")
    if kind == "status":
        return f"it answers {number}"
    if kind == "closed" and number.isdigit():
        return f"it closed the connection ({number})"
    return _REASONS.get(reason, reason)


def _words(link: dict[str, Any]) -> str:
    """The controller's own words about the link's end, where it gave any."""
    return f": “{brief(link['detail'])}”" if link.get("detail") else ""


def _problems(status: dict[str, Any]) -> Iterator[Problem]:
    yield from _own(status)
    if status["mode"] != "http":
        for link in status["links"]["items"]:
            yield from _of_link(link, status)
    yield from _of_agents(status)
    yield from _of_drain(status["drain"])
    yield from _of_replicas(status.get("replicas"))


def _own(status: dict[str, Any]) -> Iterator[Problem]:
    for reason in status["not_ready"]:
        if "store" in reason:
            yield Problem("bad", f"Not ready: {reason}.", "Look at the disk of store.path: full, read-only, or gone?")
        elif reason == "stopping":
            yield Problem("warning", "The shim is stopping.")
    if not status["config_valid"]:
        yield Problem(
            "warning",
            "The configuration file is faulty; the one before it is still in use.",
            "agent-shim check-config lists all faults.",
        )


def _of_link(link: dict[str, Any], status: dict[str, Any]) -> Iterator[Problem]:
    several = status["links"]["total"] > 1
    name = f"link {link['name']}: " if several else ""
    since_s = status["now"] - link["since"]
    if link["phase"] == "refused":
        hint = "An agent's own token: check the agent's." if status["own_tokens"] else "Check upstream.token."
        yield Problem("bad", f"The controller refuses the token ({name}{link['reason']}{_words(link)}).", hint)
    elif link["contended"]:
        yield Problem(
            "bad",
            f"Another process uses our identity: the controller keeps closing {name.rstrip(': ') or 'the connection'}.",
            "Is a second shim, or a migrated agent, running for the same cluster?",
        )
    elif link["phase"] == "down":
        why = f"{name}{reason_text(link['reason'])}{_words(link)}"
        if since_s < SETTLING_S:
            yield Problem("warning", f"Connecting to the controller ({why}).")
        else:
            rest = "Calls go by the vendor's HTTP API." if status["by_http"] else "Agents are answered as usual."
            yield Problem(
                "bad",
                f"The controller has been away for {span(since_s)}: {why}. {rest}",
                "agent-shim doctor tests the way to it step by step.",
            )


def _of_agents(status: dict[str, Any]) -> Iterator[Problem]:
    sessions, commands = status["sessions"], status["commands"]
    silent = sessions["silent"]
    if silent and not status["by_http"]:
        who = _names([s for s in sessions["items"] if not s["fresh"]], silent)
        yield Problem(
            "warning",
            f"{plural(silent, 'agent')} silent: {who}.",
            "Nothing is said upstream for an agent that is silent. Is its pod running, and does it call here?",
        )
    if sessions["not_polling"]:
        who = _names([s for s in sessions["items"] if s["queue"]["not_polling"]], sessions["not_polling"])
        yield Problem(
            "warning",
            f"Commands wait for an agent that does not ask for them: {who}.",
            "Stock agents never fetch commands; agent-shim purge ID gives one up.",
        )
    if commands["uncertain"]:
        number = plural(commands["uncertain"], "command")
        yield Problem(
            "warning",
            f"{number} in doubt: offered, and nobody can tell whether the agent has it.",
            "Offered again at the agent's next poll, unless commands.at_most_once names its type.",
        )


def _names(sessions: list[dict[str, Any]], number: int) -> str:
    shown = ", ".join(brief(session["name"] or session["id"]) for session in sessions[:3])
    return shown if number <= 3 else f"{shown} and {number - 3} more"


def _of_replicas(replicas: dict[str, Any] | None) -> Iterator[Problem]:
    if replicas is not None and replicas["unowned"]:
        number = plural(replicas["unowned"], "shard")
        yield Problem(
            "warning",
            f"{number} without an owner: links are down.",
            "Taken by a replica within seconds; if not, see its log (shard_not_opened).",
        )


def _of_drain(drain: dict[str, Any]) -> Iterator[Problem]:
    left = f"{plural(drain['commands'], 'command')} and {plural(drain['results'], 'result')} left"
    match drain["state"]:
        case "draining":
            yield Problem(
                "warning", f"Draining: {left}; new commands are refused.", "agent-shim drain --cancel ends it."
            )
        case "timed out":
            yield Problem(
                "bad",
                f"The drain did not end in time: {left}.",
                "Wait, purge what nobody fetches, or drain again; agent-shim drain --cancel takes commands again.",
            )
        case "drained":
            yield Problem(
                "warning", "Drained: nothing is left here, and new commands are refused.", "It can be stopped."
            )


def _all_well(status: dict[str, Any]) -> tuple[str, str]:
    sessions = status["sessions"]
    if status["mode"] == "http":
        return "good", f"All calls go by the vendor's HTTP API ({status['fallback']}), as mode http says."
    if not sessions["total"] and status.get("replicas"):
        return "good", "This replica serves agents; it owns no agent's link now."
    if not sessions["total"]:
        where = f"http://{status['listen']}" if status["listen"] else "the shim"
        return "waiting", f"Nobody has called yet: point the agent's PIPEOPS_API_URL at {where}."
    agents = f"{plural(sessions['fresh'], 'agent')} alive"
    if status["links"]["online"]:
        return "good", f"All is well: the controller is connected, {agents}."
    return "waiting", "No agent is alive, so the link to the controller rests."
