"""Location of a caller's shard: at this replica, at another one, or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from shim.bridge.context import DEFAULT_OWNER
from shim.cluster.membership import Membership
from shim.cluster.shard import Shard
from shim.cluster.shard_manager import ShardManager
from shim.core.leases import Member
from shim.core.shard_assignment import owner_id, shard_of

REMEMBERED_TOKENS = 65_536


class ShardLocator:
    """Finds the shard of a token, and the replica that owns it."""

    def __init__(self, shards: ShardManager, membership: Membership, *, own_tokens: bool) -> None:
        """Create a locator that finds nothing until `agree`. `own_tokens` is true if agents bring their own tokens."""
        self._shards = shards
        self._membership = membership
        self._shard_of: Callable[[str], int | None] = lambda _: None
        self._own_tokens = own_tokens

    def agree(self, key: bytes, count: int) -> None:
        """Set the key for owner ids and the number of shards, which all replicas share."""
        default = shard_of(DEFAULT_OWNER, count)

        def of_own_token(token: str) -> int | None:
            return shard_of(owner_id(key, token), count) if token else None

        self._shard_of = lru_cache(REMEMBERED_TOKENS)(of_own_token) if self._own_tokens else lambda _: default

    def shard_number(self, token: str) -> int | None:
        """Return the shard of a caller, `None` without a token where one is needed."""
        return self._shard_of(token)

    def local(self, token: str) -> Shard | None:
        """Return the shard of a caller if this replica owns it and can serve it now."""
        number = self._shard_of(token)
        return None if number is None else self._shards.usable(number)

    def is_elsewhere(self, token: str) -> bool:
        """Return whether this replica cannot carry out calls with this token now."""
        number = self._shard_of(token)
        return number is not None and self._shards.usable(number) is None

    def remote_owner(self, token: str) -> Member | None:
        """Return the replica that owns the shard of a token, `None` if that is this one or none."""
        number = self._shard_of(token)
        owner = None if number is None else self._membership.view.owner(number)
        return None if owner is None or owner.process == self._membership.me.process else owner
