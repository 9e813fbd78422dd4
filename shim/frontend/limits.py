"""Bounds on what is under way at a time: requests of one agent, and bytes of all bodies together."""

from __future__ import annotations

from shim.errors import AgentError

RETRY_AFTER_S = 1


class InFlight:
    """Counts requests by agent: by its token, where agents bring tokens of their own, and the id that it calls by."""

    def __init__(self, limit: int, *, own_tokens: bool) -> None:
        self._limit = limit
        self._own_tokens = own_tokens
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many agents have requests under way."""
        return len(self._counts)

    def key(self, token: str, ident: str) -> tuple[str, str]:
        """Return the key of the agent that calls with this token by this id."""
        return (token if self._own_tokens else "", ident)

    def has_room(self, key: tuple[str, str]) -> bool:
        """Return true if one more request of this agent is within the limit."""
        return self._counts.get(key, 0) < self._limit

    def enter(self, key: tuple[str, str]) -> None:
        """Count a request in. Raises `AgentError` 429 when its agent has enough under way."""
        if not self.has_room(key):
            raise AgentError(429, "too many requests of this agent at a time", retry_after_s=RETRY_AFTER_S)
        self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, key: tuple[str, str]) -> None:
        """Count it out."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]
