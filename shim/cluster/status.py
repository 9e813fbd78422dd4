"""Status of all replicas, and the recent commands of this one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from shim.cluster.membership import Membership
from shim.cluster.shard import Shard
from shim.cluster.shard_manager import ShardManager
from shim.core.command_queue import RecentCommand

KEPT = 50


def replicas_status(membership: Membership, shards: ShardManager) -> dict[str, Any]:
    """Return all replicas as this one sees them, for the status page."""
    view, me = membership.view, membership.me
    holders = view.holders()
    return {
        "replica": me.name,
        "shards": shards.count,
        "owned": sorted(shard.number for shard in shards.serving()),
        "unowned": shards.count - len(holders),
        "replicas": [
            {
                "name": member.name,
                "self": process == me.process,
                "leaving": member.leaving,
                "shards": sum(holder == process for holder in holders.values()),
            }
            for process, member in sorted(view.members.items(), key=lambda item: (item[1].name, item[0]))
        ],
    }


class ReplicaRecentCommands:
    """Recent events of commands at this replica, newest first."""

    def __init__(self, shards: Callable[[], list[Shard]]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[RecentCommand]:
        recent = (shard.bridge.ctx.recent_commands for shard in self._shards())
        merged = heapq.merge(*recent, key=lambda each: each.wall, reverse=True)
        return islice(merged, KEPT)
