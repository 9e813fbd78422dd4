"""Credentials in messages: the history and the journal show that they were there and whether they were the same."""

from __future__ import annotations

import hashlib
from typing import Any

_MAX_LEVELS = 64
_SECRET = frozenset({"token", "password", "cluster_cert_data"})
_SECRET_ENDINGS = ("_token", "_password")


def masked(secret: str) -> str:
    """What stands in the history for `secret`: equal for equal secrets."""
    return "sha256:" + hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()[:16]


def mask(value: Any, *, levels: int = _MAX_LEVELS) -> Any:
    """A copy of a JSON value in which each non-empty text under a key that names a credential is masked.

    What lies deeper than `levels` is left out, so that no message can exhaust the stack.
    """
    if not isinstance(value, (dict, list)):
        return value
    if not levels:
        return "(nested too deeply to show)"
    if isinstance(value, list):
        return [mask(item, levels=levels - 1) for item in value]
    return {
        key: masked(held) if _is_secret(key, held) else mask(held, levels=levels - 1) for key, held in value.items()
    }


def _is_secret(key: str, held: Any) -> bool:
    return isinstance(held, str) and held != "" and (key in _SECRET or key.endswith(_SECRET_ENDINGS))
