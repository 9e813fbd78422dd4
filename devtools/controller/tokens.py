"""Accepted tokens and their owners."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


class Tokens:
    """The accepted tokens. An owner is a digest of a token: it may be shown and stored, a token may not."""

    def __init__(self, tokens: Sequence[str], prefixes: Sequence[str] = ()) -> None:
        self._tokens = [token.encode() for token in tokens if token]
        self._prefixes = tuple(prefix for prefix in prefixes if prefix)

    def owner_of(self, token: str) -> str | None:
        """Return the owner of a token, or `None` if the token is not accepted."""
        sent = token.encode(errors="surrogatepass")
        known = [hmac.compare_digest(sent, accepted) for accepted in self._tokens]
        if any(known) or (self._prefixes and token.startswith(self._prefixes)):
            return hashlib.sha256(sent).hexdigest()[:12]
        return None


def bearer(header: str) -> str:
    """Return the token of an `Authorization` header, or the empty string if it is no Bearer header."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
