"""Options of a development controller besides its tokens, as plain data."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


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
