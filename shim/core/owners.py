"""Who a caller is: owners are named by a keyed hash of their token (protocol.md §1.6)."""

from __future__ import annotations

import hashlib
import hmac


def owner_id(key: bytes, token: str) -> str:
    """The owner whose sessions a token sees: 64 hexadecimal digits, of no use without the key."""
    return hmac.digest(key, token.encode("utf-8", "surrogatepass"), "sha256").hex()


def shard_of(owner: str, count: int) -> int:
    """The link partition of an owner, below `count`."""
    return int(hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) % count
