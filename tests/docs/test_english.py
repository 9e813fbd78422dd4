"""The English of docstrings, help texts and documents: openings and words that the rules in CONTRIBUTING.md exclude.

`english.json` holds how many findings each package and page still has. The numbers may only fall, to 0 in the end.
`python tests/docs/test_english.py` lists all findings, `--write` lowers the numbers to what is left.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).with_name("english.json")

OPENINGS = re.compile(r"(?:What|Who|Whose|Whether|How|Where|Which|It|They|See|Nothing|Nobody)\b")
WORDS = re.compile(
    r"\b(?:any ?more|amiss|befalls?|befell|vouch(?:es|ed|ing)?|tells?|told|hears?|heard|believes?|believed|breath|"
    r"goes up|go up|went up|in a word|without a word|takes? no more|whoever|looks away|lets? go of)\b",
    re.IGNORECASE,
)
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def findings(text: str) -> list[str]:
    """Return the excluded words of a text, with their surroundings; code in it is left out."""
    plain = _CODE.sub("", text)
    return [" ".join(plain[max(0, each.start() - 30) : each.end() + 30].split()) for each in WORDS.finditer(plain)]


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def helps(tree: ast.Module) -> Iterator[str]:
    """Yield the help texts of command line options and of metrics' arguments called `help`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def of_module(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"opens with {text.split()[0]!r}: {text.splitlines()[0]}" for text in docstrings(tree) if OPENINGS.match(text)
    ]
    return found + [each for text in (*docstrings(tree), *helps(tree)) for each in findings(text)]


def package(path: Path) -> str:
    """Return the name under which a module's findings are counted: its package, two levels deep."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "/".join(parts[:2])


def everything() -> dict[str, list[str]]:
    """Return all findings by package or page; those without a finding are left out."""
    found: dict[str, list[str]] = {}
    for folder in ("shim", "devtools", "bench", "supply"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.setdefault(package(path), []).extend(f"{path.name}: {each}" for each in of_module(path))
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        if page.name not in ("CHANGELOG.md", "licenses.md"):
            found[str(page.relative_to(ROOT))] = findings(page.read_text(encoding="utf-8"))
    return {name: each for name, each in found.items() if each}


def test_the_rules_find_what_they_are_for() -> None:
    assert OPENINGS.match("Whether a link is up.")
    assert not OPENINGS.match("Return whether a link is up.")
    assert findings("It is not there any more, as `told()` says.") == ["It is not there any more, as says."]


def test_findings_only_become_fewer() -> None:
    allowed = json.loads(BASELINE.read_text())
    found = everything()
    more = {name: each for name, each in found.items() if len(each) > allowed.get(name, 0)}
    assert more == {}, "new findings; if you mended others: python tests/docs/test_english.py --write"


if __name__ == "__main__":
    left = everything()
    if "--write" in sys.argv[1:]:
        BASELINE.write_text(json.dumps(Counter({name: len(each) for name, each in left.items()}), indent=1) + "\n")
    for name, each in left.items():
        print(f"{name}: {len(each)}")
        for finding in each if "--write" not in sys.argv[1:] else ():
            print(f"    {finding}")
