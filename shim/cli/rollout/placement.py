"""Place of clusters in the rollout, by the function that the shim uses (docs/reference/protocol.md#4-modes)."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import click
import msgspec

from shim.cli.standard_input import standard_input
from shim.config.settings import Rollout
from shim.core.failover import bucket, in_rollout
from shim.core.text import columns, plural, printable

MAX_NAMES_BYTES = 16 * 1_048_576
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Place(msgspec.Struct, frozen=True):
    """Place of one cluster. `steps` holds for each percentage if the cluster is in; `problem` says why it is unknown.

    `given` counts how often the name was given. `context` is empty unless the name was read from a cluster.
    """

    cluster: str
    hash: float | None
    decided_by: str
    steps: dict[str, bool]
    given: int = 1
    context: str = ""
    problem: str = ""


def place(name: str, percents: Iterable[float], lists: Rollout, given: int = 1, context: str = "") -> Place:
    """Return the place of the cluster with this name. `lists` has the names and patterns that precede the hash."""
    rules = lists.include, lists.exclude
    decided_by = "hash"
    if not in_rollout(name, float("inf"), *rules):
        decided_by = "exclude"
    elif in_rollout(name, 0, *rules):
        decided_by = "include"
    steps = {f"{percent:g}": in_rollout(name, percent, *rules) for percent in percents}
    return Place(name, bucket(name), decided_by, steps, given, context)


def places(names: Iterable[str], percents: Sequence[float], lists: Rollout) -> list[Place]:
    """Return one place for each name, the lowest hash first; a name that is given twice is one place."""
    counted = Counter(names)
    found = [place(name, percents, lists, given) for name, given in counted.items()]
    return sorted(found, key=lambda each: (each.hash or 0, each.cluster))


def checked(names: Iterable[str]) -> list[str]:
    """Return the names of a command line without empty ones. Raises click's error for bytes that are no UTF-8."""
    found = [name for name in names if name]
    for name in found:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise click.UsageError(f"{name!r} is not UTF-8") from None
    return found


def read_names(path: str) -> list[str]:
    """Return the names in a file, one a line, without empty lines and comments (`# …`). `-` is standard input.

    Windows' line ends and a byte order mark are accepted. Raises click's error for anything that is no UTF-8 text:
    another encoding would give other hashes without a sign of it.
    """
    shown = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = _read(standard_input())
        else:
            with Path(path).open("rb") as file:
                data = _read(file)
    except OSError as error:
        raise click.ClickException(f"{shown} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_NAMES_BYTES:
        raise click.ClickException(f"{shown} is larger than {MAX_NAMES_BYTES >> 20} MiB: no list of clusters")
    if data.startswith(_UTF16):
        raise click.ClickException(f"{shown} is UTF-16: save it as UTF-8")
    names = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            name = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise click.ClickException(f"{shown}, line {number}: not UTF-8: save it as UTF-8") from None
        if "\0" in name:
            raise click.ClickException(f"{shown}, line {number}: a NUL byte, so it is no text file")
        if name and name.split()[0] != "#":
            names.append(name)
    return names


def read_cluster_names(path: str) -> list[str]:
    """Return the names in a file, as `read_names` does. Raises click's error for a list of admin ports.

    The line `prod http://HOST:PORT` would be one name, with a hash that no shim computes.
    """
    names = read_names(path)
    for name in names:
        if any("://" in word for word in name.split()):
            raise click.ClickException(f"{path} is a list of admin ports, as for --urls: give the names alone")
    return names


def _read(file: IO[bytes]) -> bytes:
    """Read at most one byte more than allowed; a pipe is read to its end."""
    data = b""
    while len(data) <= MAX_NAMES_BYTES and (piece := file.read(MAX_NAMES_BYTES + 1 - len(data))):
        data += piece
    return data


def table(found: Sequence[Place], percents: Sequence[float]) -> str:
    """Return the places as text: a row for each, and how many are in at each step."""
    steps = [f"{percent:g}" for percent in percents]
    contexts = any(each.context for each in found)
    head = ["CLUSTER", *(["CONTEXT"] if contexts else []), "HASH", *(f"{step} %" for step in steps), "REMARK"]
    rows = [head]
    for each in found:
        cells = ["?" if each.hash is None else "in" if each.steps[step] else "out" for step in steps]
        number = "?" if each.hash is None else f"{each.hash:.2f}"
        context = [printable(each.context)] if contexts else []
        rows.append([printable(each.cluster) or "?", *context, number, *cells, printable(_remark(each))])
    known = [each for each in found if each.hash is not None]
    counts = [f"{sum(each.steps[step] for each in known)} at {step} %" for step in steps]
    unknown = len(found) - len(known)
    also = f"; {plural(unknown, 'cluster')} unknown" if unknown else ""
    return "\n".join([*columns(rows), "", f"{plural(len(known), 'cluster')}: in are {', '.join(counts)}{also}"])


def _remark(each: Place) -> str:
    remarks = [each.problem] if each.problem else []
    remarks += [f"by {each.decided_by}"] if each.decided_by in ("include", "exclude") else []
    remarks += [f"given {each.given} times"] if each.given > 1 else []
    return ", ".join(remarks)
