"""Redaction of secrets in texts: known secrets anywhere, and values after `token=` or `Bearer`."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any
from urllib.parse import quote

MASK = "***"
MAX_TEXT_CHARS = 4096
_MIN_SECRET_CHARS = 4  # masking a shorter one would garble every line, and reveal it by that
_CARRIERS = re.compile(
    r"((?:token|secret|password|passwd|api_?key)=|\b(?:Bearer|Basic)\s+)[^\s&\"'<>,;]+", re.IGNORECASE
)
_JWT = re.compile(r"\beyJ[\w-]{8,}[\w.-]*", re.ASCII)  # a JSON object in base64url: a Kubernetes token is one
_TELLING_CHARS = 8
_SECRET_FIELD = re.compile(r"token$|secret|password|authorization", re.IGNORECASE)


class Redaction:
    """Redactor of known secrets, of values after `token=` or `Bearer `, and of fields with the name of a secret.

    Thousands of secrets may be known, one for each agent with its own token. They are looked up in a dict by their
    first characters: a regular expression would try every alternative at every position.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._by_head: dict[str, list[str]] = {}  # first characters → secrets that begin so, the longest first
        self._longest = 0
        for secret in secrets:
            self.add(secret)

    def add(self, secret: str) -> None:
        """Mask this text from now on. Texts of fewer than four characters are ignored."""
        for form in _forms(secret):
            same_head = self._by_head.get(form[:_MIN_SECRET_CHARS], [])
            if form not in same_head:
                # A new list replaces the old one, because another thread may be reading that.
                self._by_head[form[:_MIN_SECRET_CHARS]] = sorted([*same_head, form], key=len, reverse=True)
                self._longest = max(self._longest, len(form))

    def discard(self, secret: str) -> None:
        """Stop masking this text, because the secret is invalid or its owner was deleted."""
        for form in _forms(secret):
            head = form[:_MIN_SECRET_CHARS]
            left = [each for each in self._by_head.get(head, []) if each != form]
            if left:
                self._by_head[head] = left
            else:
                self._by_head.pop(head, None)

    def text(self, text: str, max_chars: int | None = None) -> str:
        """Return the text without secrets, cut to `max_chars`.

        The text is cut after masking: a secret that was cut first would not be recognised, and most of it would be
        shown.
        """
        if max_chars is not None:
            text = text[: max_chars + self._longest + 1]  # every secret that begins before the cut is still whole
        text = _CARRIERS.sub(rf"\1{MASK}", self._without_known(text))
        if max_chars is not None and len(text) > max_chars:
            text = text[: max_chars - 1] + "…"
        return text

    def _without_known(self, text: str) -> str:
        by_head = self._by_head
        if not by_head:
            return text
        size = _MIN_SECRET_CHARS
        places = [at for at in range(len(text) - size + 1) if text[at : at + size] in by_head]
        pieces: list[str] = []
        done = 0
        for at in places:
            if at >= done:
                found = next((s for s in by_head.get(text[at : at + size], ()) if text.startswith(s, at)), None)
                if found is not None:
                    pieces += (text[done:at], MASK)
                    done = at + len(found)
        return "".join(pieces) + text[done:] if pieces else text

    def value(self, value: Any, name: str = "") -> Any:
        """Return the value of the field `name` as JSON data, without secrets in it or in nested values."""
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if _SECRET_FIELD.search(name):
            return MASK
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(below, str(key)) for key, below in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value(below) for below in value]
        return self.text(str(value), MAX_TEXT_CHARS)


def without_secrets(text: str, *secrets: str) -> str:
    """Return a text from outside with these secrets masked, and everything that looks like a token.

    A secret is recognised even if the text ends inside of it, as the text of a close frame does after 123 bytes.
    """
    text = Redaction(secrets).text(text)
    for secret in secrets:
        head = secret[:_TELLING_CHARS]
        at = text.find(head) if len(head) == _TELLING_CHARS else -1
        while at >= 0:
            known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text[at:], secret, strict=False)))
            text = text[:at] + MASK + text[at + known :]
            at = text.find(head)
    return _JWT.sub(MASK, text)


def _forms(secret: str) -> Iterator[str]:
    """Yield the secret as it is, and as URLs, JSON and Python's `repr` write it."""
    if len(secret) >= _MIN_SECRET_CHARS:
        yield from {
            secret,
            quote(secret, safe="", errors="surrogatepass"),
            json.dumps(secret)[1:-1],
            repr(secret)[1:-1],
        }


def basic_credentials(user: str, password: str) -> str:
    """Return user and password as encoded in `Authorization: Basic`. This text is a secret, too."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()
