"""From plain data to `Settings` by their types; every fault has its dotted key path and none has a value."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from shim.errors import Fault
from shim.settings import Section, Settings

_MAX_KEY_CHARS = 64
_MAX_SUGGESTIONS = 100  # finding a near key takes a millisecond


class TextValue(msgspec.Struct, frozen=True):
    """A value that came as text from `source` and is converted by the type of its key; lists and maps are JSON."""

    text: str
    source: str

    def json(self) -> Any:
        """The value of JSON text. Raises `ValueError` for anything else."""
        try:
            return json.loads(self.text)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def leaves(cls: type[Any] = Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key as (dotted path, type, default), in the order of `settings.py`."""
    for name, field in _fields(cls).items():
        default = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(default, Section):
            yield from leaves(type(default), f"{prefix}{name}.")
        else:
            yield prefix + name, field.type, default


def sections() -> frozenset[str]:
    """The dotted paths of all sections, nested ones included."""
    parents = (path.rpartition(".")[0] for path, _, _ in leaves())
    return frozenset(
        ".".join(parent.split(".")[:depth]) for parent in parents if parent for depth in range(1, parent.count(".") + 2)
    )


def to_settings(tree: dict[Any, Any], faults: list[Fault]) -> Settings:
    """Convert a tree of maps whose leaves are plain values or `TextValue`, adding to `faults`.

    A leaf with a fault keeps its default, so that all faults are found in one go.
    """
    settings: Settings = _section(Settings, tree, "", faults)
    return settings


def shown_key(key: Any) -> str:
    """Return a key of the file for a message: short, printable, and without what follows `:` or `=` in it.

    `{token:SECRET}` without a space is one key.
    """
    text = str(key)
    cut = re.search(r"[:=]", text)
    shown = f"{text[: cut.start()]}…" if cut else text
    if len(shown) > _MAX_KEY_CHARS:
        shown = f"{shown[:_MAX_KEY_CHARS]}…"
    return "".join(char if char.isprintable() else "?" for char in shown)


def _fields(cls: type[Any]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(cls)}


def _section(cls: type[Any], value: Any, path: str, faults: list[Fault]) -> Any:
    """A section from its map; null and absent sections are their defaults."""
    if value is None:
        return cls()
    if not isinstance(value, dict):
        faults.append(Fault(path, "must be a map of its keys"))
        return cls()
    fields = _fields(cls)
    read: dict[str, Any] = {}
    for key, below in value.items():
        shown = shown_key(key)
        dotted = f"{path}.{shown}" if path else shown
        field = fields.get(key) if isinstance(key, str) else None
        if field is None:
            hint = _suggestion(shown, path, fields) if len(faults) < _MAX_SUGGESTIONS else ""
            faults.append(Fault(dotted, f"unknown key{hint}{_source(below)}"))
        elif isinstance(field.default, Section):
            read[key] = _section(field.type, below, dotted, faults)
        else:
            read |= _leaf(key, field.type, below, dotted, faults)
    return cls(**read)


def _leaf(key: str, kind: Any, value: Any, path: str, faults: list[Fault]) -> dict[str, Any]:
    """The converted value under its key, or nothing and a fault."""
    try:
        converted = _convert(kind, value)
    except ValueError:
        faults.append(Fault(path, f"must be {_expected(kind)}{_source(value)}"))
        return {}
    return {key: converted}


def _convert(kind: Any, value: Any) -> Any:
    """Convert strictly; text from outside the file also by what it says. Raises `ValueError`."""
    if not isinstance(value, TextValue):
        converted = msgspec.convert(value, kind, strict=True)
    elif get_origin(kind) in (tuple, dict) or (
        value.text.startswith("[") and tuple in [get_origin(each) for each in get_args(kind)]
    ):
        converted = msgspec.convert(value.json(), kind, strict=True)
    else:
        converted = msgspec.convert(value.text, kind, strict=False)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError("not finite")
    return converted


def _source(value: Any) -> str:
    return f" (from {value.source})" if isinstance(value, TextValue) else ""


def _expected(kind: Any) -> str:
    """What a value of this type looks like, in a user's words."""
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, get_args(kind)))
    if origin is tuple:
        return "a list of texts"
    if origin is dict:
        return "a map of texts to texts"
    words = {
        type(None): "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text, in quotes if need be",
    }
    return words[kind]


def _suggestion(key: str, path: str, names: Iterable[str]) -> str:
    """Names a near key of the same section, else the same key of another section."""
    from difflib import get_close_matches  # noqa: PLC0415 - for a fault only

    near = get_close_matches(key.lower(), names, n=1)
    if near:
        return f", did you mean {path}.{near[0]}?" if path else f", did you mean {near[0]}?"
    elsewhere = [dotted for dotted, _, _ in leaves() if dotted.rpartition(".")[2] == key]
    return f", did you mean {elsewhere[0]}?" if elsewhere else ""
