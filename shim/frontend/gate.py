"""A gate before aiohttp's parser: requests that are answered at once never come to the queue behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

_NOTHING = ((), False, b"")


class Gate:
    """An `HttpRequestParser` in front of another. `answered` is asked about each request that comes alone."""

    __slots__ = ("_answered", "_parser", "message_consumed")

    def __init__(self, parser: Any, answered: Callable[[RawRequestMessage, StreamReader], bool]) -> None:
        self._parser = parser
        self._answered = answered
        self.message_consumed: Callable[[], None] = parser.message_consumed

    def feed_data(self, data: bytes) -> Any:
        """Parse; returns what is left to be served."""
        found = self._parser.feed_data(data)
        messages, upgraded, _ = found
        if len(messages) == 1 and not upgraded and self._answered(*messages[0]):
            self.message_consumed()
            return _NOTHING
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)
