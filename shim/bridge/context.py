"""What the parts of the bridge share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from shim.config.settings import Settings
from shim.core.backoff import BackoffPolicy
from shim.core.command_queue import Arriving, QueuePolicy
from shim.core.fallback_record import FallbackRecord
from shim.core.recent_calls import RecentCalls
from shim.core.sessions import Sessions
from shim.metrics import Metrics
from shim.ports import Clock, CommandStore, Timers, UpstreamPort
from shim.redaction import Redaction, without_secrets

DEFAULT_OWNER = "default"
ENVELOPE_BYTES = 512
"""More than an upstream envelope adds to its payload."""


class TokenSource(Protocol):
    """Reads the configured upstream token afresh; raises `ShimError` when it cannot."""

    def __call__(self) -> str: ...


@dataclass(slots=True)
class BridgeContext:
    """The bridge's surroundings. `settings` is replaced on a reload; `rng` yields floats in [0, 1).

    `fallback` records how calls to the vendor's HTTP API end, `refused_calls` which of the agents' calls were refused.
    """

    settings: Settings
    clock: Clock
    timers: Timers
    rng: Callable[[], float]
    new_id: Callable[[], str]
    store: CommandStore
    upstream: UpstreamPort
    metrics: Metrics
    read_token: TokenSource
    sessions: Sessions
    owner_key: bytes = b""
    redaction: Redaction = field(default_factory=Redaction)
    arriving: Arriving = field(default_factory=Arriving)
    fallback: FallbackRecord = field(default_factory=FallbackRecord)
    refused_calls: RecentCalls = field(default_factory=RecentCalls)

    def masked(self, text: str, *secrets: str) -> str:
        """Return a text of the controller as agents, logs and the status page may have it: without any secret.

        `secrets` are those that only the caller knows. The text must be masked before it is cut.
        """
        return without_secrets(self.redaction.text(text), *secrets)

    @property
    def now(self) -> float:
        """Monotonic seconds."""
        return self.clock.monotonic_s()

    @property
    def queue_policy(self) -> QueuePolicy:
        """The bounds of a queue and of a reply as they are configured now."""
        commands, poll = self.settings.commands, self.settings.poll
        return QueuePolicy(
            max_queued=commands.max_queued,
            max_queued_bytes=commands.max_queued_bytes,
            max_batch=poll.max_batch,
            max_bytes=poll.max_bytes,
            max_attempts=commands.max_attempts,
            redeliver=commands.uncertain == "redeliver",
            at_most_once=frozenset(commands.at_most_once),
        )

    @property
    def backoff_policy(self) -> BackoffPolicy:
        """The delays between dials."""
        reconnect = self.settings.upstream.reconnect
        return BackoffPolicy(reconnect.initial_s, reconnect.max_s, reconnect.refused_max_s)
