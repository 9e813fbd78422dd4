"""What stands where in JetStream: streams, buckets, subjects. Pure; the figures of `docs/scaling.md` come from here.

A *row* is what the store keeps one by one: a command, the state it is in, a session. Owners, sessions and ids come from
agents and controllers and may hold anything, so that subjects name them by hashes; a row's content names them in full.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

PREFIX = "agent-shim"
PARTITIONS = 256
DUPLICATE_WINDOW_S = 120.0


class Kind(Enum):
    """What a row is; the value stands in subjects and in the journal."""

    COMMAND = "w"
    STATE = "c"
    RESULT = "r"
    UNKNOWN_RESULT = "u"
    LONE_TRACE = "l"
    QUARANTINE = "q"
    OUTBOX = "o"
    SESSION = "s"
    ALIAS = "a"
    TUNNEL = "t"
    META = "m"


class RowKey(NamedTuple):
    """Names a row. `first` and `second` are texts by kind: see `images.KEYS`; `second` may be empty."""

    kind: Kind
    first: str
    second: str


_OF_COMMANDS = frozenset({Kind.STATE, Kind.RESULT, Kind.UNKNOWN_RESULT, Kind.LONE_TRACE, Kind.QUARANTINE})


def token(text: str) -> str:
    """A subject token for any text: 128 bits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def partition(owner: str) -> int:
    """The link partition of an owner, below `PARTITIONS`."""
    return int(token(owner)[:8], 16) % PARTITIONS


@dataclass(frozen=True, slots=True)
class Layout:
    """Names under a prefix; two prefixes on one account are two stores."""

    prefix: str = PREFIX

    @classmethod
    def of_shard(cls, shard: str) -> Layout:
        """The names of one of several stores; `""` is the only one."""
        return cls(f"{PREFIX}-{shard}" if shard else PREFIX)

    @property
    def journal(self) -> str:
        return f"{self.prefix}-journal"

    @property
    def journal_subject(self) -> str:
        return f"{self.prefix}.journal"

    @property
    def commands(self) -> str:
        return f"{self.prefix}-commands"

    @property
    def outbox(self) -> str:
        return f"{self.prefix}-outbox"

    @property
    def states(self) -> str:
        return f"KV_{self.prefix}-states"

    @property
    def sessions(self) -> str:
        return f"KV_{self.prefix}-sessions"

    @property
    def rows(self) -> tuple[str, ...]:
        """The streams that hold rows."""
        return (self.commands, self.states, self.outbox, self.sessions)

    def stream(self, key: RowKey) -> str:
        if key.kind is Kind.COMMAND:
            return self.commands
        if key.kind is Kind.OUTBOX:
            return self.outbox
        return self.states if key.kind in _OF_COMMANDS else self.sessions

    def subject(self, key: RowKey) -> str:
        """Where the one message of this row stands."""
        owner = key.first.partition("/")[0]
        if key.kind is Kind.COMMAND:
            return f"{self.prefix}.cmd.{partition(owner)}.{token(key.first)}.{token(key.second)}"
        if key.kind is Kind.OUTBOX:
            return f"{self.prefix}.out.{partition(owner)}.{token(key.first)}.{token(key.second)}"
        bucket = self.stream(key).removeprefix("KV_")
        return f"$KV.{bucket}.{key.kind.value}.{token(key.first)}.{token(key.second)}"

    def marker(self, stream: str) -> str:
        """Where in a stream of rows every opening writes before it reads: what was acknowledged is then there."""
        if stream in (self.states, self.sessions):
            return f"$KV.{stream.removeprefix('KV_')}.opened"
        return f"{self.prefix}.{'cmd' if stream == self.commands else 'out'}.opened"

    def configurations(self, replicas: int) -> tuple[dict[str, Any], ...]:
        """The streams as `nats.js.api.StreamConfig` takes them."""
        common = {
            "storage": "file",
            "discard": "new",
            "num_replicas": replicas,
            "duplicate_window": DUPLICATE_WINDOW_S,
        }
        row = {"max_msgs_per_subject": 1, "discard": "old", "allow_direct": True}
        bucket = row | {"allow_rollup_hdrs": True}
        return (
            common | {"name": self.journal, "subjects": [self.journal_subject]},
            common | row | {"name": self.commands, "subjects": [f"{self.prefix}.cmd.>"], "retention": "workqueue"},
            common | row | {"name": self.outbox, "subjects": [f"{self.prefix}.out.>"]},
            *(
                common | bucket | {"name": name, "subjects": [f"$KV.{name.removeprefix('KV_')}.>"]}
                for name in (self.states, self.sessions)
            ),
        )
