"""Registered clusters and the latest activity of each, independent of connections."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from devtools.controller.history import append_lines
from shim.clock import Clock
from shim.protocol.rfc3339 import rfc3339

_NAMESPACE = uuid.UUID("3f1c6d0e-7b52-4a0e-9a53-1f0f6a3f5c11")


class Registration(msgspec.Struct, frozen=True):
    """A registered cluster. `generation` counts the ids assigned to its (owner, name)."""

    owner: str
    name: str
    cluster_id: str
    cluster_uuid: str
    agent_id: str
    workspace_id: int
    registered_at: str
    generation: int = 0


@dataclass(slots=True)
class Presence:
    """Activity of a cluster in this run. `connection` is the latest that used its id, 0 for none."""

    connection: int = 0
    registers: int = 0
    heartbeats: int = 0
    last_heartbeat: dict[str, Any] = field(default_factory=dict)


class Registry:
    """Registrations with stable cluster ids: derived from (owner, name), they survive a restart without a file.

    With a state file, one JSON object a line is appended for each change, and registrations survive as well.
    """

    def __init__(self, clock: Clock, state: Path | None = None) -> None:
        self._clock = clock
        self._clusters: dict[str, Registration] = {}
        self._presences: dict[str, Presence] = {}
        self._generations: Counter[tuple[str, str]] = Counter()
        self._state = append_lines(state) if state else None
        if state:
            for line in state.read_bytes().splitlines():
                self._load(line)

    def _load(self, line: bytes) -> None:
        try:
            change = msgspec.json.decode(line)
            if isinstance(change, dict) and "forget" in change:
                self._clusters.pop(change["forget"], None)
                return
            known = msgspec.convert(change, Registration)
        except msgspec.MsgspecError:  # the incomplete last line of a run that was killed
            return
        self._clusters[known.cluster_id] = known
        self._generations[known.owner, known.name] = known.generation

    def _save(self, change: Registration | dict[str, str]) -> None:
        if self._state:
            self._state.write(msgspec.json.encode(change) + b"\n")

    def register(self, owner: str, payload: dict[str, Any], *, new_id: bool = False) -> tuple[Registration, bool]:
        """Register a cluster; return it, and True if it was registered before.

        A `cluster_id` that is sent is assigned again, even if another agent had it; otherwise that of (owner, name).
        `new_id` assigns an id that was never used.
        """
        name, agent_id, sent_id = payload["name"], payload["agent_id"], payload.get("cluster_id")
        if new_id:
            self._generations[owner, name] += 1
        generation = self._generations[owner, name]
        unique = uuid.uuid5(_NAMESPACE, f"{owner}/{generation}/{name}")
        own_id = f"cl-{unique.hex[:16]}"
        cluster_id = sent_id if sent_id and not new_id else own_id
        before = self._clusters.get(cluster_id)
        known = Registration(
            owner=owner,
            name=name,
            cluster_id=cluster_id,
            cluster_uuid=before.cluster_uuid if before else str(unique),
            agent_id=agent_id,
            workspace_id=1000 + int(owner[:6], 16) % 9000,
            registered_at=before.registered_at if before else rfc3339(self._clock.wall_s()),
            generation=generation,
        )
        if known != before:
            self._clusters.pop(cluster_id, None)  # the latest registration of an agent comes last
            self._clusters[cluster_id] = known
            self._save(known)
        self.presence(cluster_id).registers += 1
        return known, before is not None

    def get(self, cluster_id: str) -> Registration | None:
        """Return the registration with this cluster id."""
        return self._clusters.get(cluster_id)

    def by_uuid(self, ident: str) -> Registration | None:
        """Return the registration with this cluster uuid or cluster id."""
        return self.get(ident) or next((c for c in self._clusters.values() if c.cluster_uuid == ident), None)

    def by_agent(self, agent_id: str) -> Registration | None:
        """Return the latest registration of an agent id."""
        return next((c for c in reversed(self._clusters.values()) if c.agent_id == agent_id), None)

    def all(self) -> list[Registration]:
        """Return all registered clusters."""
        return list(self._clusters.values())

    def presence(self, cluster_id: str) -> Presence:
        """Return the activity of a cluster, registered or not."""
        return self._presences.setdefault(cluster_id, Presence())

    def forget(self, *, cluster_id: str | None = None, agent_id: str | None = None) -> list[str]:
        """Delete matching registrations, all if there is no condition, and return their cluster ids."""
        gone = [
            c.cluster_id
            for c in self._clusters.values()
            if (cluster_id is None or c.cluster_id == cluster_id) and (agent_id is None or c.agent_id == agent_id)
        ]
        for ident in gone:
            del self._clusters[ident]
            self._save({"forget": ident})
        return gone

    def close(self) -> None:
        """Close the state file. Idempotent."""
        if self._state:
            self._state.close()
