"""Client of the development controller's control API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

_SLACK_S = 5


class ControlError(Exception):
    """The control API refused a request or cannot be reached; the text names the reason."""


class ControlClient:
    """Client with JSON requests and responses. Every method raises `ControlError`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")

    async def push(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Push one command; return its id and the time of sending (`sent_monotonic_s`, comparable on the same host)."""
        reply = await self._call("POST", "/control/commands", json=spec)
        command: dict[str, Any] = reply["commands"][0]
        return command

    async def events(self, after: int, wait_s: float, **filters: str) -> tuple[list[dict[str, Any]], int]:
        """Return events above number `after` that pass the filters (`type`, `kind`, `direction`), and the next `after`.

        Waits up to `wait_s` for the first event.
        """
        query = {"after": str(after), "wait_s": str(wait_s)} | filters
        reply = await self._call("GET", "/control/messages", wait_s, params=query)
        return reply["messages"], reply["next"]

    async def _call(self, method: str, path: str, wait_s: float = 0, **rest: Any) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=wait_s + _SLACK_S)
        try:
            async with self._session.request(method, self._url + path, timeout=timeout, **rest) as response:
                reply = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ControlError(f"the controller's control API does not answer: {type(error).__name__}") from error
        except ValueError as error:
            raise ControlError("what answers at the control URL is no control API") from error
        if not isinstance(reply, dict) or not reply.get("success"):
            raise ControlError(f"the control API refused: {response.status} {_reason(reply)}")
        shown: dict[str, Any] = reply
        return shown


def _reason(reply: Any) -> str:
    return str(reply.get("error", "")) if isinstance(reply, dict) else ""


@asynccontextmanager
async def control_client(url: str, token: str = "") -> AsyncIterator[ControlClient]:
    """Open a client of the control API at this URL, with the control API's own token if one is given."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        yield ControlClient(session, url)
