"""State shared by all parts of one controller: its options, the accepted tokens, and what it records."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from devtools.controller.active_faults import ActiveFaults
from devtools.controller.commands import CommandLog
from devtools.controller.history import History
from devtools.controller.registry import Registry
from shim.clock import Clock


class Tokens:
    """The accepted tokens. An owner is a digest of a token: it may be shown and stored, a token may not."""

    def __init__(self, tokens: Sequence[str], prefixes: Sequence[str] = ()) -> None:
        self._tokens = [token.encode() for token in tokens if token]
        self._prefixes = tuple(prefix for prefix in prefixes if prefix)

    def owner_of(self, token: str) -> str | None:
        """Return the owner of a token, or `None` if the token is not accepted."""
        sent = token.encode(errors="surrogatepass")
        known = [hmac.compare_digest(sent, accepted) for accepted in self._tokens]
        if any(known) or (self._prefixes and token.startswith(self._prefixes)):
            return hashlib.sha256(sent).hexdigest()[:12]
        return None


def bearer(header: str) -> str:
    """Return the token of an `Authorization` header, or the empty string if it is no Bearer header."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class TokenPlace(Enum):
    """Place of the token in the handshake of the controller's endpoint."""

    EITHER = "either"
    QUERY = "query"
    HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options; the defaults are the vendor's documented behaviour, `_s` are seconds.

    Their source is docs/reference/legacy-agents.md#34-timers-and-reconnect.
    `token_prefixes`: any token that begins with one of them is accepted and is an owner of its own.
    `strict_clusters`: heartbeats and results for a cluster that is not registered get an `error`; else they are
    accepted.
    `decoy_token`: `register_success` carries an invalid `token`, to detect shims that pass it to agents.
    `control`: host and port of the control API, `None` for the listener of the WebSocket API.
    `base_path` precedes the paths of the WebSocket API. `journal` is the file of `HistoryFile`, `state` that of
    `Registry`.
    """

    host: str = "127.0.0.1"
    base_path: str = ""
    token_prefixes: tuple[str, ...] = field(default=(), repr=False)
    token_place: TokenPlace = TokenPlace.EITHER
    control: tuple[str, int] | None = None
    control_token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    ping_interval_s: float = 30
    silent_after_s: float = 60
    close_timeout_s: float = 2
    strict_clusters: bool = True
    binary_frames: bool = False
    decoy_token: bool = False
    max_message_bytes: int = 33_554_432
    history_events: int = 20_000
    history_bytes: int = 67_108_864
    journal: Path | None = None
    state: Path | None = None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """State of a controller, apart from its connections."""

    clock: Clock
    options: Options
    history: History
    faults: ActiveFaults
    registry: Registry
    commands: CommandLog
