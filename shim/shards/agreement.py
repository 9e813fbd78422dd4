"""What all replicas must agree upon: how many shards there are, how long leases last, the key of owner ids."""

from __future__ import annotations

import secrets

import msgspec

from shim.errors import ConfigError, Fault, StoreError
from shim.settings import Shards
from shim.shards.bus import CLUSTER, Bus
from shim.store.jetstream.server import Conflict, Unavailable

KEY = "config"
KEY_BYTES = 32


class Agreement(msgspec.Struct, frozen=True):
    """`key` is secret: with it tokens could be tried against owner ids."""

    count: int
    lease_s: float
    key: bytes

    def __repr__(self) -> str:
        return f"Agreement(count={self.count}, lease_s={self.lease_s})"


async def agree(bus: Bus, wanted: Shards) -> bytes:
    """The key for owner ids. Raises `ConfigError` where others use another number of shards or other leases."""
    mine = Agreement(wanted.count, wanted.lease_s, secrets.token_bytes(KEY_BYTES))
    while True:
        found = await bus.get(CLUSTER, KEY)
        if found is not None:
            break
        try:
            await bus.put(CLUSTER, KEY, msgspec.json.encode(mine), 0)
        except (Conflict, Unavailable):
            continue
    try:
        agreed = msgspec.json.decode(found[0], type=Agreement)
    except (msgspec.MsgspecError, ValueError):
        raise StoreError("what the replicas have agreed upon (bucket agent-shim-cluster) cannot be read") from None
    faults = [
        Fault(f"shards.{name}", f"the replicas of this NATS account use {theirs:g}: all must have the same")
        for name, ours, theirs in (
            ("count", wanted.count, agreed.count),
            ("lease_s", wanted.lease_s, agreed.lease_s),
        )
        if ours != theirs
    ]
    if faults:
        raise ConfigError(faults)
    return agreed.key
