"""Print figures that show how easy the shipped package is to read: `make house`. No gate is on them."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
RUN_LINES = 6
"""Length of a run of lines that counts as repeated."""
REFERENCES = ("tests/docs/test_references.py", "tests/docs/test_links.py")


def modules() -> list[Path]:
    """Return the files of shim/ that git knows."""
    listed = subprocess.run(["git", "ls-files", "shim/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


def size(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its decorators not counted."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def first_cycle() -> list[str]:
    """Return modules that import each other in a circle, or an empty list if none do."""
    graph = grimp.build_graph("shim")
    try:
        TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def repeated_runs() -> list[str]:
    """Return the pairs of modules with the same run of `RUN_LINES` lines: imports, texts and blank lines left out."""
    places: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in modules():
        text = path.read_text()
        left_out: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ):
                left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in left_out]
        code = [line for line in lines if line.strip("()[]{},") and not line.startswith("#")]
        for start in range(len(code) - RUN_LINES + 1):
            places[tuple(code[start : start + RUN_LINES])].add(str(path.relative_to(ROOT)))
    return sorted({f"{one} and {other}" for found in places.values() for one, other in combinations(sorted(found), 2)})


def failed_references() -> int:
    """Return the number of tests of references that fail."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *REFERENCES]
    printed = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return printed.count("\nFAILED ")


def main() -> int:
    """Print a table, then the longest functions and the modules above 500 lines."""
    lines: dict[str, int] = {}
    functions: list[tuple[int, str]] = []
    classes = undocumented = 0
    for path in modules():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        lines[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            classes += isinstance(node, ast.ClassDef)
            if isinstance(node, FUNCTIONS):
                functions.append((size(node), f"{name}:{node.lineno} {node.name}"))
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                undocumented += ast.get_docstring(node) is None
    functions.sort(reverse=True)
    print("| figure | now | goal |\n|---|--:|--:|")
    print(f"| lines of the shipped package | {sum(lines.values())} | ≤ 18000 |")
    print(f"| modules | {len(lines)} | ≤ 150 |")
    print(f"| mean lines a module | {statistics.mean(lines.values()):.0f} | 110 to 150 |")
    print(f"| classes | {classes} | ≤ 280 |")
    print(f"| mean lines a function | {statistics.mean(length for length, _ in functions):.1f} | 8 to 12 |")
    print(f"| longest function | {functions[0][0]} | ≤ 50 |")
    print(f"| public names without a docstring | {undocumented} | 0 |")
    cycle, repeated = first_cycle(), repeated_runs()
    print(f"| pairs of modules with the same run of {RUN_LINES} lines | {len(repeated)} | ≤ 10 |")
    print(f"| cycles of imports | {int(bool(cycle))} | 0 |")
    print(f"| tests of references that fail | {failed_references()} | 0 |")
    for text in (*repeated, *cycle):
        print(text)
    for length, where in functions[:5]:
        print(f"{length} lines: {where}")
    for name, length in sorted(lines.items(), key=lambda item: -item[1]):
        if length > 500:
            print(f"{length} lines: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
