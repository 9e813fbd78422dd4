"""The sentence: the worst that is true, in words of what to do."""

from __future__ import annotations

from typing import Any

import pytest

from shim.admin.verdict import judge, reason_text
from shim.tools.status_view import replicas_line

NOW = 10_000.0


def link(
    phase: str = "up", since_s: float = 60, reason: str | None = None, *, contended: bool = False
) -> dict[str, Any]:
    return {"name": "default", "phase": phase, "since": NOW - since_s, "reason": reason, "contended": contended}


def session(name: str, *, fresh: bool = True, not_polling: bool = False) -> dict[str, Any]:
    return {"name": name, "id": f"c-{name}", "fresh": fresh, "queue": {"not_polling": not_polling}}


def status(**fields: Any) -> dict[str, Any]:
    links, sessions = fields.pop("links", [link()]), fields.pop("sessions", [session("prod")])
    fresh = sum(each["fresh"] for each in sessions)
    return {
        "now": NOW,
        "mode": "websocket",
        "by_http": False,
        "fallback": None,
        "listen": "127.0.0.1:7080",
        "own_tokens": False,
        "config_valid": True,
        "not_ready": [],
        "drain": {"state": "off", "commands": 0, "results": 0},
        "links": {"total": len(links), "online": sum(each["phase"] == "up" for each in links), "items": links},
        "sessions": {
            "total": len(sessions),
            "fresh": fresh,
            "silent": len(sessions) - fresh,
            "not_polling": sum(each["queue"]["not_polling"] for each in sessions),
            "items": sessions,
        },
        "commands": {"uncertain": 0},
        **fields,
    }


def sentence(**fields: Any) -> tuple[str, str]:
    found = judge(status(**fields))
    return found["level"], found["text"]


@pytest.mark.parametrize(
    "fields, level, text",
    [
        ({}, "good", "All is well: the controller is connected, 1 agent alive."),
        (
            {"sessions": []},
            "waiting",
            "Nobody has called yet: point the agent's PIPEOPS_API_URL at http://127.0.0.1:7080.",
        ),
        ({"links": [link("idle")]}, "waiting", "No agent is alive, so the link to the controller rests."),
        ({"links": [link("down", 3, "tcp")]}, "warning", "Connecting to the controller (it cannot be reached)."),
        (
            {"links": [link("down", 150, "status 502")]},
            "bad",
            "The controller has been away for 2 min: it answers 502. Agents are answered as usual.",
        ),
        (
            {"links": [link("down", 150, "dns")], "by_http": True, "mode": "auto"},
            "bad",
            "The controller has been away for 2 min: its name cannot be resolved. Calls go by the vendor's HTTP API.",
        ),
        ({"links": [link("refused", 9, "status 401")]}, "bad", "The controller refuses the token (status 401)."),
        (
            {"links": [link("up", contended=True)]},
            "bad",
            "Another process uses our identity: the controller keeps closing the connection.",
        ),
        (
            {
                "mode": "http",
                "by_http": True,
                "fallback": "https://old.vendor.test",
                "links": [link("down", 999, "tcp")],
            },
            "good",
            "All calls go by the vendor's HTTP API (https://old.vendor.test), as mode http says.",
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
    found = judge(
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
    told = judge(status(replicas=replicas(unowned=2)))
    assert told["level"] == "warning"
    assert told["text"] == "2 shards without an owner: links are down."


def test_a_replica_without_links_of_its_own_is_well() -> None:
    told = judge(status(replicas=replicas(), sessions=[], links=[]))
    assert told["level"] == "good"
    assert "owns no agent's link" in told["text"]


def test_the_command_tells_of_the_other_replicas() -> None:
    assert replicas_line(replicas(unowned=1)) == "4 of 8 shards here, 1 without an owner; others: b: 4"
    assert replicas_line(replicas() | {"replicas": []}).endswith("others: none")
