"""Tables of a store for `store.copy`: columns and their types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shim.core.shard_assignment import shard_of

_KINDS: dict[str, tuple[type, ...]] = {
    "t": (str,),
    "i": (int,),
    "f": (float, int),
    "b": (bytes,),
    "n": (bytes, type(None)),
    "o": (bool, int),
}


@dataclass(frozen=True)
class Table:
    """A table and its columns, each as `name:kind`. The first `key` columns define the order of rows."""

    name: str
    columns: str
    key: int = 1

    @property
    def names(self) -> list[str]:
        return [each.partition(":")[0] for each in self.columns.split()]

    @property
    def select(self) -> str:
        order = ", ".join(self.names[: self.key])
        return f"SELECT {', '.join(self.names)} FROM {self.name} ORDER BY {order}"  # noqa: S608 - constants

    def fits(self, row: Sequence[Any]) -> bool:
        """Return whether every column has its type, which SQLite does not enforce."""
        kinds = (each.partition(":")[2] for each in self.columns.split())
        return all(isinstance(value, _KINDS[kind]) for value, kind in zip(row, kinds, strict=True))


TABLES = (
    Table("sessions", "id:i session:t dialect:t agent_id:t upstream_cluster_id:t last_seen:f superseded_by:t"
          " registration:b reply:b hold:b"),
    Table("aliases", "id:i owner:t agent_id:t session:t"),
    Table("tunnels", "id:i session:t payload:b"),
    Table("commands", "seq:i session:t id:t request_id:t state:t attempts:i updated:f arrived:f expires:f size_bytes:i"
          " type:t created_at:t payload:b via:t first_step:t result:n"),
    Table("outbox", "seq:i owner:t session:t command_id:t request_id:t payload:b"),
    Table("unknown_results", "session:t command_id:t wall:f", key=2),
    Table("traces", "id:i command:i wall:f event:t detail:t"),
    Table("lone_traces", "id:i session:t command_id:t wall:f event:t detail:t"),
    Table("quarantine", "id:i origin:t session:t command_id:t request_id:t reason:t content:b pending:o"),
)  # fmt: skip


def shard_of_session(session: str, shards: int) -> int:
    """Return the shard of a session column. Text that is not a session key belongs to shard 0."""
    return shard_of(session.partition("/")[0], shards)
