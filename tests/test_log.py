"""Lines that tools and people can read, and that show no secret whatever is logged."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from shim import log
from shim.redaction import Redaction


class Output(io.StringIO):
    """A stream that may claim to be a terminal."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self._tty = tty
        self.logs: log.Logs | None = None

    def isatty(self) -> bool:
        return self._tty

    def getvalue(self) -> str:
        """Everything that was logged so far."""
        assert self.logs is None or self.logs.flush()
        return super().getvalue()

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def out() -> Output:
    return Output()


@pytest.fixture
def json_logs(out: Output) -> Iterator[log.Logs]:
    made = out.logs = log.setup("info", "json", stream=out)
    yield made
    made.close()


@pytest.fixture
def console_logs(out: Output) -> Iterator[log.Logs]:
    made = out.logs = log.setup("info", "console", stream=out)
    yield made
    made.close()


def test_a_line_is_a_json_object_with_the_fields(json_logs: log.Logs, out: Output) -> None:
    log.get("shim.link").info("link_state", state="online", attempts=3, delay_s=0.5, up=True, reason=None)
    (entry,) = out.entries()
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "shim.link",
        "event": "link_state",
        "state": "online",
        "attempts": 3,
        "delay_s": 0.5,
        "up": True,
        "reason": None,
    }


def test_fields_never_replace_our_own_keys(json_logs: log.Logs, out: Output) -> None:
    log.get("shim.x").warning("seen", event="other", level=3, time=1)
    (entry,) = out.entries()
    assert (entry["event"], entry["event_"], entry["level"], entry["level_"]) == ("seen", "other", "warning", 3)


def test_odd_values_are_written_as_text(json_logs: log.Logs, out: Output) -> None:
    log.get("shim.x").error("odd", error=ValueError("no"), items={1, 2}, inf=float("inf"), deep={3: (b"x",)})
    (entry,) = out.entries()
    assert entry["error"] == "no"
    assert sorted(entry["items"]) == [1, 2]
    assert (entry["inf"], entry["deep"]) == ("inf", {"3": ["b'x'"]})


def test_a_line_break_in_a_value_makes_no_second_line(json_logs: log.Logs, out: Output) -> None:
    log.get("shim.x").info("forged", name='a\n{"level":"error"}')
    assert len(out.getvalue().splitlines()) == 1


def test_exceptions_carry_their_traceback(json_logs: log.Logs, out: Output) -> None:
    try:
        raise ValueError("sent with Bearer hunter2")
    except ValueError:
        log.get("shim.x").exception("failed", part="reader")
    (entry,) = out.entries()
    assert (entry["level"], entry["part"]) == ("error", "reader")
    assert "ValueError: sent with Bearer ***" in entry["exception"]


def test_the_level_changes_at_run_time(json_logs: log.Logs, out: Output) -> None:
    logger = log.get("shim.x")
    logger.debug("one")
    json_logs.set_level("debug")
    logger.debug("two")
    json_logs.set_level("error")
    logger.warning("three")
    assert [entry["event"] for entry in out.entries()] == ["two"]


def test_other_libraries_are_heard_from_warnings_upwards(json_logs: log.Logs, out: Output) -> None:
    json_logs.set_level("debug")
    other = logging.getLogger("aiohttp.server")
    other.info("access %s", "log")
    other.warning("careful with token=%s", "hunter2")
    assert [(entry["logger"], entry["event"]) for entry in out.entries()] == [
        ("aiohttp.server", "careful with token=***")
    ]


def test_closed_logs_write_nothing(json_logs: log.Logs, out: Output) -> None:
    json_logs.close()
    json_logs.close()
    log.get("shim.x").info("unheard")
    assert out.getvalue() == ""


def test_a_broken_stream_is_survived_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Output):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    made = log.setup("info", "json", stream=Broken())
    log.get("shim.x").info("lost", password="hunter2")
    made.close()
    assert capsys.readouterr().err == ""


def test_stderr_is_where_logs_go_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    made = log.setup("info", "json")
    log.get("shim.x").info("here")
    made.close()
    shown = capsys.readouterr()
    assert (json.loads(shown.err)["event"], shown.out) == ("here", "")


def test_known_secrets_are_masked_wherever_they_are(json_logs: log.Logs, out: Output) -> None:
    json_logs.redaction.add('hun"ter\\2')
    log.get("shim.x").info('at hun"ter\\2', a='x hun"ter\\2 y', b=[{'hun"ter\\2': ('hun"ter\\2',)}])
    assert "ter" not in out.getvalue()
    (entry,) = out.entries()
    assert (entry["event"], entry["a"], entry["b"]) == ("at ***", "x *** y", [{"***": ["***"]}])


@pytest.mark.parametrize(
    "text,masked",
    [
        ("wss://h/ws?token=abc.def-1&x=1", "wss://h/ws?token=***&x=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("'bearer   abc', more", "'bearer   ***', more"),
        ("access_token=abc", "access_token=***"),
        ("client_secret=abc;PASSWORD=def", "client_secret=***;PASSWORD=***"),
        ("the token is refused", "the token is refused"),
    ],
)
def test_what_usually_carries_a_secret_is_masked(text: str, masked: str) -> None:
    assert Redaction().text(text) == masked


@pytest.mark.parametrize("name", ["token", "k8s_service_token", "Authorization", "proxy_password", "client_secret"])
def test_fields_named_like_secrets_are_masked(name: str) -> None:
    assert Redaction().value({name: "abc", "n": {name: ["abc"]}}) == {name: "***", "n": {name: "***"}}


def test_secrets_come_and_go() -> None:
    redaction = Redaction(["first", "first-and-more"])
    assert redaction.text("first-and-more first") == "*** ***"
    redaction.discard("first")
    redaction.discard("unknown")
    assert redaction.text("first-and-more first") == "*** first"
    redaction.discard("first-and-more")
    assert redaction.text("first-and-more") == "first-and-more"


def test_a_secret_too_short_to_mask_garbles_nothing() -> None:
    assert Redaction(["", "abc"]).text("abc") == "abc"


def test_console_lines_are_readable(console_logs: log.Logs, out: Output) -> None:
    log.get("shim.x").warning("link_lost", link="default", detail="timed out", failures=2, ids=["a"])
    time, rest = out.getvalue().split(" ", 1)
    assert len(time) == len("21:56:41.123")
    assert rest == 'WARNING link_lost link=default detail="timed out" failures=2 ids=["a"]\n'


def test_console_lines_cannot_be_forged(console_logs: log.Logs, out: Output) -> None:
    log.get("shim.x").info("a\x1b[2J", name="x\n21:00 ERROR forged \x1b[31m")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_console_tracebacks_stand_on_their_own_lines(console_logs: log.Logs, out: Output) -> None:
    try:
        raise ValueError("a\x1b")
    except ValueError:
        log.get("shim.x").exception("failed")
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("ERROR   failed")
    assert lines[-1] == "    ValueError: a\\u001b"


def test_colour_is_for_terminals() -> None:
    out = Output(tty=True)
    made = log.setup("info", "console", stream=out)
    log.get("shim.x").error("red")
    made.close()
    assert "\x1b[31mERROR  \x1b[0m red" in out.getvalue()


def said(event: str, about: str | None, at: float, **fields: Any) -> None:
    """One record of the shim's at a moment."""
    values = {"name": "shim.x", "msg": "%s", "args": (event,), "levelno": logging.WARNING, "levelname": "WARNING"}
    record = logging.makeLogRecord({**values, "created": at, "dedupe_key": about, "fields": fields})
    logging.getLogger("shim.x").handle(record)


def test_repeats_are_left_out_for_a_minute_and_counted(json_logs: log.Logs, out: Output) -> None:
    for second in range(0, 180, 2):
        said("dial_failed", "default tcp", 1000 + second, reason="tcp")
    lines = out.entries()
    assert [line.get("repeats") for line in lines] == [None, 29, 29]
    assert {line["reason"] for line in lines} == {"tcp"}


def test_what_is_about_something_else_is_no_repeat(json_logs: log.Logs, out: Output) -> None:
    said("dial_failed", "default tcp", 1000)
    said("dial_failed", "default dns", 1001)
    said("link_lost", "default tcp", 1002)
    said("command_queued", None, 1003)
    said("command_queued", None, 1003)
    said("dial_failed", "default tcp", 900)  # the clock was set back
    assert len(out.entries()) == 6


def test_the_memory_for_repeats_is_bounded(json_logs: log.Logs, out: Output) -> None:
    for number in range(3000):
        said("upstream_error", f"text {number}", 1000)
    said("upstream_error", "text 0", 1001)  # forgotten, and so written again
    said("upstream_error", "text 2999", 1001)
    assert len(out.entries()) == 3001


def test_repeats_are_those_of_one_setup(out: Output) -> None:
    for _ in range(2):
        made = log.setup("info", "json", stream=out)
        log.get("shim.x").warning("dial_failed", dedupe_key="default tcp")
        log.get("shim.x").warning("dial_failed", dedupe_key="default tcp")
        made.close()
    assert len(out.entries()) == 2


@pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\x9b", "\x7f", "\ufeff", "\ud800"])
@pytest.mark.parametrize("form", ["json", "console"])
def test_characters_that_steer_a_viewer_are_escaped(form: Any, char: str) -> None:
    out = Output()
    out.logs = log.setup("info", form, stream=out)
    log.get("shim.x").info(f"a{char}b", name=f"é{char}ü", nested={f"k{char}": [char]})
    text = out.getvalue()
    out.logs.close()
    assert text.removesuffix("\n").isprintable()
    if form == "json":
        (entry,) = out.entries()
        assert (entry["event"], entry["name"], entry["nested"]) == (f"a{char}b", f"é{char}ü", {f"k{char}": [char]})


def test_a_long_text_is_masked_and_then_cut(json_logs: log.Logs, out: Output) -> None:
    json_logs.redaction.add("hunter2-hunter2")
    log.get("shim.x").info("e" * 10_000, text="x" * 4090 + "hunter2-hunter2")
    (entry,) = out.entries()
    assert len(entry["event"]) == 4096
    assert entry["text"] == "x" * 4090 + "***"
    assert "hunter" not in out.getvalue()


def test_a_record_that_cannot_be_formatted_is_dropped_and_counted(json_logs: log.Logs, out: Output) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError

    log.get("shim.x").info("odd", value=Odd())
    log.get("shim.x").info("next")
    assert [entry["event"] for entry in out.entries()] == ["next", "log_lines_dropped"]
    assert json_logs.dropped == 1


STRAY = """
import threading, warnings
from shim import log as logs
made = logs.setup("info", "json")
made.redaction.add("hunter2")
logs.capture_stray_output()
warnings.warn("about hunter2")
class Odd:
    def __del__(self): raise ValueError("hunter2")
Odd()
def fail(): raise ValueError("hunter2")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
made.close()
"""


def test_what_python_prints_itself_is_logged_and_masked() -> None:
    done = subprocess.run([sys.executable, "-c", STRAY], capture_output=True, text=True, timeout=120, check=True)
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert [entry["level"] for entry in entries] == ["warning", "error", "error"]
    assert "about ***" in entries[0]["event"]
    assert [entry["event"] for entry in entries[1:]] == ["error_ignored_by_python", "error_in_thread"]
    assert all(entry["exception"].endswith("ValueError: ***") for entry in entries[1:])
