"""Wait on one event loop, without polling, until a state becomes true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Condition:
    """A condition without a lock: code that changes the state calls `wake`, and the waiters check it again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Let every waiter evaluate the state."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], bool], *, timeout_s: float | None = None) -> bool:
        """Return True as soon as `ready()` is true, at once if it already is; return False after the time limit."""
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    await self._event.wait()
        except TimeoutError:
            return False
        return True
