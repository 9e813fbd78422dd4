"""Masking of credentials: history and journal show their presence and if two are equal, but not their values."""

from __future__ import annotations

import hashlib
from typing import Any

_MAX_LEVELS = 64
_SECRET = frozenset({"token", "password", "cluster_cert_data"})
_SECRET_ENDINGS = ("_token", "_password")


def masked(secret: str) -> str:
    """Return the mask of `secret`; equal secrets have equal masks."""
    return "sha256:" + hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()[:16]


def mask(value: Any, *, levels: int = _MAX_LEVELS) -> Any:
    """Return a copy of a JSON value with each non-empty text masked whose key denotes a credential.

    Values nested deeper than `levels` are left out, so that no message can exhaust the stack.
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
