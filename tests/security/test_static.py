"""Exceptions from static analysis stand beside their reasons; nothing is switched off for a whole file or line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((*(ROOT / "shim").rglob("*.py"), *(ROOT / "supply").rglob("*.py")))
NOQA = re.compile(r"#\s*noqa(?P<codes>:\s*[A-Z]+[0-9]+(?:,\s*[A-Z]+[0-9]+)*)?(?P<reason>.*)$")
IGNORE = re.compile(r"#\s*type:\s*ignore(?P<codes>\[[a-z-]+(?:, ?[a-z-]+)*\])?")


def faults(file: Path) -> Iterator[str]:
    text = file.read_text()
    if "ruff: noqa" in text or "mypy:" in text:
        yield "something is switched off for the whole file"
    for number, line in enumerate(text.splitlines(), 1):
        noqa, ignore = NOQA.search(line), IGNORE.search(line)
        if noqa is not None and not noqa["codes"]:
            yield f"line {number}: a blanket noqa"
        elif noqa is not None and not re.match(r"\s+- \w+", noqa["reason"]):
            yield f"line {number}: no reason"
        if ignore is not None and not ignore["codes"]:
            yield f"line {number}: a blanket type: ignore"


def test_every_exception_names_its_rule_and_its_reason() -> None:
    found = {str(file.relative_to(ROOT)): list(faults(file)) for file in FILES}
    assert len(found) > 100
    assert {name: each for name, each in found.items() if each} == {}


def test_the_rules_are_on() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "S" in tool["ruff"]["lint"]["select"]
    assert not [rule for rule in tool["ruff"]["lint"]["ignore"] if re.fullmatch(r"S\d+", rule)]
    shipped = {key: rules for key, rules in tool["ruff"]["lint"]["per-file-ignores"].items() if key.startswith("shim")}
    # S608: the SQL of the database's store and of the cluster is put together from constants; values are parameters.
    found = {rule for rules in shipped.values() for rule in rules if re.fullmatch(r"S\d+", rule)}
    assert found <= {"S101", "S311", "S608"}
    assert [key for key, rules in shipped.items() if "S608" in rules] == ["shim/{cluster,store/postgres}/**"]
    assert tool["mypy"]["strict"] is True
    assert "overrides" not in tool["mypy"]
