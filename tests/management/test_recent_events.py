"""Events of the log on the status page: which are kept, and what of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import shim
from shim.clock import Clock
from shim.log import get
from shim.management.recent_events import FREQUENT, KEPT, MAX_DETAIL_CHARS, RecentEvents
from shim.redaction import Redaction

log = get("shim.test")


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Iterator[RecentEvents]:
    caplog.set_level("INFO", "shim")
    recorded = RecentEvents(Clock(), Redaction(["geheim-1234"]))
    recorded.start()
    yield recorded
    recorded.stop()


def test_the_newest_event_comes_first(events: RecentEvents) -> None:
    log.info("link_state", link="default", state="online", reason="")
    log.warning("link_lost", reason="closed", code=1006, detail=None)
    assert [(each["level"], each["event"], each["detail"]) for each in events] == [
        ("warning", "link_lost", "reason closed, code 1006"),
        ("info", "link_state", "link default, state online"),
    ]


def test_secrets_are_masked(events: RecentEvents) -> None:
    log.error("token_refused", token="abcdef", text="it was geheim-1234", url="wss://x/?token=t0k3n")
    (event,) = events
    assert event["detail"] == "token ***, text it was ***, url wss://x/?token=***"


def test_steps_of_commands_and_calls_are_left_out(events: RecentEvents) -> None:
    log.info("command_queued", command="k1")
    log.info("result_closed", command="k1")
    log.warning("call_refused", status=404)
    log.info("agent_first_call", session="agent-1")
    log.info("poll_pacing_detected", session="agent-1")
    log.debug("frame", size=1)
    assert list(events) == []


def test_what_is_left_out_is_an_event_of_the_shim() -> None:
    package = Path(shim.__file__).parent
    source = "".join(each.read_text(encoding="utf-8") for each in package.rglob("*.py"))
    logged = re.findall(r"\blog\.\w+\(\s*\"(\w+)\"", source)
    assert [name for name in FREQUENT if not any(event.startswith(name) for event in logged)] == []


def test_repeats_about_the_same_subject_are_one_event(events: RecentEvents) -> None:
    for _ in range(3):
        log.warning("dial_failed", dedupe_key="default", reason="tcp")
    assert len(list(events)) == 1


def test_they_are_bounded(events: RecentEvents) -> None:
    for number in range(3 * KEPT):
        log.info("session_registered", session=f"{number}" * 4000)
    assert len(list(events)) == KEPT
    assert max(len(each["detail"]) for each in events) <= MAX_DETAIL_CHARS


def test_what_json_cannot_carry_does_not_break_the_page(events: RecentEvents) -> None:
    class Broken:
        def __str__(self) -> str:
            raise ValueError("no text")

    log.info("session_registered", session="\ud83d")
    log.info("session_registered", session=Broken())
    (event,) = events
    assert msgspec.json.encode(event)
    assert event["detail"] == "session \\ud83d"


def test_nothing_is_recorded_after_the_stop(events: RecentEvents) -> None:
    events.stop()
    log.info("stopped")
    assert list(events) == []
