"""Settings, ports and state that all parts of the bridge share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from shim.bridge.events import EventQueue
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
"""Upper bound on the bytes that an upstream envelope adds to its payload."""


class TokenSource(Protocol):
    """Reader of the configured upstream token; raises `ShimError` if the token cannot be read."""

    def __call__(self) -> str: ...


@dataclass(slots=True)
class BridgeContext:
    """Settings, ports and shared state of the bridge.

    `settings` is replaced on a reload; `rng` yields floats in [0, 1). `fallback` records the results of calls to the
    vendor's HTTP API, `refused_calls` the refused calls of agents. `events` is set by the bridge.
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
    events: EventQueue = field(init=False)

    def masked(self, text: str, *secrets: str) -> str:
        """Return a text from the controller with every known secret masked, for agents, logs and the status page.

        `secrets` are those that only the caller knows. Mask a text before shortening it: half a secret is not
        recognised.
        """
        return without_secrets(self.redaction.text(text), *secrets)

    @property
    def now(self) -> float:
        """The current monotonic time in seconds."""
        return self.clock.monotonic_s()

    @property
    def queue_policy(self) -> QueuePolicy:
        """The configured bounds of a queue and of a poll reply."""
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
        """The configured delays between dials."""
        reconnect = self.settings.upstream.reconnect
        return BackoffPolicy(reconnect.initial_s, reconnect.max_s, reconnect.refused_max_s)
