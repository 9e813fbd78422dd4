"""Bounds on what is under way at a time: requests of one agent, and bytes of all bodies together."""

from __future__ import annotations

from shim.errors import AgentError

RETRY_AFTER_S = 1


class InFlight:
    """Counts requests by agent. Its key is the agent's token, where that tells owners apart, and the id it calls by."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many agents have requests under way."""
        return len(self._counts)

    def enter(self, key: tuple[str, str]) -> None:
        """Count a request in. Raises `AgentError` 429 when its agent has enough under way."""
        count = self._counts.get(key, 0)
        if count >= self._limit:
            raise AgentError(429, "too many requests of this agent at a time", retry_after_s=RETRY_AFTER_S)
        self._counts[key] = count + 1

    def leave(self, key: tuple[str, str]) -> None:
        """Count it out."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]


class BodyBudget:
    """Bytes that the bodies being read may have in memory together: each may be large, but not all at a time."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Reserve so many more; false if there is no room, and nothing is reserved."""
        if self.used_bytes + size_bytes > self._limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """They are free again."""
        self.used_bytes -= size_bytes
