"""Waiting for a state to become true on one event loop, without polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Condition:
    """A condition without a lock: whoever changes the state calls `wake`, whoever waits looks at it again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Let every waiter look at the state."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], bool], *, timeout_s: float | None = None) -> bool:
        """Return true when `ready()` holds, at once if it does already; false if it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    await self._event.wait()
        except TimeoutError:
            return False
        return True
