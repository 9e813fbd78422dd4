"""Print the figures of the shipped package that tell how easy it is to read: `make house`. No gate is on them."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules() -> list[Path]:
    """Return the files of shim/ that git knows."""
    listed = subprocess.run(["git", "ls-files", "shim/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


def size(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its decorators not counted."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


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
    for length, where in functions[:5]:
        print(f"{length} lines: {where}")
    for name, length in sorted(lines.items(), key=lambda item: -item[1]):
        if length > 500:
            print(f"{length} lines: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
