"""docs/reference/configuration.md names every key with its true default, and no key that does not exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shim.config.loader import leaves

DOCS = (Path(__file__).parents[2] / "docs" / "reference" / "configuration.md").read_text()


def shown(default: Any) -> str:
    """A default as the tables show it."""
    if isinstance(default, str):
        return default or '""'
    if isinstance(default, tuple):
        return f"[{', '.join(default)}]"
    return json.dumps(default)


def test_every_key_is_in_a_table_with_its_default_and_a_meaning() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `([^`]+)` \| (\S.*\S) \|$", DOCS, re.MULTILINE)
    assert [row[0] for row in rows if [row[0] for row in rows].count(row[0]) > 1] == []
    assert {key: default for key, default, _ in rows} == {path: shown(default) for path, _, default in leaves()}


def test_keys_in_the_text_exist() -> None:
    known = {path for path, _, _ in leaves()}
    named = set(re.findall(r"`([a-z]+\.[a-z0-9_.]+)`", DOCS)) - {"agent-shim.yaml"}
    assert named - known == set()
