"""Who owns the shards, by the leases in NATS, and whether these replicas and this configuration mean the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from shim.core.leases import Entry
from shim.settings import Shards
from shim.tools.doctor.findings import Finding, failed, passed, warned

if TYPE_CHECKING:
    from shim.store.jetstream.probe import Probe, StreamFacts

_UNSHARDED = "agent-shim-commands"


class _Agreement(msgspec.Struct, frozen=True):
    """What is not secret of it."""

    count: int
    lease_s: float


async def examine(probe: Probe, shards: Shards, streams: Sequence[StreamFacts]) -> list[Finding]:
    """The line `shards`. Raises `StoreError`."""
    from shim.shards.agreement import KEY  # noqa: PLC0415 - imports an extra
    from shim.shards.bus import CLUSTER, LEASES  # noqa: PLC0415 - as above

    found = await probe.entries(LEASES)
    entries = {key: entry for key, body in found.items() if (entry := _decoded(body)) is not None}
    names = {each.process: each.name for key, each in entries.items() if key.startswith("replica.")}
    stored = await probe.message(CLUSTER, subject=f"$KV.{CLUSTER.removeprefix('KV_')}.{KEY}") if found else None
    agreed = msgspec.json.decode(stored.body, type=_Agreement) if stored is not None else None
    if not shards.count:
        return _alone(names)
    left = next((each.messages for each in streams if each.name == _UNSHARDED), 0)
    if agreed is not None and (agreed.count, agreed.lease_s) != (shards.count, shards.lease_s):
        todo = "the same in all replicas; docs/operations.md, Several replicas: how to change it"
        text = f"shards.count {shards.count}, lease_s {shards.lease_s:g}, and the replicas have agreed upon"
        return [failed("shards", f"{text} {agreed.count} and {agreed.lease_s:g}", todo)]
    return [_owners(shards, names, _holders(entries, shards.count)), *_left(left)]


def _alone(names: dict[str, str]) -> list[Finding]:
    if not names:
        return []
    todo = "shards.count as they have it, or stop them: docs/operations.md, Several replicas"
    return [failed("shards", f"shards.count is 0, and replicas with shards live here: {_listed(names)}", todo)]


def _holders(entries: dict[str, Entry], count: int) -> dict[int, str]:
    held = {number: entries.get(f"shard.{number}") for number in range(count)}
    return {number: entry.process for number, entry in held.items() if entry is not None and entry.process}


def _owners(shards: Shards, names: dict[str, str], holders: dict[int, str]) -> Finding:
    if not names:
        return warned("shards", f"{shards.count} shards, and no replica lives", "start one; a lease that ended is free")
    told = ", ".join(f"{names.get(process, process)} {n}" for process, n in sorted(Counter(holders.values()).items()))
    if len(holders) < shards.count:
        todo = "free shards are taken within seconds: run doctor again, then see the replicas' log, shard_not_opened"
        return warned("shards", f"{shards.count - len(holders)} of {shards.count} have no owner; {told}", todo)
    return passed("shards", f"{shards.count}, owned by {told}")


def _left(messages: int) -> list[Finding]:
    """The store of `shards.count: 0` beside those of shards. One message in it is the mark of an opening."""
    if messages <= 1:
        return []
    todo = "docs/operations.md, Several replicas: drain with shards.count: 0; what ended may stay there"
    return [warned("shards", f"{_UNSHARDED} has {messages - 1} commands of shards.count: 0, which nobody offers", todo)]


def _listed(names: dict[str, str]) -> str:
    return ", ".join(sorted(names.values()))


def _decoded(body: bytes) -> Entry | None:
    try:
        return msgspec.json.decode(body, type=Entry)
    except (msgspec.MsgspecError, ValueError):
        return None
