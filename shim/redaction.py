"""Mask secrets in texts: known ones wherever they stand, and whatever follows `token=` or `Bearer`."""

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
_MIN_SECRET_CHARS = 4  # masking a shorter one would garble every line and tell what it is
_CARRIERS = re.compile(
    r"((?:token|secret|password|passwd|api_?key)=|\b(?:Bearer|Basic)\s+)[^\s&\"'<>,;]+", re.IGNORECASE
)
_JWT = re.compile(r"\beyJ[\w-]{8,}[\w.-]*", re.ASCII)  # a JSON object in base64url: a Kubernetes token is one
_TELLING_CHARS = 8
_SECRET_FIELD = re.compile(r"token$|secret|password|authorization", re.IGNORECASE)


class Redaction:
    """Masks known secrets, what follows `token=` or `Bearer `, and fields whose names say that they are secret.

    Thousands of secrets may be known, one for each agent that brings its own token: they are found by their first
    characters in a dict, because a regular expression with an alternative for each would try them all at every place.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._by_head: dict[str, list[str]] = {}  # first characters → secrets that begin so, the longest first
        self._longest = 0
        for secret in secrets:
            self.add(secret)

    def add(self, secret: str) -> None:
        """Mask this text from now on; texts of fewer than four characters are left alone."""
        for form in _forms(secret):
            same_head = self._by_head.get(form[:_MIN_SECRET_CHARS], [])
            if form not in same_head:
                # A new list: another thread may be reading the old one.
                self._by_head[form[:_MIN_SECRET_CHARS]] = sorted([*same_head, form], key=len, reverse=True)
                self._longest = max(self._longest, len(form))

    def discard(self, secret: str) -> None:
        """Mask this text no longer: it is not valid any more, or its owner has gone."""
        for form in _forms(secret):
            head = form[:_MIN_SECRET_CHARS]
            left = [each for each in self._by_head.get(head, []) if each != form]
            if left:
                self._by_head[head] = left
            else:
                self._by_head.pop(head, None)

    def text(self, text: str, max_chars: int | None = None) -> str:
        """Return the text without secrets, and then cut to `max_chars`.

        Cutting comes second: a secret that was cut first would not be recognised, and most of it would be shown.
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
        """Return the value of the field `name` as JSON can hold it, without secrets in it or in anything below it."""
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
    """Return the text of somebody else with these secrets masked, and whatever looks like a token.

    A secret is also found where the text breaks off in the middle of it, as a close frame's does after 123 bytes.
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
    """Yield the secret, and the secret as URLs, JSON and Python's `repr` write it."""
    if len(secret) >= _MIN_SECRET_CHARS:
        yield from {
            secret,
            quote(secret, safe="", errors="surrogatepass"),
            json.dumps(secret)[1:-1],
            repr(secret)[1:-1],
        }


def basic_credentials(user: str, password: str) -> str:
    """Return the two as `Authorization: Basic` carries them, to be masked as well."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()
