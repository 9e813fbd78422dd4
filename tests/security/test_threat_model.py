"""The threat model is true: its tests exist, and an attacker who tries gets what it says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from shim.admin.connection_limit import MAX_BUSY, MAX_CONNECTIONS
from shim.admin.event_stream import MAX_READERS
from shim.config.settings import Listen
from shim.core import bounds
from shim.listening import ACCEPTED_PER_TURN
from shim.upstream.http_client import MAX_INTERIM_RESPONSES
from tests.security import attack
from tests.security.test_floods import FLOODS

ROOT = Path(__file__).parents[2]
PAGE = attack.PAGE.read_text()
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@cache
def names_in(path: Path) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name for node in functions if node.name.startswith("test_")}


def rows() -> list[list[str]]:
    """The cells of all rows of the tables that name tests."""
    found = []
    naming = False
    for line in PAGE.splitlines():
        if line.startswith("| could |"):
            naming = True
        elif not line.startswith("|"):
            naming = False
        elif naming and not line.startswith("|---"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 40
    for cells in rows():
        assert len(cells) == 3, cells
        named = NAMED.findall(cells[2])
        assert named, f"no test for: {cells[0]}"
        for file, name in named:
            path = ROOT / file
            assert path.is_file(), f"{file} does not exist"
            assert name in names_in(path), f"{file} has no {name}"


def test_every_bound_is_tried_by_a_flood_or_names_its_test() -> None:
    section = PAGE.partition("## Bounds")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    bounds = [row for row in cells if row[0] != "what"]
    assert len(bounds) > 50
    tried: set[str] = set()
    for row in bounds:
        assert len(row) == 4, row
        for named in row[3].split(", "):
            file, _, name = named.partition("::")
            if name:
                assert name in names_in(ROOT / file), named
            else:
                tried.add(named.strip("`"))
    assert tried == {flood.__name__ for flood in FLOODS}


@pytest.mark.parametrize(
    "bound, said",
    [
        (bounds.MAX_HEAD_BYTES, "32 KiB"),
        (bounds.MAX_LINE_BYTES, "16 KiB"),
        (bounds.MAX_WAITING_BYTES, "32 KiB"),
        (bounds.FREE_BYTES, "2 KiB"),
        (bounds.MAX_KEPT_BYTES, "64 KiB"),
        (bounds.FREE_KEPT_BYTES, "1 KiB"),
        (bounds.MAX_ALL_KEPT_BYTES, "6 MiB"),
        (bounds.MAX_VALUES, "250,000"),
        (bounds.MAX_KEPT_VALUES, "2000"),
        (bounds.MAX_EMPTY_LINES, "1000"),
        (bounds.MAX_ID_BYTES, "256 bytes"),
        (bounds.MAX_NAME_CHARS, "256 characters"),
        (bounds.MAX_LABELS, "128 labels"),
        (bounds.MAX_LOGGED_CHARS, "200 characters"),
        (Listen().max_status_body_bytes, "4 MiB"),
        (Listen().max_body_bytes, "1 MiB"),
        (Listen().max_connections, "2048"),
        (MAX_CONNECTIONS, "64"),
        (MAX_BUSY, "48"),
        (MAX_READERS, "16"),
        (ACCEPTED_PER_TURN, "32"),
        (MAX_INTERIM_RESPONSES, "8"),
    ],
)
def test_the_table_of_bounds_says_what_the_code_does(bound: int, said: str) -> None:
    number, _, unit = said.replace(",", "").partition(" ")
    assert int(number) * {"KiB": 2**10, "MiB": 2**20}.get(unit, 1) == bound
    assert said in PAGE.partition("## Bounds")[2].partition("\n## ")[0]


@pytest.mark.timeout(400)
async def test_an_attacker_gets_what_the_threat_model_says() -> None:
    findings, breaches = await attack.attack()
    assert breaches == []
    assert attack.placed(PAGE, attack.table(findings)) == PAGE, "python -m tests.security.attack --write"


def test_a_breach_is_told() -> None:
    with pytest.raises(attack.Breach, match="it gave way"):
        attack.held(False, "it gave way")
