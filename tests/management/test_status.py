"""The structure of the status: its page names every field."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from shim.management.status import Status

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "status.md"


def test_the_page_names_every_field() -> None:
    words = set(re.findall(r"[a-z][a-z0-9_]*", " ".join(re.findall(r"`[^`]+`", PAGE.read_text()))))
    for field in msgspec.structs.fields(Status):
        assert field.name in words, field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            for below in msgspec.structs.fields(field.type):
                assert below.name in words, f"{field.name}.{below.name}"
