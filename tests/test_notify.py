"""Notifications: which changes of the status are events, and that a delivery is bounded, retried and never blocks."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shim import notify
from shim.clock import Clock
from shim.config.settings import Notify
from shim.management.health_summary import SENTENCES
from shim.notify import CONDITIONS, MAX_WAITING, Changes, Notifier
from shim.redaction import Redaction
from tests.support.recording_server import Recorded, RecordingServer, http
from tests.support.sockets import tcp_server

SECRET_PATH = "/services/T0000/B0000/hunter2-hunter2"


def status(*codes: str, removable: bool = False) -> dict[str, Any]:
    """A status with these problems."""
    problems = [{"code": code, "level": "bad", "text": f"Text of {code}.", "hint": "Do."} for code in codes]
    return {
        "overall": {"problems": problems},
        "migration": {"removable": removable},
        "sessions": {"items": [{"name": "prod-eu"}, {"name": None}]},
    }


def events(*each: dict[str, Any]) -> list[str]:
    changes = Changes()
    return [change["event"] for one in each for change in changes.of(one)]


@pytest.mark.parametrize(
    "seen, told",
    [
        ([status(), status()], []),
        ([status("link_down"), status("link_down"), status()], ["link_down", "link_up"]),
        ([status("link_connecting"), status()], []),
        ([status("link_down"), status("link_connecting"), status("link_down")], ["link_down"]),
        ([status("link_down"), status("link_connecting"), status()], ["link_down", "link_up"]),
        ([status("link_down"), status("token_refused"), status()], ["link_down", "token_refused", "link_up"]),
        (
            [status("agent_unknown"), status("name_unknown", "agent_unknown"), status()],
            ["agent_unknown", "agent_known"],
        ),
        ([status("heartbeats_refused"), status("registration_unanswered"), status()], ["agent_unknown", "agent_known"]),
        ([status("fallback_failing"), status("fallback_failed")], ["fallback_failing"]),
        ([status("fallback_failed"), status()], ["fallback_failing", "fallback_recovered"]),
        ([status("drained"), status("drained", removable=True), status()], ["drained", "removable"]),
        ([status("calls_refused", "store_unwritable")], []),
    ],
)
def test_each_change_is_told_once(seen: list[dict[str, Any]], told: list[str]) -> None:
    assert events(*seen) == told


def test_every_code_is_one_of_the_health_summary() -> None:
    codes = {code for condition in CONDITIONS for code in (*condition.bad, *condition.undecided)}
    assert codes - {"removable"} <= set(SENTENCES)


@asynccontextmanager
async def notifying(settings: Notify, *seen: dict[str, Any]) -> AsyncIterator[asyncio.Event]:
    """A notifier that sees these statuses, one at each look, and then the last one for ever."""
    stopped, left = asyncio.Event(), list(seen)

    async def look() -> dict[str, Any]:
        return left.pop(0) if len(left) > 1 else left[0]

    notifier = Notifier(settings, look, Clock(), stopped, Redaction(), check_s=0.01, first_retry_s=0.01)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(notifier.run())
        yield stopped
        stopped.set()


async def called(server: RecordingServer, count: int) -> list[Recorded]:
    """The calls, as soon as there are so many."""
    await server.until(lambda: len(server.calls) >= count)
    return server.calls


async def written(file: Path, count: int) -> None:
    """Wait until the file has so many lines, which it keeps."""
    async with asyncio.timeout(60):
        while _lines(file) < count:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


async def test_a_webhook_gets_text_event_and_agents() -> None:
    async with (
        RecordingServer(lambda call: http(200)) as server,
        notifying(Notify(url=server.url + SECRET_PATH), status("link_down")),
    ):
        (call,) = await called(server, 1)
    assert (call.method, call.path) == ("POST", SECRET_PATH)
    assert dict(map(tuple, call.headers))["Content-Type"] == "application/json"
    body = call.json
    assert body["text"] == "agent-shim (prod-eu): Text of link_down. Do."
    assert (body["event"], body["reason"], body["hint"], body["agents"]) == (
        "link_down",
        "Text of link_down.",
        "Do.",
        ["prod-eu"],
    )
    assert body["at"].endswith("Z")


@pytest.mark.parametrize("failure", [500, 503, 429, 408, None], ids=str)
async def test_a_failure_that_may_pass_is_tried_again(failure: int | None) -> None:
    answers = [None if failure is None else http(failure)] * 2
    async with (
        RecordingServer(lambda call: answers.pop() if answers else http(204)) as server,
        notifying(Notify(url=server.url), status("link_down")),
    ):
        calls = await called(server, 3)
    assert len({call.body for call in calls}) == 1


async def test_a_refusal_is_not_tried_again_and_the_next_event_follows(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        RecordingServer(lambda call: http(404)) as server,
        notifying(Notify(url=server.url + SECRET_PATH), status("link_down"), status()),
    ):
        calls = await called(server, 2)
    assert [call.json["event"] for call in calls] == ["link_down", "link_up"]
    assert "notification_failed" in caplog.text
    assert "hunter2" not in caplog.text


async def test_the_url_is_read_from_its_file_at_every_try(tmp_path: Path) -> None:
    file = tmp_path / "url"
    async with (
        RecordingServer(lambda call: http(200)) as server,
        notifying(Notify(url_file=str(file)), status("token_refused")),
    ):
        file.write_text(server.url + SECRET_PATH + "\n")
        (call,) = await called(server, 1)
    assert call.json["event"] == "token_refused"


async def test_a_webhook_that_never_answers_holds_nothing_up() -> None:
    seen = [status("link_down") if number % 2 else status() for number in range(3 * MAX_WAITING)]
    accepted = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(60), tcp_server(hold) as port, notifying(Notify(url=f"http://127.0.0.1:{port}"), *seen):
        await accepted.wait()


async def test_a_file_gets_one_line_for_each_event(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "earlier"}\n')
    async with RecordingServer(lambda call: http(200)) as server:
        settings = Notify(url=server.url, file=str(file))
        async with notifying(settings, status("link_down"), status(), status(removable=True)):
            await called(server, 3)
            await written(file, 4)
    lines = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert lines == ["earlier", "link_down", "link_up", "removable"]


async def test_a_webhook_that_never_answers_keeps_no_event_out_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    async with tcp_server(lambda reader, writer: reader.read()) as port:
        settings = Notify(url=f"http://127.0.0.1:{port}", file=str(file))
        async with notifying(settings, status("link_down"), status()):
            await written(file, 2)
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["link_down", "link_up"]


async def test_a_status_that_cannot_be_taken_is_logged_and_the_next_one_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "events.jsonl"
    async with notifying(Notify(file=str(file)), status("link_down"), {}, status()):
        await written(file, 2)
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["link_down", "link_up"]
    assert "a defect of the shim" in str([vars(record) for record in caplog.records])
    assert "notification_failed" in caplog.text


async def test_a_pipe_that_nobody_reads_and_a_missing_folder_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for count, name in enumerate(("pipe", "none/events"), 1):
        async with asyncio.timeout(60), notifying(Notify(file=str(tmp_path / name)), status("link_down")):
            while caplog.text.count("notification_failed") < count:  # noqa: ASYNC110 - a line of the log has no event
                await asyncio.sleep(0.01)
    assert (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "none").exists()


def test_a_line_that_does_not_fit_leaves_the_lines_before_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"x" * 90 + b"\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            notify._append(str(file), b"y" * 50 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"x" * 90 + b"\n"
