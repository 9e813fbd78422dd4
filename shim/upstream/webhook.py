"""The operator's webhook: one POST, and what became of it."""

from __future__ import annotations

import asyncio

import aiohttp

from shim.config import loader
from shim.config.settings import Notify
from shim.errors import ConfigError
from shim.protocol.http import origin_of
from shim.redaction import Redaction
from shim.upstream.dial_errors import DialError, failure_of
from shim.upstream.dialler import Dialler

ANSWER_S = 10.0
_MAY_PASS = frozenset({408, 425, 429})
"""Statuses below 500 after which the same request may succeed later."""


class Webhook:
    """Client of the webhook. `redaction` learns the URL, whose path is a secret with most chat systems."""

    def __init__(self, settings: Notify, redaction: Redaction) -> None:
        self._settings = settings
        self._redaction = redaction
        self._dialler = Dialler(settings.dialling, name="notify", read_timeout_s=ANSWER_S)

    async def post(self, body: bytes) -> tuple[str, bool]:
        """Send a JSON body; return the reason of a failure (`""` for success) and True if a retry is useless."""
        try:
            url = self._settings.url or loader.read_secret(self._settings.url_file, "notify.url_file")
            self._redaction.add(url)
            async with asyncio.timeout(self._settings.dialling.connect_timeout_s + ANSWER_S):
                response = await self._dialler.request("POST", url, {"Content-Type": "application/json"}, body)
                async with response:
                    status = response.status
        except ConfigError as error:
            return str(error), False
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, DialError) as error:
            failure = failure_of(error)
            return f"{failure.reason}: {failure.detail}" if failure.detail else failure.reason, False
        if 200 <= status < 300:
            return "", False
        return f"{origin_of(url)} answers {status}", status < 500 and status not in _MAY_PASS

    async def close(self) -> None:
        """Close all connections."""
        await self._dialler.close()
