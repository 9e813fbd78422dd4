"""Health summary of a status: one sentence, and a list of problems with hints.

The sentences come first, then the conditions under which they apply. docs/how-to/diagnose.md#what-the-status-says has
the causes; a test compares that table with this list. Readiness: `status_builder.Health`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import floor
from typing import Any, NamedTuple

from msgspec import UnsetType

from shim.core.text import format_duration, plural, shorten
from shim.management.status import ControllerStatus, DrainStatus, Status

LEVELS = ("good", "waiting", "warning", "bad")


class Sentence(NamedTuple):
    """One sentence. An empty `hint` means that no action is needed."""

    level: str
    text: str
    hint: str = ""


SENTENCES: dict[str, Sentence] = {
    # --- the process itself ---
    "store_unwritable": Sentence(
        "bad",
        "Not ready: {reason}.",
        "Check the disk of store.path: it may be full, read-only or gone. With store.url: the log says why the database"
        " does not answer.",
    ),
    "stopping": Sentence("warning", "The shim is stopping."),
    "configuration_faulty": Sentence(
        "warning",
        "The configuration file is faulty; the one before it is still in use.",
        "agent-shim check-config lists all faults.",
    ),
    "log_lines_lost": Sentence(
        "warning",
        "{lines} could not be written.",
        "Check that a program reads the log, and that its disk has room.",
    ),
    "store_log_pinned": Sentence(
        "warning",
        "Another program keeps a transaction open on the database: its write-ahead log has grown to {size}.",
        "End that program, for example a backup or a sqlite3 shell; fuser -v FILE names it.",
    ),
    "store_replaced": Sentence(
        "warning",
        "The database was damaged and was replaced by an empty one {time} ago.",
        "Commands and results that were only in it are lost; store_moved_aside in the log names the damaged file.",
    ),
    # --- the link ---
    "token_refused": Sentence("bad", "The controller refuses the token ({link}{reason}).", "{hint}"),
    "identity_contended": Sentence(
        "bad",
        "Another process uses the same identity: the controller keeps closing {link}.",
        "Stop the other one: a second shim, or a migrated agent, of the same cluster.",
    ),
    "link_connecting": Sentence("warning", "Connecting to the controller ({link}{reason})."),
    "link_down": Sentence(
        "bad",
        "No connection to the controller for {time}: {link}{reason}. {agents}",
        "{hint}",
    ),
    # --- what the controller knows ---
    "registration_refused": Sentence(
        "bad",
        "The controller refuses to register {agent} ({status}): {error}.",
        "docs/how-to/diagnose.md#registration-fails explains each status.",
    ),
    "registration_unanswered": Sentence(
        "bad",
        "The controller does not answer the registration of {agent}.",
        "The shim asks again at the agent's next calls. The controller may be overloaded.",
    ),
    "name_unknown": Sentence(
        "bad",
        "The controller does not know {agents}, and the shim has no name to register with.",
        "Set identity.name and restart the shim. With several agents, make each of them register again.",
    ),
    "agent_unknown": Sentence(
        "bad",
        "The controller does not know {agents}: {error}.",
        "The shim sent a registration without success: see register_failed in the log.",
    ),
    "heartbeats_refused": Sentence(
        "bad",
        "The controller refuses the heartbeats of {agents}: {error}.",
        "The controller's text says why. Until then it does not show the agent as connected.",
    ),
    "heartbeats_unacknowledged": Sentence(
        "warning",
        "The controller does not acknowledge the heartbeats of {agents}.",
        "If the controller does not show them as connected, it does not know their cluster ids.",
    ),
    # --- the agents ---
    "not_registered": Sentence(
        "bad",
        "Called, not registered: {agents}.",
        "Restart the agent: it registers only when it starts.",
    ),
    "calls_refused": Sentence("warning", "{calls} refused in the last minute: {kinds}.", "{hint}"),
    "agents_silent": Sentence(
        "warning",
        "{number} silent: {agents}.",
        "The shim sends no heartbeats for a silent agent. Check that its pod runs and calls the shim; "
        "agent-shim forget AGENT removes one that is gone.",
    ),
    "commands_not_fetched": Sentence(
        "warning",
        "Commands wait for agents that do not fetch them: {agents}.",
        "Stock agents never fetch commands; agent-shim purge ID discards one.",
    ),
    "commands_in_doubt": Sentence(
        "warning",
        "{number} in doubt: sent, without evidence that the agent has read it.",
        "The shim sends it again at the agent's next poll, unless commands.at_most_once names its type.",
    ),
    # --- the vendor's HTTP API ---
    "fallback_failing": Sentence(
        "bad", "The vendor's HTTP API did not serve {failed} of {calls} in the last minute: {kinds}.", "{hint}"
    ),
    "fallback_failed": Sentence(
        "bad", "The vendor's HTTP API did not serve the last call, {time} ago: {kinds}.", "{hint}"
    ),
    # --- several replicas ---
    "shards_unowned": Sentence(
        "warning",
        "{number} without an owner: the links are down.",
        "A replica takes them within seconds; if not, see shard_not_opened in its log.",
    ),
    # --- drain ---
    "draining": Sentence(
        "warning", "Draining: {left}; new commands are refused.", "agent-shim drain --cancel ends it."
    ),
    "drain_timed_out": Sentence(
        "bad",
        "The drain did not end in time: {left}.",
        "Wait, purge commands that no agent fetches, or drain again. agent-shim drain --cancel ends it.",
    ),
    "drained": Sentence(
        "warning", "Drained: nothing is left here, and new commands are refused.", "The shim can be stopped."
    ),
    # --- nothing is wrong ---
    "nobody_called": Sentence("waiting", "No agent has called yet. Set the agent's PIPEOPS_API_URL to {url}."),
    "agents_arriving": Sentence("waiting", "{number} called, not registered yet."),
    "no_agent_alive": Sentence("waiting", "No known agent is alive; the link to the controller {link}."),
    "needs_no_shim": Sentence(
        "good",
        "{number} connected by WebSocket, independent of the shim: {agents}.",
        "Give the agent the vendor's own address.",
    ),
    "objectives_missed": Sentence(
        "waiting",
        "Missed in the past hour: {objectives}.",
        "This note is gone an hour after the last failure. docs/how-to/diagnose.md#alerts has the causes.",
    ),
    "all_by_http": Sentence("good", "All calls go to the vendor's HTTP API ({url}), because mode is http: {agents}."),
    "replica_without_links": Sentence("good", "This replica serves agents; it owns no agent's link now."),
    "all_well": Sentence("good", "All is well: {link}, {agents}."),
}

PROBLEMS = tuple(code for code, sentence in SENTENCES.items() if sentence.level in ("warning", "bad"))
"""Codes of the metric `agent_shim_health_problem`."""

RUN_DOCTOR = "agent-shim doctor tests the connection step by step."
REFUSED_HINTS = {
    0: RUN_DOCTOR,
    400: "The agent's log shows the request; see docs/how-to/diagnose.md#the-agent.",
    401: "Check the agent's token; with listen.auth it must be the shim's own.",
    403: "A browser called, or the Host header is not in listen.allowed_hosts.",
    404: "PIPEOPS_API_URL must be the shim's address alone. A path before /api needs listen.base_path.",
    409: "The cluster's name or id belongs to another agent.",
    410: "The vendor has switched the old API off: its sunset is over.",
    429: "More calls of one agent at once than listen.max_in_flight_per_session allows.",
    431: "The request's head is larger than the shim accepts.",
    502: "The controller, or the vendor's HTTP API, gave no usable answer.",
    503: "The link, the store or the number of agents is the cause; the reason says which.",
}
"""Hints for the most frequent status among rejected calls. Other statuses have no hint."""


# --- conditions -------------------------------------------------------------------------------------------------------

SETTLING_S = 10.0
"""Seconds in which a lost link is no problem yet: it is back within 10 s of the controller's return."""
STARTING_S = 60.0
"""Seconds after the start in which known agents may not have called again yet."""
KINDS_SHOWN = 3
MIB = 1_048_576
FALLBACK_FAILED_S = 86_400.0
STORE_REPLACED_S = 86_400.0
_REASONS = {
    "dns": "its name cannot be resolved",
    "tcp": "it cannot be reached",
    "tls": "the TLS handshake fails",
    "timeout": "it does not answer in time",
    "proxy": "there is no way through the proxy",
    "token": "the token cannot be read",
    "handshake": "it does not speak WebSocket there",
    "half_open": "it has gone silent",
    "stalled": "it does not acknowledge heartbeats",
    "connection lost": "the connection was lost",
}


class Problem(NamedTuple):
    """One sentence with its placeholders filled in. `code` is its key in `SENTENCES`."""

    code: str
    level: str
    text: str
    hint: str


def make_problem(code: str, **fields: Any) -> Problem:
    """Return a sentence with its placeholders filled in."""
    sentence = SENTENCES[code]
    return Problem(code, sentence.level, sentence.text.format(**fields), sentence.hint.format(**fields))


def summarise(status: Status) -> dict[str, Any]:
    """Return `level`, `code` and `text` of the main sentence, `problems` (the worst first) and `notes`."""
    problems = sorted(_problems(status), key=lambda problem: -LEVELS.index(problem.level))
    first = problems[0] if problems else _nothing_wrong(status)
    return {
        "level": first.level,
        "code": first.code,
        "text": first.text,
        "problems": [problem._asdict() for problem in problems],
        "notes": [note._asdict() for note in _notes(status) if note.code != first.code],
    }


def reason_text(reason: str | None) -> str:
    """Return a description of `UpstreamLink.last_failure`."""
    if not reason:
        return "the reason is not known"
    kind, _, number = reason.partition(" ")
    if kind == "status":
        return f"it answers {number}"
    if kind == "closed" and number.isdigit():
        return f"it closed the connection ({number})"
    return _REASONS.get(reason, reason)


def _problems(status: Status) -> Iterator[Problem]:
    yield from _of_process(status)
    if not status.all_by_http:
        yield from _of_links(status)
        yield from _of_controller(status.controller, status.now)
    yield from _of_fallback(status)
    yield from _of_agents(status)
    yield from _of_commands(status)
    yield from _of_drain(status.drain)
    yield from _of_replicas(status.replicas)


def _of_process(status: Status) -> Iterator[Problem]:
    for reason in status.not_ready:
        if "store" in reason:
            yield make_problem("store_unwritable", reason=reason)
        elif reason == "stopping":
            yield make_problem("stopping")
    if not status.config_valid:
        yield make_problem("configuration_faulty")
    if status.log.lost:
        yield make_problem("log_lines_lost", lines=plural(status.log.lost, "log line"))
    if status.store.log_pinned:
        yield make_problem("store_log_pinned", size=f"{status.store.log_bytes / MIB:.0f} MiB")
    age_s = status.now - status.started_at
    if status.store.replaced and age_s < STORE_REPLACED_S:
        yield make_problem("store_replaced", time=format_duration(age_s))


# --- the link ---------------------------------------------------------------------------------------------------------


def _words(link: dict[str, Any]) -> str:
    """Return the controller's close text for a link, `""` without one."""
    return f": “{shorten(link['detail'])}”" if link.get("detail") else ""


def _of_links(status: Status) -> Iterator[Problem]:
    """Yield the problems of all links; many refused tokens are one problem, or they would hide all others."""
    refused = [link for link in status.links.items if link["phase"] == "refused"]
    for link in status.links.items:
        if len(refused) <= KINDS_SHOWN or link["phase"] != "refused":
            yield from _of_link(link, status)
    if len(refused) > KINDS_SHOWN:
        names = f"{', '.join(link['name'] for link in refused[:KINDS_SHOWN])} and {len(refused) - KINDS_SHOWN} more"
        yield from _of_link({**refused[0], "name": names}, status)


def _of_link(link: dict[str, Any], status: Status) -> Iterator[Problem]:
    several = status.links.total > 1
    name = f"link {link['name']}: " if several else ""
    since_s = status.now - link["since"]
    if link["phase"] == "refused":
        reason = f"{link['reason']}{_words(link)}"
        yield make_problem("token_refused", link=name, reason=reason, hint=_token_hint(status))
    elif link["contended"]:
        yield make_problem("identity_contended", link=name.rstrip(": ") or "the connection")
    elif link["phase"] == "down":
        why = f"{reason_text(link['reason'])}{_words(link)}"
        if since_s < SETTLING_S:
            yield make_problem("link_connecting", link=name, reason=why)
        else:
            agents = "Calls go by the vendor's HTTP API." if status.by_http else "Agents are answered as usual."
            hint = _down_hint(link)
            yield make_problem(
                "link_down", time=format_duration(since_s), link=name, reason=why, agents=agents, hint=hint
            )


def _down_hint(link: dict[str, Any]) -> str:
    """Return what to do about a link that is down."""
    if link["reason"] == "proxy" and "HTTP 407" in (link.get("detail") or ""):
        return "The proxy wants credentials: upstream.proxy: http://user:password@host:port."
    return RUN_DOCTOR


def _token_hint(status: Status) -> str:
    """Return where the token is that the controller refuses."""
    ours = "Check upstream.token or the file that upstream.token_file names."
    return "An agent's own token: check the agent's." if status.own_tokens else ours


def _of_controller(controller: ControllerStatus, now: float) -> Iterator[Problem]:
    for refusal in controller.registrations.items:
        agent = shorten(refusal["name"] or refusal["agent"] or "an agent")
        if refusal["status"] is None:
            yield make_problem("registration_unanswered", agent=agent)
        else:
            yield make_problem(
                "registration_refused", agent=agent, status=refusal["status"], error=_text(refusal["error"])
            )
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in controller.troubles.items:
        if each["kind"] == "unknown" and now - each["since"] < SETTLING_S:
            continue  # the agent is being registered again
        text = "" if each["kind"] == "name_unknown" else each["text"]
        by_kind.setdefault((each["kind"], text), []).append(each)
    codes = {"name_unknown": "name_unknown", "unknown": "agent_unknown", "heartbeats_refused": "heartbeats_refused"}
    for (kind, text), agents in by_kind.items():
        yield make_problem(codes[kind], agents=_names(agents, len(agents)), error=_text(text))
    unacknowledged = controller.unacknowledged
    if unacknowledged.total:
        yield make_problem("heartbeats_unacknowledged", agents=_names(unacknowledged.items, unacknowledged.total))


def _text(error: str | None) -> str:
    return shorten((error or "no reason given").rstrip("."))


# --- agents -----------------------------------------------------------------------------------------------------------


def _of_agents(status: Status) -> Iterator[Problem]:
    sessions, refused = status.sessions, status.refused
    unregistered = [each for each in status.unregistered.items if each["overdue"]]
    if unregistered:
        yield make_problem("not_registered", agents=_names(unregistered, len(unregistered)))
    if refused.calls:
        yield make_problem(
            "calls_refused",
            calls=plural(refused.calls, "call"),
            kinds=_kinds(refused.kinds),
            hint=_refused_hint(refused.kinds[0], status),
        )
    if sessions.silent and status.now - status.started_at >= STARTING_S:
        silent = [session for session in sessions.items if session["silent"]]
        yield make_problem(
            "agents_silent", number=plural(sessions.silent, "agent"), agents=_names(silent, sessions.silent)
        )


def _refused_hint(kind: dict[str, Any], status: Status) -> str:
    """Return the next step for rejected calls: a 401 of the controller is about the token that the link uses."""
    if kind["reason"] == "the controller refuses the token":
        return _token_hint(status)
    return REFUSED_HINTS.get(kind["status"], "")


def _of_commands(status: Status) -> Iterator[Problem]:
    sessions, in_doubt = status.sessions, status.commands.uncertain
    if sessions.not_polling:
        waiting = [session for session in sessions.items if session["queue"]["not_polling"]]
        yield make_problem("commands_not_fetched", agents=_names(waiting, sessions.not_polling))
    if in_doubt:
        yield make_problem("commands_in_doubt", number=plural(in_doubt, "command"))


def _kinds(kinds: list[dict[str, Any]]) -> str:
    """Return kinds of calls as text: `404 GET /x (no such endpoint, 4 times)`."""
    shown = []
    for kind in kinds[:KINDS_SHOWN]:
        remarks = [kind["reason"]] if kind["reason"] else []
        remarks += [f"{kind['calls']} times"] if kind["calls"] > 1 else []
        remark = f" ({', '.join(remarks)})" if remarks else ""
        shown.append(f"{kind['status'] or 'no answer,'} {kind['route']}{remark}")
    more = len(kinds) - KINDS_SHOWN
    return ", ".join(shown) + (f" and {plural(more, 'more kind')}" if more > 0 else "")


def _names(agents: list[dict[str, Any]], number: int) -> str:
    shown = ", ".join(shorten(agent.get("name") or agent["id"]) for agent in agents[:3])
    return shown if number <= 3 else f"{shown} and {number - 3} more"


# --- the vendor's HTTP API --------------------------------------------------------------------------------------------


def _of_fallback(status: Status) -> Iterator[Problem]:
    calls = status.fallback_calls
    if not calls.used:
        return  # calls are no longer sent there, so earlier failures are no problem
    kinds = calls.failures
    if kinds:
        yield make_problem(
            "fallback_failing",
            failed=calls.failed,
            calls=plural(calls.calls, "call"),
            kinds=_kinds(kinds),
            hint=_fallback_hint(kinds[0]["status"]),
        )
        return
    last = calls.last_failure
    if calls.failing_since is not None and last and status.now - last["at"] < FALLBACK_FAILED_S:
        yield make_problem(
            "fallback_failed",
            time=format_duration(status.now - last["at"]),
            kinds=f"{last['status'] or last['reason'] or 'no answer'} {last['operation'] or 'another call'}",
            hint=_fallback_hint(last["status"]),
        )


def _fallback_hint(status: int | None) -> str:
    if not status:
        return "agent-shim doctor examines the way to it and the shim's own configuration."
    if status in (401, 403):
        return "The agent's token is not accepted there: fallback.use_upstream_token sends the shim's own."
    if status == 404:
        return "Is fallback.url the vendor's API, with its base path?"
    if 300 <= status < 400:
        return "fallback.url must be the address itself: agents are handed the redirect as it is."
    return REFUSED_HINTS.get(status, "The vendor's side; a return to mode websocket needs no agent's restart.")


# --- replicas, drain --------------------------------------------------------------------------------------------------


def _of_replicas(replicas: dict[str, Any] | UnsetType) -> Iterator[Problem]:
    if isinstance(replicas, dict) and replicas["unowned"]:
        yield make_problem("shards_unowned", number=plural(replicas["unowned"], "shard"))


def _of_drain(drain: DrainStatus) -> Iterator[Problem]:
    left = f"{plural(drain.commands, 'command')} and {plural(drain.results, 'result')} left"
    codes = {"draining": "draining", "timed out": "drain_timed_out", "drained": "drained"}
    if drain.state in codes:
        yield make_problem(codes[drain.state], left=left)


# --- nothing is wrong -------------------------------------------------------------------------------------------------


def _notes(status: Status) -> Iterator[Problem]:
    """Yield notes: facts worth knowing that are no problem now."""
    missed = [_missed(each) for each in status.objectives if each["windows"]["1h"]["state"] == "missed"]
    if missed:
        yield make_problem("objectives_missed", objectives=", ".join(missed))
    yield from _websocket_notes(status)


def _missed(objective: dict[str, Any]) -> str:
    """Return a missed objective as text; the share is rounded down, or one missed by little would look met."""
    share = floor(objective["windows"]["1h"]["measured"] * 10_000) / 100
    name = objective["name"].replace("_", " ")
    return f"{name} {share:g} % instead of more than {objective['target'] * 100:g} %"


def _websocket_notes(status: Status) -> Iterator[Problem]:
    """Yield a note about agents that need no shim."""
    agents = status.websocket_agents
    if agents.total:
        shown = [{"id": each["cluster_id"] or each["agent_id"] or "?", **each} for each in agents.items]
        names = _names(shown, agents.total)
        yield make_problem("needs_no_shim", number=plural(agents.total, "agent"), agents=names)


def _nothing_wrong(status: Status) -> Problem:
    sessions = status.sessions
    if status.all_by_http:
        return make_problem("all_by_http", url=status.fallback, agents=_http_agents(status) or "no agent by HTTP yet")
    if not sessions.total:
        if status.replicas:
            return make_problem("replica_without_links")
        notes = list(_websocket_notes(status))
        if notes:
            return notes[0]
        arriving = status.unregistered.total
        if arriving:
            return make_problem("agents_arriving", number=plural(arriving, "agent"))
        return make_problem("nobody_called", url=status.agents_url or "the shim")
    by_http, online = _http_agents(status), bool(status.links.online)
    if not sessions.fresh and not by_http:
        return make_problem("no_agent_alive", link="is up" if online else "is idle")
    alive = [f"{plural(sessions.fresh, 'agent')} alive"] if sessions.fresh or not by_http else []
    link = "the controller is connected" if online else "the link to the controller is idle"
    return make_problem("all_well", link=link, agents=", ".join([*alive, *filter(None, [by_http])]))


_WHY = {"mode": "", "rollout": " (outside the rollout)", "link_down": " (while the link is down)"}


def _http_agents(status: Status) -> str:
    """Return the number of agents served by HTTP and the reasons, `""` if there is none."""
    reasons = status.sessions.by_http
    return ", ".join(f"{plural(number, 'agent')} by HTTP{_WHY[why]}" for why, number in reasons.items() if number)
