"""Notifications: the changes of the status that an operator must know go to a webhook, to a file, or to both.

docs/how-to/notifications.md lists the events. They follow the health summary, so that a notification says what the
status page says.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from shim import __version__
from shim.clock import Clock
from shim.config import loader
from shim.config.settings import Notify
from shim.errors import ConfigError
from shim.log import get
from shim.protocol.http import origin_of
from shim.redaction import Redaction
from shim.upstream import DialError, Dialler

CHECK_S = 5.0
ATTEMPTS = 8
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
MAX_WAITING = 100
MAX_NAMES = 10
ANSWER_S = 10.0
"""Seconds in which a webhook must answer."""
_MAY_PASS = frozenset({408, 425, 429})
"""Statuses below 500 after which the same request may succeed later."""

log = get(__name__)


class Condition(msgspec.Struct, frozen=True):
    """Something that is well or not. `bad` maps codes of the health summary to the event of their beginning.

    The event `well` follows when none of them is left. While one of `undecided` is there, nothing is concluded.
    """

    bad: Mapping[str, str]
    well: str = ""
    text: str = ""
    undecided: frozenset[str] = frozenset()


CONDITIONS = (
    Condition(
        {"token_refused": "token_refused", "link_down": "link_down"},
        "link_up",
        "The controller is connected again.",
        frozenset({"link_connecting"}),
    ),
    Condition(
        dict.fromkeys(
            (
                *("registration_refused", "registration_unanswered", "name_unknown", "agent_unknown"),
                *("not_registered", "heartbeats_refused"),
            ),
            "agent_unknown",
        ),
        "agent_known",
        "The controller knows all agents again.",
    ),
    Condition(
        dict.fromkeys(("fallback_failing", "fallback_failed"), "fallback_failing"),
        "fallback_recovered",
        "Calls by the vendor's HTTP API work again.",
    ),
    Condition({"drained": "drained"}),
    Condition({"removable": "removable"}),
)
REMOVABLE = {
    "code": "removable",
    "text": "The shim can be removed: no agent needs it, and nothing waits in it.",
    "hint": "docs/how-to/removal.md has the steps.",
}


class Changes:
    """The events between one status and the next. The first status counts as a change from all well."""

    def __init__(self) -> None:
        self._present: dict[int, str] = {}

    def of(self, status: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """Yield `event`, `text` and `hint` of each change since the call before, given `/status.json`."""
        problems = {problem["code"]: problem for problem in reversed(status["overall"]["problems"])}
        if status["migration"]["removable"]:
            problems["removable"] = REMOVABLE
        for number, condition in enumerate(CONDITIONS):
            code = next((code for code in condition.bad if code in problems), None)
            before = self._present.get(number)
            if code is not None:
                event = self._present[number] = condition.bad[code]
                if event != before:
                    yield {"event": event, "text": problems[code]["text"], "hint": problems[code]["hint"]}
            elif before is not None and condition.undecided.isdisjoint(problems):
                del self._present[number]
                if condition.well:
                    yield {"event": condition.well, "text": condition.text, "hint": ""}


class Notifier:
    """Sender of notifications, to each receiver one after the other. `run` ends with the shim and never raises.

    `status` returns the content of `/status.json`. At most `MAX_WAITING` events wait for a receiver; the oldest is
    dropped first.
    """

    def __init__(
        self,
        settings: Notify,
        status: Callable[[], Awaitable[Mapping[str, Any]]],
        clock: Clock,
        stopped: asyncio.Event,
        redaction: Redaction,
        check_s: float = CHECK_S,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self._check_s, self._first_retry_s = check_s, first_retry_s
        self._settings = settings
        self._status = status
        self._clock = clock
        self._stopped = stopped
        self._redaction = redaction
        self._changes = Changes()
        self._dialler = Dialler(settings.dialling, name="notify", read_timeout_s=ANSWER_S)
        sends = [self._write] if settings.file else []
        sends += [self._send] if settings.url or settings.url_file else []
        # A queue each: a webhook that does not answer for minutes must not keep an event out of the file.
        self._receivers = [(asyncio.Queue[bytes](MAX_WAITING), send) for send in sends]

    async def run(self) -> None:
        """Look for changes every `check_s` seconds and deliver them until the shim stops."""
        try:
            async with asyncio.TaskGroup() as tasks:
                senders = [tasks.create_task(self._deliver(queue, send)) for queue, send in self._receivers]
                while not await self._stops_within(self._check_s):
                    await self._guarded(self._look())
                for sender in senders:
                    sender.cancel()
        finally:
            await self._dialler.close()

    async def _guarded(self, step: Awaitable[None]) -> None:
        """Await a step and log its exception: a defect in a notification must not end the shim."""
        try:
            await step
        except Exception as error:
            log.exception("notification_failed", dedupe_key=repr(error), reason="a defect of the shim")

    async def _look(self) -> None:
        status = await self._status()
        for change in self._changes.of(status):
            log.info("notification", notification=change["event"])
            body = self._encode(change, status)
            for queue, _ in self._receivers:
                if queue.full():
                    queue.get_nowait()
                    log.warning("notification_dropped", reason=f"more than {MAX_WAITING} wait")
                queue.put_nowait(body)

    def _encode(self, change: dict[str, str], status: Mapping[str, Any]) -> bytes:
        agents = [session["name"] for session in status["sessions"]["items"] if session["name"]][:MAX_NAMES]
        at = datetime.fromtimestamp(self._clock.wall_s(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        where = ", ".join(agents) or socket.gethostname()
        said = {
            # Chat systems show the field `text` of a webhook.
            "text": f"agent-shim ({where}): {change['text']} {change['hint']}".strip(),
            "event": change["event"],
            "reason": change["text"],
            "hint": change["hint"],
            "at": at,
            "host": socket.gethostname(),
            "agents": agents,
            "version": __version__,
        }
        return msgspec.json.encode(self._redaction.value(said))

    async def _deliver(self, queue: asyncio.Queue[bytes], send: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            await self._guarded(send(await queue.get()))

    async def _write(self, body: bytes) -> None:
        try:
            await asyncio.to_thread(_append, self._settings.file, body + b"\n")
        except OSError as error:
            reason = error.strerror or str(error)
            log.warning("notification_failed", dedupe_key=f"file {reason}", file=self._settings.file, reason=reason)

    async def _send(self, body: bytes) -> None:
        """Send to the webhook, again after a failure that may pass: at most `ATTEMPTS` times within some minutes."""
        pause_s, reason = self._first_retry_s, ""
        for attempt in range(ATTEMPTS):
            if attempt and await self._stops_within(pause_s):
                return
            pause_s = min(pause_s * 2, MAX_RETRY_S) if attempt else pause_s
            reason, lasting = await self._post(body)
            if not reason:
                return
            if lasting:
                break
        log.warning("notification_failed", dedupe_key=f"url {reason}", reason=reason)

    async def _post(self, body: bytes) -> tuple[str, bool]:
        """Send to the webhook; return the reason of a failure (`""` for success) and True if a retry is useless."""
        try:
            url = self._settings.url or loader.read_secret(self._settings.url_file, "notify.url_file")
            self._redaction.add(url)  # its path is a secret with most chat systems
            within_s = self._settings.dialling.connect_timeout_s + ANSWER_S
            status = await self._dialler.post(url, {"Content-Type": "application/json"}, body, within_s)
        except ConfigError as error:
            return str(error), False
        except DialError as error:
            failure = error.failure
            return f"{failure.reason}: {failure.detail}" if failure.detail else failure.reason, False
        if 200 <= status < 300:
            return "", False
        return f"{origin_of(url)} answers {status}", status < 500 and status not in _MAY_PASS

    async def _stops_within(self, pause_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopped.wait()
        return self._stopped.is_set()


def _append(path: str, line: bytes) -> None:
    """Append a line to a regular file. Raises `OSError`, also for a pipe or a device, for which it does not wait."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is not a regular file")
        if os.write(handle, line) < len(line):
            # A part of a line would spoil the next one, too.
            os.ftruncate(handle, found.st_size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(handle)
