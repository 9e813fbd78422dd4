"""The sentence: the worst that is true, in words of what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from shim.cli.status import replicas_line
from shim.management.health_summary import PROBLEMS, SENTENCES, reason_text, summarise
from shim.management.status import SessionsStatus, Status

NOW = 10_000.0
FALLBACK: dict[str, Any] = {
    "used": False,
    "calls": 0,
    "failed": 0,
    "failures": [],
    "failing_since": None,
    "last": None,
    "last_failure": None,
}


UNUSED: dict[str, Any] = {
    "version": "1.2.3",
    "uptime_s": 3600.0,
    "rollout_percent": 100.0,
    "rollout_lists": False,
    "upstream": "https://api.vendor.test",
    "token_required": False,
    "objectives": [],
    "rollout": {},
    "migration": {
        "sunset": {},
        "counted_since": NOW,
        "routes": [],
        "agents": {"total": 0, "items": []},
        "removable": False,
        "reasons": [],
    },
    "events": [],
}
"""What the summary does not look at."""


def link(
    phase: str = "up", since_s: float = 60, reason: str | None = None, *, contended: bool = False
) -> dict[str, Any]:
    return {"name": "default", "phase": phase, "since": NOW - since_s, "reason": reason, "contended": contended}


def session(name: str, *, fresh: bool = True, not_polling: bool = False) -> dict[str, Any]:
    queue = {"not_polling": not_polling}
    return {"name": name, "id": f"c-{name}", "fresh": fresh, "silent": not fresh, "http": None, "queue": queue}


def status(**fields: Any) -> Status:
    links, sessions = fields.pop("links", [link()]), fields.pop("sessions", [session("prod")])
    fresh = sum(each["fresh"] for each in sessions)
    found = {
        **UNUSED,
        "now": NOW,
        "started_at": NOW - 3600,
        "mode": "websocket",
        "by_http": False,
        "fallback": None,
        "listen": "127.0.0.1:7080",
        "agents_url": "http://127.0.0.1:7080",
        "own_tokens": False,
        "config_valid": True,
        "not_ready": [],
        "drain": {"state": "off", "commands": 0, "results": 0},
        "links": {"total": len(links), "online": sum(each["phase"] == "up" for each in links), "items": links},
        "sessions": {
            "total": len(sessions),
            "fresh": fresh,
            "silent": len(sessions) - fresh,
            "by_http": {"mode": 0, "rollout": 0, "link_down": 0},
            "not_polling": sum(each["queue"]["not_polling"] for each in sessions),
            "items": sessions,
        },
        "commands": {"uncertain": 0},
        "log": {"lost": 0},
        "store": {"log_bytes": 0, "log_pinned": False},
        "websocket_agents": {"total": 0, "items": []},
        "refused": {"calls": 0, "kinds": []},
        "unregistered": {"total": 0, "items": []},
        "controller": {
            "registrations": {"total": 0, "items": []},
            "troubles": {"total": 0, "items": []},
            "unacknowledged": {"total": 0, "items": []},
        },
        "fallback_calls": FALLBACK,
        **fields,
    }
    return msgspec.convert(found, Status)


def with_sessions(of: Status, sessions: dict[str, Any]) -> Status:
    return msgspec.structs.replace(of, sessions=msgspec.convert(sessions, SessionsStatus))


def sentence(**fields: Any) -> tuple[str, str]:
    found = summarise(status(**fields))
    return found["level"], found["text"]


@pytest.mark.parametrize(
    "fields, level, text",
    [
        ({}, "good", "All is well: the controller is connected, 1 agent alive."),
        (
            {"sessions": []},
            "waiting",
            "No agent has called yet. Set the agent's PIPEOPS_API_URL to http://127.0.0.1:7080.",
        ),
        ({"links": [link("idle")]}, "good", "All is well: the link to the controller is idle, 1 agent alive."),
        ({"links": [link("down", 3, "tcp")]}, "warning", "Connecting to the controller (it cannot be reached)."),
        (
            {"links": [link("down", 150, "status 502")]},
            "bad",
            "No connection to the controller for 2 min: it answers 502. Agents are answered as usual.",
        ),
        (
            {"links": [link("down", 150, "dns")], "by_http": True, "mode": "auto"},
            "bad",
            (
                "No connection to the controller for 2 min: its name cannot be resolved. "
                "Calls go by the vendor's HTTP API."
            ),
        ),
        ({"links": [link("refused", 9, "status 401")]}, "bad", "The controller refuses the token (status 401)."),
        (
            {"own_tokens": True, "links": [link("refused", 9, "status 401")] * 5},
            "bad",
            "The controller refuses the token (link default, default, default and 2 more: status 401).",
        ),
        (
            {"links": [link("up", contended=True)]},
            "bad",
            "Another process uses the same identity: the controller keeps closing the connection.",
        ),
        (
            {
                "mode": "http",
                "by_http": True,
                "fallback": "https://old.test",
                "links": [link("down", 999, "tcp")],
            },
            "good",
            "All calls go to the vendor's HTTP API (https://old.test), because mode is http: no agent by HTTP yet.",
        ),
        (
            {
                "mode": "http",
                "fallback": "https://old.test",
                "links": [link("refused", 9, "status 401")],
                "migration": {**UNUSED["migration"], "sunset": {"days_left": -0.1}},
            },
            "bad",
            "The controller refuses the token (status 401).",
        ),
        (
            {
                "mode": "http",
                "fallback": "https://old.test",
                "migration": {**UNUSED["migration"], "sunset": {"days_left": -0.1}},
            },
            "good",
            "All is well: the controller is connected, 1 agent alive.",
        ),
        (
            {"sessions": [session("a", fresh=False), session("b")]},
            "warning",
            "1 agent silent: a.",
        ),
        (
            {"sessions": [session(name, fresh=False) for name in "abcde"]},
            "warning",
            "5 agents silent: a, b, c and 2 more.",
        ),
        ({"not_ready": ["the store cannot be written"]}, "bad", "Not ready: the store cannot be written."),
        ({"not_ready": ["stopping"]}, "warning", "The shim is stopping."),
        (
            {"config_valid": False},
            "warning",
            "The configuration file is faulty; the one before it is still in use.",
        ),
        (
            {"drain": {"state": "drained", "commands": 0, "results": 0}},
            "warning",
            "Drained: nothing is left here, and new commands are refused.",
        ),
    ],
)
def test_sentences(fields: dict[str, Any], level: str, text: str) -> None:
    assert sentence(**fields) == (level, text)


def test_the_worst_comes_first_and_every_problem_says_what_to_do() -> None:
    found = summarise(
        status(
            config_valid=False,
            links=[link("down", 60, "tls")],
            sessions=[session("a", fresh=False), session("b", not_polling=True)],
            commands={"uncertain": 2},
        )
    )
    assert [problem["level"] for problem in found["problems"]] == ["bad", *["warning"] * 4]
    assert found["text"] == found["problems"][0]["text"]
    assert all(problem["hint"] for problem in found["problems"])


def test_of_several_links_the_one_in_trouble_is_named() -> None:
    links = [{**link("down", 60, "tcp"), "name": "0f0f"}, link()]
    assert "link 0f0f" in sentence(links=links)[1]


@pytest.mark.parametrize(
    "reason, text",
    [
        ("timeout", "it does not answer in time"),
        ("closed 1006", "it closed the connection (1006)"),
        ("status 404", "it answers 404"),
        ("half_open", "it has gone silent"),
        ("something new", "something new"),
        (None, "the reason is not known"),
    ],
)
def test_reasons(reason: str | None, text: str) -> None:
    assert reason_text(reason) == text


def replicas(unowned: int = 0) -> dict[str, Any]:
    others = [{"name": "b", "self": False, "leaving": False, "shards": 4}]
    return {"replica": "a", "shards": 8, "owned": [0, 1, 2, 3], "unowned": unowned, "replicas": others}


def test_shards_without_an_owner_are_a_warning() -> None:
    told = summarise(status(replicas=replicas(unowned=2)))
    assert told["level"] == "warning"
    assert told["text"] == "2 shards without an owner: the links are down."


def test_a_replica_without_links_of_its_own_is_well() -> None:
    told = summarise(status(replicas=replicas(), sessions=[], links=[]))
    assert told["level"] == "good"
    assert "owns no agent's link" in told["text"]


def test_the_command_tells_of_the_other_replicas() -> None:
    assert replicas_line(replicas(unowned=1)) == "4 of 8 shards here, 1 without an owner; others: b: 4"
    assert replicas_line(replicas() | {"replicas": []}).endswith("others: none")


# --- the list of sentences --------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "diagnose.md").read_text()


def test_the_page_lists_every_sentence_as_it_is_with_cause_and_action() -> None:
    section = PAGE.split("## What the status says\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in section.splitlines() if row[:3] == "| `"]
    told = {cells[0].strip("| `"): (cells[1], cells[2]) for cells in rows[1:]}
    assert told == {code: (sentence.level, sentence.text) for code, sentence in SENTENCES.items()}
    assert all(len(cells) == 5 and all(cells) for cells in rows[1:])


def test_what_is_wrong_always_has_something_to_do_or_passes_by_itself() -> None:
    passing = {code for code, sentence in SENTENCES.items() if code in PROBLEMS and not sentence.hint}
    assert passing == {"stopping", "link_connecting"}


# --- what agents meet -------------------------------------------------------------------------------------------------


def refused(*kinds: tuple[int, int, str, str]) -> dict[str, Any]:
    items = [{"calls": calls, "status": status, "route": route, "reason": why} for calls, status, route, why in kinds]
    return {"calls": sum(kind[0] for kind in kinds), "kinds": items}


def controller(**lists: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("registrations", "troubles", "unacknowledged")
    return {name: {"total": len(lists.get(name, [])), "items": lists.get(name, [])} for name in names}


def trouble(kind: str, since_s: float = 60, text: str = "cluster not found", **who: str) -> dict[str, Any]:
    return {"id": "c-1", "name": None, "kind": kind, "text": text, "since": NOW - since_s, **who}


@pytest.mark.parametrize(
    "fields, code, text",
    [
        (
            {"refused": refused((4, 404, "POST /x", "no such endpoint"), (1, 401, "GET /y", "no token"))},
            "calls_refused",
            "5 calls refused in the last minute: 404 POST /x (no such endpoint, 4 times), 401 GET /y (no token).",
        ),
        (
            {"refused": refused(*((1, 400, f"GET /{number}", "") for number in range(5)))},
            "calls_refused",
            "5 calls refused in the last minute: 400 GET /0, 400 GET /1, 400 GET /2 and 2 more kinds.",
        ),
        (
            {"controller": controller(troubles=[trouble("name_unknown"), trouble("name_unknown", id="c-2")])},
            "name_unknown",
            "The controller does not know c-1, c-2, and the shim has no name to register with.",
        ),
        (
            {"controller": controller(troubles=[trouble("unknown", name="prod")])},
            "agent_unknown",
            "The controller does not know prod: cluster not found.",
        ),
        (
            {"controller": controller(troubles=[trouble("heartbeats_refused", text="quota exceeded.")])},
            "heartbeats_refused",
            "The controller refuses the heartbeats of c-1: quota exceeded.",
        ),
        (
            {"controller": controller(unacknowledged=[{"id": "c-1", "name": "prod", "since": NOW - 70}])},
            "heartbeats_unacknowledged",
            "The controller does not acknowledge the heartbeats of prod.",
        ),
        (
            {
                "controller": controller(
                    registrations=[{"name": "prod", "agent": "", "status": 400, "error": "no name"}]
                )
            },
            "registration_refused",
            "The controller refuses to register prod (400): no name.",
        ),
        (
            {"controller": controller(registrations=[{"name": None, "agent": "a", "status": None, "error": "late"}])},
            "registration_unanswered",
            "The controller does not answer the registration of a.",
        ),
        (
            {"unregistered": {"total": 1, "items": [{"id": "agent-9", "overdue": True}]}, "sessions": []},
            "not_registered",
            "Called, not registered: agent-9.",
        ),
        (
            {"unregistered": {"total": 1, "items": [{"id": "agent-9", "overdue": False}]}, "sessions": []},
            "agents_arriving",
            "1 agent called, not registered yet.",
        ),
        ({"log": {"lost": 3}}, "log_lines_lost", "3 log lines could not be written."),
        (
            {"store": {"log_bytes": 200_278_016, "log_pinned": True}},
            "store_log_pinned",
            "Another program keeps a transaction open on the database: its write-ahead log has grown to 191 MiB.",
        ),
        (
            {"store": {"log_bytes": 0, "log_pinned": False, "replaced": True}, "started_at": NOW - 7200},
            "store_replaced",
            "The database was damaged and was replaced by an empty one 2 h ago.",
        ),
    ],
)
def test_what_agents_meet_is_said(fields: dict[str, Any], code: str, text: str) -> None:
    found = summarise(status(**fields))
    assert (found["code"], found["text"]) == (code, text)
    assert (code in PROBLEMS) is bool(found["problems"])


def test_a_registration_that_is_under_way_is_no_problem_yet() -> None:
    assert summarise(status(controller=controller(troubles=[trouble("unknown", since_s=3)])))["level"] == "good"


def fallback(status_code: int | None, *, failed: int = 2, calls: int = 5, used: bool = True) -> dict[str, Any]:
    kind = {"calls": failed, "status": status_code, "route": "heartbeat", "reason": None}
    call = {"at": NOW - 70, "operation": "heartbeat", "status": status_code, "reason": None}
    return {
        "used": used,
        "calls": calls,
        "failed": failed,
        "failures": [kind] if failed else [],
        "failing_since": NOW - 300,
        "last": call,
        "last_failure": call,
    }


@pytest.mark.parametrize("mode", ["http", "auto", "websocket"])
def test_a_way_back_that_fails_is_never_shown_as_well(mode: str) -> None:
    found = summarise(status(mode=mode, fallback="https://old.test", fallback_calls=fallback(401)))
    assert found["level"] == "bad"
    assert "did not serve 2 of 5 calls in the last minute: 401 heartbeat (2 times)" in found["text"]
    assert "fallback.use_upstream_token" in found["problems"][0]["hint"]
    found = summarise(status(mode=mode, fallback="https://old.test", fallback_calls=fallback(None, failed=0, calls=0)))
    assert found["code"] == "fallback_failed"
    assert "the last call, 1 min ago: no answer heartbeat" in found["text"]
    assert "doctor" in found["problems"][0]["hint"]
    old = summarise(status(mode=mode, fallback="https://old.test", fallback_calls=fallback(401, used=False)))
    assert old["level"] == "good"


def test_agents_by_http_are_counted_and_never_silent() -> None:
    sessions = {
        "total": 3,
        "fresh": 1,
        "silent": 0,
        "by_http": {"mode": 0, "rollout": 2, "link_down": 0},
        "not_polling": 0,
        "items": [],
    }
    found = summarise(with_sessions(status(), sessions))
    assert found["text"] == (
        "All is well: the controller is connected, 1 agent alive, 2 agents by HTTP (outside the rollout)."
    )
    idle = summarise(with_sessions(status(links=[link("idle")]), {**sessions, "fresh": 0}))
    assert (idle["level"], "2 agents by HTTP" in idle["text"]) == ("good", True)


def test_after_a_start_agents_have_a_minute_to_call_again() -> None:
    assert summarise(status(sessions=[session("a", fresh=False)], started_at=NOW - 30))["code"] != "agents_silent"


def test_agents_of_before_that_have_not_called_yet_are_not_alive() -> None:
    found = summarise(status(sessions=[session("a", fresh=False)], started_at=NOW - 30))
    assert (found["code"], found["level"]) == ("no_agent_alive", "waiting")
    assert found["text"] == "No known agent is alive; the link to the controller is up."


def test_agents_that_need_the_shim_no_more_are_named_beside_whatever_else_is_said() -> None:
    migrated = {"total": 1, "items": [{"name": "prod", "agent_id": "pod-1", "cluster_id": "c-1"}]}
    text = "1 agent connected by WebSocket, independent of the shim: prod."
    alone = summarise(status(sessions=[], websocket_agents=migrated))
    assert (alone["code"], alone["text"], alone["notes"]) == ("needs_no_shim", text, [])
    beside = summarise(status(websocket_agents=migrated))
    assert (beside["code"], [note["text"] for note in beside["notes"]]) == ("all_well", [text])


def objective(name: str, target: float, good: int, samples: int) -> dict[str, Any]:
    measured = good / samples
    hour = {"state": "met" if measured > target else "missed", "measured": measured, "good": good, "samples": samples}
    return {"name": name, "target": target, "windows": {"1h": hour, "24h": hour}}


def test_an_objective_missed_in_the_past_hour_is_named_below_a_headline_about_the_present() -> None:
    found = summarise(
        status(
            objectives=[
                objective("connection_success", 0.99, 10, 10),
                objective("reconnection", 0.95, 1, 2),
                objective("heartbeat_success", 0.999, 99_899, 100_000),
            ]
        )
    )
    assert (found["level"], found["code"], found["problems"]) == ("good", "all_well", [])
    (note,) = found["notes"]
    assert note["text"] == (
        "Missed in the past hour: reconnection 50 % instead of more than 95 %,"
        " heartbeat success 99.89 % instead of more than 99.9 %."
    )


def test_a_missed_objective_is_never_the_headline_of_a_shim_without_agents() -> None:
    found = summarise(status(sessions=[], objectives=[objective("connection_success", 0.99, 1, 2)]))
    assert (found["code"], [note["code"] for note in found["notes"]]) == ("nobody_called", ["objectives_missed"])


@pytest.mark.parametrize(
    "detail, hint",
    [("the proxy answered HTTP 407", "user:password@host:port"), ("the proxy answered HTTP 403", "agent-shim doctor")],
)
def test_a_proxy_that_wants_credentials_is_told_from_one_that_lets_nobody_through(detail: str, hint: str) -> None:
    (problem,) = summarise(status(links=[link("down", 60, "proxy") | {"detail": detail}]))["problems"]
    assert (problem["code"], detail in problem["text"]) == ("link_down", True)
    assert hint in problem["hint"]


@pytest.mark.parametrize(
    "own_tokens, reason, hint",
    [
        (False, "the controller refuses the token", "Check upstream.token or the file that upstream.token_file names."),
        (True, "the controller refuses the token", "An agent's own token: check the agent's."),
        (False, "the token is wrong", "Check the agent's token; with listen.auth it must be the shim's own."),
    ],
)
def test_calls_refused_for_a_token_name_the_token_that_is_meant(own_tokens: bool, reason: str, hint: str) -> None:
    calls = refused((3, 401, "POST /clusters/{agent_id}/heartbeat", reason))
    (problem,) = summarise(status(own_tokens=own_tokens, refused=calls))["problems"]
    assert (problem["code"], problem["hint"]) == ("calls_refused", hint)
