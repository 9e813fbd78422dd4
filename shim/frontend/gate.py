"""A gate before aiohttp's parser: requests that are answered at once never come to the queue behind it."""

from __future__ import annotations

from typing import Any, Protocol

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

_NOTHING = ((), False, b"")


class Answering(Protocol):
    """Whoever can answer at once."""

    def answered_at_once(self, request: RawRequestMessage, body: StreamReader) -> bool:
        """Answer a request that came alone; false if it takes the long way."""


class Gate:
    """An `HttpRequestParser` in front of another."""

    __slots__ = ("_answering", "_parser")

    def __init__(self, parser: Any, answering: Answering) -> None:
        self._parser = parser
        self._answering = answering

    def feed_data(self, data: bytes) -> Any:
        """Parse; returns what is left to be served."""
        found = self._parser.feed_data(data)
        messages, upgraded, _ = found
        if len(messages) == 1 and not upgraded and self._answering.answered_at_once(*messages[0]):
            self._parser.message_consumed()
            return _NOTHING
        return found

    def message_consumed(self) -> None:
        """A request was taken from the queue."""
        self._parser.message_consumed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)
