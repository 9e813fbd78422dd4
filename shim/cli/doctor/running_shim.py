"""Findings on a running shim from its admin port: link, agents and calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from shim.cli.admin_client import AdminPort
from shim.cli.doctor.report import Finding, failed, passed, warned
from shim.cli.status import mode_words
from shim.config.settings import Settings
from shim.core.text import shorten
from shim.hosts import host_and_port
from shim.protocol.http import origin_of

EARLY_MANY = 3
MISSED_SHARE = 0.001
SHOWN = 5

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True, slots=True)
class RunningShim:
    """Responses of a running shim; empty if none answers.

    `trouble` is the reason why none answers, or why `/status.json` could not be read.

    `configuration` is the shim's, secrets masked; empty if the shim does not show it.
    """

    where: str
    answers: bool = False
    status: dict[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)
    trouble: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)

    def holds(self, check: str, port: int) -> bool:
        """Return True if the shim listens on this port for agents (`listen`) or for operators (`admin`)."""
        if not self.answers:
            return False
        place = self.where if check == "admin" else str(self.status.get("listen", ""))
        return place.rpartition(":")[2] == str(port)

    def is_online(self, settings: Settings) -> bool:
        """Return True if its link to the controller of this configuration is online."""
        same = self.status.get("upstream") == origin_of(settings.upstream.url)
        return same and bool(self.status.get("links", {}).get("online"))

    def count(self, name: str, **labels: str) -> float:
        """Return a counter's value, summed over the samples with these labels."""
        wanted = set(labels.items())
        return sum(value for (found, given), value in self.samples.items() if found == name and wanted <= set(given))


def ask(host: str, port: int, token: str) -> RunningShim:
    """Query the admin port."""
    where = host_and_port(host, port)
    try:
        status, text = AdminPort(host, port).exchange("GET", "/metrics")
        if status != 200 or "agent_shim_" not in text:
            return RunningShim(where, trouble="another program answers, or a shim's port for agents")
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        status, body = AdminPort(host, port, token).exchange("GET", "/status.json")
        told = json.loads(body) if body else {}
        shown, body = AdminPort(host, port, token).exchange("GET", "/config.json")
        configuration = json.loads(body) if shown == 200 else {}
    except OSError as error:
        return RunningShim(where, trouble=error.strerror or str(error) or type(error).__name__)
    except (HTTPException, ValueError):
        return RunningShim(where, trouble="another program answers, which does not speak HTTP")
    if status != 200 or not isinstance(told, dict):
        why = "it wants the admin token: --admin-token-file" if status == 401 else f"/status.json answers {status}"
        return RunningShim(where, True, {}, samples, why)
    return RunningShim(
        where, True, told, samples, configuration=configuration if isinstance(configuration, dict) else {}
    )


def examine(running: RunningShim, *, must_run: bool = False) -> Iterator[Finding]:
    """Return the findings on the running shim. With `must_run` it is a failure that none answers."""
    if not running.answers:
        why = f" ({running.trouble})" if running.trouble else ""
        todo = "start it, or name its admin port (admin.host, admin.port, --url), to examine agents and heartbeats"
        finding = failed if must_run else warned
        yield finding("shim", f"no shim answers on the admin port {running.where}{why}", todo)
        return
    status = running.status
    if running.trouble:
        yield warned("shim", f"one answers on {running.where}", running.trouble)
    else:
        yield _shim(running.where, status)
        yield from _health(status["overall"])
        yield from _links(status)
    yield from _endings(running)
    yield from _registrations(running)
    yield from _heartbeats(running)
    if not running.trouble:
        yield from _agents(status)


def _health(overall: dict[str, Any]) -> Iterator[Finding]:
    """Repeat what the shim itself says of its health, so that doctor and the status page never differ."""
    for problem in overall["problems"]:
        finding = failed if problem["level"] == "bad" else warned
        hint = problem["hint"] or "nothing, unless another line says FAIL: it passes by itself"
        if hint.startswith("agent-shim doctor "):
            hint = "the lines above show how far the connection gets"
        yield finding("health", problem["text"], hint)
    if not overall["problems"]:
        text = overall["text"]
        yield warned("health", text, "agents come first") if overall["level"] == "waiting" else passed("health", text)


def _shim(where: str, status: dict[str, Any]) -> Finding:
    text = f"version {status['version']} on {where}, {mode_words(status)}"
    if status["not_ready"]:
        return failed("shim", f"{text}, not ready: {'; '.join(status['not_ready'])}", "its log says more")
    if not status["config_valid"]:
        return warned("shim", f"{text}, with an older configuration", "agent-shim check-config lists the file's faults")
    return passed("shim", f"{text}, ready")


def _links(status: dict[str, Any]) -> Iterator[Finding]:
    """Count the links; those in trouble are among the health findings."""
    links = status["links"]
    if links["online"]:
        yield passed("link", f"{links['online']} of {links['total']} online")
    elif all(link["phase"] == "idle" for link in links["items"]):
        yield passed("link", "idle: no living agent needs it")


def _endings(running: RunningShim) -> Iterator[Finding]:
    early = running.count("agent_shim_upstream_early_disconnects_total")
    name = "agent_shim_upstream_disconnects_total"
    reasons = {reason: running.count(name, reason=reason) for reason in ("closed", "lost", "half_open", "stalled")}
    told = ", ".join(f"{reason} {number:.0f}" for reason, number in reasons.items() if number)
    if early > EARLY_MANY:
        todo = "docs/how-to/diagnose.md, AgentShimFlapping: what each reason means"
        yield warned("stability", f"{early:.0f} connections ended within seconds of being made ({told})", todo)
    elif told:
        yield passed("stability", f"connections that ended since the start: {told}")
    else:
        yield passed("stability", "no connection was lost since the start")


def _registrations(running: RunningShim) -> Iterator[Finding]:
    name = "agent_shim_registrations_total"
    refused = {outcome: running.count(name, outcome=outcome) for outcome in ("400", "401", "409", "502")}
    parts = [f"{running.count(name, outcome='ok'):.0f} accepted"]
    parts += [f"{number:.0f} refused with {outcome}" for outcome, number in refused.items() if number]
    unanswered = running.count(name, outcome="timeout")
    parts += [f"{unanswered:.0f} not answered in time"] if unanswered else []
    text = ", ".join(parts)
    if len(parts) > 1:
        todo = "the log line register_failed has the controller's text; docs/how-to/diagnose.md, Registration fails"
        yield warned("registrations", text, todo)
    else:
        yield passed("registrations", text)


def _heartbeats(running: RunningShim) -> Iterator[Finding]:
    name = "agent_shim_agent_heartbeats_total"
    acked, written, missed = (running.count(name, outcome=each) for each in ("acked", "written", "missed"))
    total = acked + written + missed
    text = f"{acked:.0f} acknowledged, {missed:.0f} not acknowledged in time"
    if written:
        text += f", {written:.0f} only written: the controller never acknowledges"
    if total and missed / total > MISSED_SHARE:
        todo = "docs/how-to/diagnose.md, AgentShimHeartbeatsNotHeard: the link, the cluster id, identity.name"
        yield warned("heartbeats", text, todo)
    else:
        yield passed("heartbeats", text if total else "none yet, or none whose time is over")


def _agents(status: dict[str, Any]) -> Iterator[Finding]:
    """Count the agents; those in trouble are among the health findings."""
    sessions = status["sessions"]
    if not sessions["total"]:
        return
    by_http = sum(sessions.get("by_http", {}).values())  # older shims do not count them
    text = f"{sessions['fresh']} alive of {sessions['total']} known"
    yield passed("agents", f"{text}, {by_http} by HTTP" if by_http else text)
    yield from _patience(sessions["items"])


def _patience(items: list[dict[str, Any]]) -> Iterator[Finding]:
    """Return the time-outs of agents' HTTP clients that the shim has learnt."""
    learnt = [each for each in items if each["hold"]["ceiling_s"] is not None]
    if learnt:
        told = ", ".join(f"{_named(each)} {each['hold']['ceiling_s'] + 1:.0f} s" for each in learnt[:SHOWN])
        yield passed("timeouts", f"learnt of clients that hang up: {told}; polls are answered 1 s before")
    elif any(each["poll_at"] is not None for each in items):
        yield passed("timeouts", "no client has hung up on a held poll")


def _named(session: dict[str, Any]) -> str:
    return shorten(session["name"] or session["id"])
