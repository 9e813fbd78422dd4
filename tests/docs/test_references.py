"""Every page, section and file that code, comments and documents cite is in this repository."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BINARY = (".png", ".ico", ".woff2")
_GENERATED = ("requirements/", "tests/clients/package-lock.json", "tests/fixtures/version-before/", "CHANGELOG.md")

# A page, and what follows it: one anchor or several, as in `docs/reference/protocol.md#13-poll, #3-commands`.
_PAGE = re.compile(r"(?<![\w./-])(docs/[\w./-]+\.(?:md|yaml|json|png))((?:#[\w-]+(?:, (?=#[\w-]))?)*)")
# Pages by their bare name, or that no reader has.
_VAGUE = re.compile(
    r"(?<![\w/-])(?:protocol|legacy-agents|design|habits|names|english|walks|vision|cases)\.md(?: §|#)|wire-facts|"
    r"(?<![\w/-])(?:design|habits|walks|vision|cases|agent-migration-guide)\.md"
)
_FILE = re.compile(
    r"(?<![\w./-])((?:shim|devtools|tests|bench|supply|config|helm)/[\w./-]+\.(?:py|yaml|yml|json|sh|in))\b"
)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [
        name
        for name in listed
        if name and not name.endswith(_BINARY) and not name.startswith(_GENERATED) and (ROOT / name).is_file()
    ]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def cited(text: str) -> list[tuple[str, str]]:
    """Return (page, anchor) for each citation; the anchor is `""` if the whole page is cited."""
    found = []
    for page, after in _PAGE.findall(text):
        found += [(page, anchor) for anchor in re.findall(r"#([\w-]+)", after)] or [(page, "")]
    return found


def texts() -> list[tuple[str, str]]:
    here = str(Path(__file__).relative_to(ROOT))
    return [(name, (ROOT / name).read_text(encoding="utf-8")) for name in tracked() if name != here]


def test_what_is_read_as_a_citation() -> None:
    text = "(docs/reference/protocol.md#13-poll, #3-commands) and `docs/how-to/canary.md`, not /docs/x.md"
    page = "docs/reference/protocol.md"
    assert cited(text) == [(page, "13-poll"), (page, "3-commands"), ("docs/how-to/canary.md", "")]
    assert _VAGUE.search("protocol.md §3")
    assert not _VAGUE.search("docs/reference/protocol.md#3-commands")


def test_every_cited_page_and_section_exists() -> None:
    wrong = []
    for name, text in texts():
        for page, anchor in cited(text):
            goal = ROOT / page
            if not goal.is_file() or (anchor and anchor not in anchors(goal)):
                wrong.append(f"{name}: {page}#{anchor}")
    assert wrong == []


def test_no_page_is_cited_that_readers_do_not_have() -> None:
    wrong = [f"{name}: {found[0]}" for name, text in texts() for found in _VAGUE.finditer(_without_links(name, text))]
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in tracked() if name.endswith(".md")])
def test_every_file_that_a_document_names_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [path for path in _FILE.findall(text) if "NAME" not in path and not (ROOT / path).exists()] == []


def test_the_names_in_the_map_of_the_code_are_defined_there() -> None:
    text = (ROOT / "docs/contributing/architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`(shim/[\w/]+\.py)` \(((?:`[\w.]+`(?:, )?)+)\)", text)
    assert len(found) > 10
    names = [(path, name) for path, listed in found for name in re.findall(r"(\w+)`", listed)]
    wrong = [f"{path}: {name}" for path, name in names if not _defines(ROOT / path, name)]
    assert wrong == []


def _defines(module: Path, name: str) -> bool:
    source = module.read_text(encoding="utf-8")
    return re.search(rf"^ *(?:(?:async )?def |class )?{name}\b(?=[(:= ])", source, re.MULTILINE) is not None


def _without_links(name: str, text: str) -> str:
    """Return the text without the targets of relative links: those of documents are checked by their own test."""
    return re.sub(r"\[[^\]]*\]\([^)]*\)", "", text) if name.endswith(".md") else text
