"""Manifests as text: only documents that change are rewritten, with their comments and order."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from shim.cli.inject import sidecar
from shim.cli.inject.settings import PodSettings, merge
from shim.cli.inject.shapes import WORKLOADS, check, is_pod
from shim.cli.inject.sidecar import InjectError, Map, Sidecar
from shim.core.text import printable

_HEAD = "---\n"
_SEPARATOR = re.compile(r"^---(?=\s|$)", re.MULTILINE)
# A key with a list below it: how far each is indented, with comments between them.
_LIST = re.compile(r"^( *)(?:- )?[\w.\-/\"']+:[ \t]*(?:#.*)?\n(?:[ \t]*(?:#.*)?\n)*( *)- ", re.MULTILINE)
_MANAGED_BY = "app.kubernetes.io/managed-by"
_MANAGER = "agent-shim-inject"
_BOM = "\ufeff"
_KINDS = f"{', '.join(sorted(WORKLOADS - {'Pod'}))} or Pod"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `inject`.

    `container` names the agent's container, `""` stands for the vendor's names. `config`: also write the ConfigMap;
    `settings` are added to it.
    """

    image: str
    container: str = ""
    config_map: str = sidecar.NAME
    config: bool = True
    own_token: bool = False
    settings: PodSettings = field(default_factory=PodSettings)


def inject(text: str, options: Options, report: Callable[[str], None] = lambda _: None) -> str:
    """Return the manifests with the sidecar in every agent. Text that has it already is returned unchanged.

    All other lines stay as they are, with their line ends. Each object whose agent does not get the sidecar goes to
    `report`, as one line with the reason. Raises `InjectError` if there is no other agent, or one that cannot be given
    the sidecar.
    """
    return change_lines(text, lambda plain: _inject(plain, options, report))


def remove(text: str) -> str:
    """Return the manifests without the sidecar and its ConfigMap: byte for byte as before `inject`."""
    return change_lines(text, _remove)


def _inject(text: str, options: Options, report: Callable[[str], None]) -> str:
    agents = 0
    out: list[str] = []
    written: set[str] = set()
    for chunk in _chunks(text):
        for line in chunk.left_unchanged(options.container):
            report(line)
        configs: list[str] = []
        for template, container, namespace in chunk.agents(options.container):
            agents += 1
            sidecar.remove(template)
            with_shim = sidecar.recognise(container, options.image, options.config_map, options.own_token)
            sidecar.add(template, with_shim, container)
            configs.append(_config_map(with_shim, namespace, options.settings))
        # One for each namespace: a List may hold agents of several, and many tools take no object twice.
        new = [each for each in dict.fromkeys(configs if options.config else ()) if each not in written]
        out += [f"{_HEAD}{config}" if chunk.has_head else f"{config}{_HEAD}" for config in new]
        written.update(new)
        out.append(chunk.text())
    if not agents:
        raise InjectError(
            f"no agent in it that can be changed: no {_KINDS} has a container named agent or pipeops-agent; "
            "see --container"
        )
    return _unless_equal("".join(out), text)


def _remove(text: str) -> str:
    out = []
    for chunk in _chunks(text):
        for template, _ in chunk.templates():
            sidecar.remove(template)
        out.append(chunk.text())
    return "".join(out)


def _chunks(text: str) -> list[_Chunk]:
    """Return the documents of a stream without our ConfigMaps, and drop a `---` that only one of ours needed."""
    chunks: list[_Chunk] = []
    bare = False
    for part in _split(text):
        chunk = _Chunk(part.removeprefix(_HEAD) if bare else part)
        bare = chunk.is_our_config() and not chunk.has_head and not chunks
        if not chunk.is_our_config():
            chunks.append(chunk)
    return chunks


class _Chunk:
    """One document of a stream: its text from `---` to the next, and its data."""

    def __init__(self, text: str) -> None:
        self._text = text
        match = _SEPARATOR.match(text)
        self._head = text[: text.index("\n", match.end()) + 1] if match and "\n" in text[match.end() :] else ""
        self._yaml = _round_trip(text)
        self._data = _load(self._yaml, text[len(self._head) :])
        check(self._data)
        # The library's output without any change: only a difference from it is a change.
        self._before = self._dump()

    @property
    def has_head(self) -> bool:
        """Return True if the document begins with a `---` line."""
        return bool(self._head)

    def text(self) -> str:
        """Return the text with the changed lines, or as the library writes it if its lines are not the library's."""
        after = self._dump()
        if after == self._before:
            return self._text
        patched = _patch(self._text[len(self._head) :], self._before, after)
        # If lists are indented in two ways, lines of one may be an error among those of the other.
        return self._head + (patched if patched and _parsed(patched) == self._data else after)

    def templates(self) -> Iterator[tuple[Map, str]]:
        """Return every pod template with the namespace of its workload."""
        for data in self._objects():
            if _is_workload(data) and isinstance(data.get("spec"), dict):
                template = data if data["kind"] == "Pod" else data["spec"].get("template")
                if isinstance(template, dict) and (template.get("spec") or {}).get("containers"):
                    yield template, (data.get("metadata") or {}).get("namespace") or ""

    def agents(self, wanted: str) -> Iterator[tuple[Map, Map, str]]:
        """Return pod template, container and namespace of every agent, without pods that opted out by label."""
        for template, namespace in self.templates():
            container = _agent_in(template, wanted)
            if container is not None and not _opted_out(template):
                yield template, container, namespace

    def left_unchanged(self, wanted: str) -> Iterator[str]:
        """Return a line for every object with an agent that does not get the sidecar, with the reason."""
        for data in self._objects():
            agents = [pod for pod in _pods(data, set()) if _agent_in(pod, wanted) is not None]
            if agents and not _is_workload(data):
                why = f"only {_KINDS} can be changed here. The chart's admission policy changes pods of any kind"
            elif any(_opted_out(pod) for pod in agents):
                why = f"its pods have the label {sidecar.OPT_OUT_LABEL}: disabled"
            else:
                continue
            metadata = data.get("metadata")
            name = metadata.get("name") if isinstance(metadata, dict) else None
            who = printable(f"{data.get('kind') or 'Object'} {name or 'without a name'}")
            yield f"{who} has an agent and is left unchanged: {why}"

    def _objects(self) -> Iterator[Map]:
        """Return the object of the document, or those in its List."""
        pending = [self._data]
        while pending:
            data = pending.pop()
            if isinstance(data, dict) and data.get("kind") == "List":
                pending.extend(reversed(data.get("items") or []))
            elif isinstance(data, dict):
                yield data

    def is_our_config(self) -> bool:
        """Return True if the document is the ConfigMap that `inject` wrote."""
        data = self._data
        if not isinstance(data, dict) or data.get("kind") != "ConfigMap":
            return False
        return ((data.get("metadata") or {}).get("labels") or {}).get(_MANAGED_BY) == _MANAGER

    def _dump(self) -> str:
        if self._data is None:
            return ""
        out = io.StringIO()
        self._yaml.dump(self._data, out)
        return out.getvalue()


def _is_workload(data: Map) -> bool:
    return isinstance(data.get("kind"), str) and data["kind"] in WORKLOADS


def _opted_out(template: Map) -> bool:
    return ((template.get("metadata") or {}).get("labels") or {}).get(sidecar.OPT_OUT_LABEL) == "disabled"


def _agent_in(template: Map, wanted: str) -> Map | None:
    """Return the agent's container of a pod template: that of the name `wanted`, or if it is `""` the vendor's."""
    for container in template["spec"]["containers"]:
        if container.get("name") == wanted if wanted else sidecar.is_agent(container, template):
            return container  # type: ignore[no-any-return]
    return None


def _pods(data: Any, seen: set[int]) -> Iterator[Map]:
    """Return every pod or pod template in an object of any kind, also of one that only its cluster knows.

    `seen` has the ids of values that were looked at, because aliases may contain themselves.
    """
    if id(data) in seen or not isinstance(data, (dict, list)):
        return
    seen.add(id(data))
    if isinstance(data, dict):
        spec = data.get("spec")
        if isinstance(spec, dict) and spec.get("containers") and is_pod(data):
            yield data
    for value in data.values() if isinstance(data, dict) else data:
        yield from _pods(value, seen)


def _config_map(with_shim: Sidecar, namespace: str, settings: PodSettings) -> str:
    from ruamel.yaml.scalarstring import LiteralScalarString

    writer, out = _round_trip(""), io.StringIO()
    writer.dump(merge(with_shim.settings, settings.tree), out)
    metadata = {"name": with_shim.config_map} | ({"namespace": namespace} if namespace else {})
    metadata["labels"] = {_MANAGED_BY: _MANAGER}  # type: ignore[assignment]
    texts = {"config.yaml": out.getvalue(), **settings.files}
    data = {name: LiteralScalarString(text) for name, text in texts.items()}
    text = io.StringIO()
    writer.dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}, text)
    return text.getvalue()


def _split(text: str) -> list[str]:
    """Return the documents of a stream, each with its `---` line; joined they equal the text."""
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text) if match.start())]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _round_trip(text: str) -> Any:
    """Return a reader and writer that keeps comments, order, quotes and the indentation of lists in this text."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1_000_000
    lists = [len(below) - len(above) for above, below in _LIST.findall(text)]
    if sum(shift <= 0 for shift in lists) * 2 > len(lists):
        yaml.indent(mapping=2, sequence=2, offset=0)
    else:
        yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(yaml: Any, text: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return yaml.load(text)
    except RecursionError:
        raise InjectError("not a manifest: nested too deeply") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1} of a document" if mark else ""
        # The library names the value of a key that stands twice, which may be a token.
        problem = (getattr(error, "problem", None) or "cannot be read").partition(" with value ")[0]
        raise InjectError(f"not valid YAML{where}: {problem}") from None


def _patch(original: str, before: str, after: str) -> str:
    """Return `original` with the changed lines between `before` and `after`; `""` if its lines differ from `before`.

    The library may write a line with other spaces. The caller must check that the result means the same.
    """
    lines, known, new = (text.splitlines(keepends=True) for text in (original, before, after))
    if len(lines) != len(known):
        return ""
    out: list[str] = []
    for tag, start, end, new_start, new_end in difflib.SequenceMatcher(None, known, new, autojunk=False).get_opcodes():
        if tag == "equal":
            out += lines[start:end]
            continue
        at = min(start, len(lines) - 1)
        shift = _indent(lines[at]) - _indent(known[at])
        out += [" " * shift + line[max(0, -shift) :] for line in new[new_start:new_end]]
    return "".join(out)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _parsed(text: str) -> Any:
    try:
        return _load(_round_trip(""), text)
    except InjectError:
        return None


def _unless_equal(after: str, before: str) -> str:
    """Return `before` if both streams contain the same data."""
    same = [_parsed(part) for part in _split(after)] == [_parsed(part) for part in _split(before)]
    return before if same else after


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
