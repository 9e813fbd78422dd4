"""Conversion to Unix line ends and back: CRLF, a mixture, a BOM, or no line end at the end."""

from __future__ import annotations

import difflib
from collections.abc import Callable

_BOM = "\ufeff"


def change_lines(text: str, change: Callable[[str], str]) -> str:
    """Return the result of `change` for the text, which it gets without BOM and CRLF and with a final line end.

    Unchanged lines keep their line end; new and changed ones get the most frequent one of the text.
    """
    bom = _BOM if text.startswith(_BOM) else ""
    lines = _lines(text.removeprefix(_BOM))
    unended = bool(lines) and not lines[-1].endswith("\n")
    plain = [_plain(line) for line in lines]
    if unended:
        plain[-1] += "\n"
    changed = _lines(change("".join(plain)))
    if changed == plain:
        return text
    crlf = sum(line.endswith("\r\n") for line in lines) * 2 > len(lines)
    out: list[str] = []
    matcher = difflib.SequenceMatcher(None, plain, changed, autojunk=False)
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        if tag == "equal":
            out += lines[start:end]
        else:
            out += [f"{line[:-1]}\r\n" if crlf and line.endswith("\n") else line for line in changed[new_start:new_end]]
    if unended:
        out = [line if line.endswith("\n") else f"{line}\r\n" if crlf else f"{line}\n" for line in out]
        out[-1] = out[-1].removesuffix("\n").removesuffix("\r")
    return bom + "".join(out)


def _lines(text: str) -> list[str]:
    """Split after each line feed only: YAML's other line breaks are contents of a line here."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _plain(line: str) -> str:
    return f"{line[:-2]}\n" if line.endswith("\r\n") else line
