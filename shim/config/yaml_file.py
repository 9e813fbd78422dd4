"""YAML of the configuration file. Only `loader` uses this module, which is imported when a file is read."""

from __future__ import annotations

import re
import sys
from typing import Any

# The library's part in C is not used here. It could not be removed from memory again, and would keep the other parts.
sys.modules.setdefault("yaml.cyaml", None)  # type: ignore[arg-type]

import yaml  # noqa: E402 - see above

_MERGE = "tag:yaml.org,2002:merge"


def parse(data: bytes) -> tuple[Any, list[tuple[int, str]]]:
    """Return the content of a file, and the keys that are given twice with their lines. Raises any exception."""
    loader = _Loader(data)
    try:
        return loader.get_single_data(), loader.repeated
    finally:
        loader.dispose()


def dump(tree: dict[str, Any]) -> str:
    """Return a tree of sections as YAML."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def where(exc: Exception) -> str:
    """Return line, column and problem of a YAML error, without any text of the file, which could be a secret.

    The library's own message has an excerpt. It also names tags, aliases and anchors, and YAML reads a secret as one of
    these if it begins with `!`, `*` or `&`.
    """
    if not isinstance(exc, yaml.MarkedYAMLError) or exc.problem_mark is None:
        return ""
    problem = exc.problem or "not understood"
    if re.search(r"tag|alias|anchor", problem):
        problem = re.split(r"['\"]", problem)[0].strip()
    return f": line {exc.problem_mark.line + 1}, column {exc.problem_mark.column + 1}: {problem}"


class _Loader(yaml.SafeLoader):
    """YAML loader that converts only true, false, null and decimal numbers; all other plain words stay texts.

    `repeated` lists keys that are given twice, which YAML forbids and the library accepts, with their lines.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - the library's attribute

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.repeated: list[tuple[int, str]] = []

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Convert a node.

        A value that does not fit its explicit tag (`!!int word`) raises an error with its place, not its text.
        """
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # noqa: BLE001 - the constructor of each tag raises other exceptions
            raise yaml.constructor.ConstructorError(None, None, "not a value of its type", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Convert a map, and add a fault for each key that is given twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key_node.tag != _MERGE:
                if key in seen:
                    self.repeated.append((key_node.start_mark.line + 1, key))
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})$"), _first)
