"""Reads the configuration: one YAML file, then `SHIM_<SECTION>__<KEY>` of the environment, then `--set`.

Everything that is wrong is told at once: each fault has its dotted key path and never the value, which may be secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import yaml

from shim.conversion import Text, leaves, sections, to_settings
from shim.errors import ConfigError, Fault
from shim.regular_files import read_regular, reason
from shim.settings import Settings
from shim.validation import semantic_faults

_ENV_PREFIX = "SHIM_"
_RELOADABLE = frozenset({"mode", "rollout", "fallback", "heartbeat", "poll", "commands"})
_MAX_SECRET_BYTES = 65_536
_MAX_FILE_BYTES = 1_048_576
_MASK = "***"
_USERINFO = re.compile(r"(?<=://)[^/?#@,]*@")


def load(path: str | None, env: Mapping[str, str], sets: Iterable[str]) -> Settings:
    """Read and check the whole configuration; `path` is `None` for defaults. Raises `ConfigError` with all faults.

    `sets` are `section.key=value` texts and win over `env`, which wins over the file.
    """
    faults: list[Fault] = []
    tree = _read_file(path, faults) if path is not None else {}
    maps = sections()
    for dotted, text in [*_from_env(env), *_from_sets(sets, faults)]:
        _put(tree, dotted, _as_map(dotted, text, faults) if dotted in maps else text)
    settings = to_settings(tree, faults)
    faults += semantic_faults(settings, frozenset(fault.path for fault in faults))
    if faults:
        raise ConfigError(faults)
    return settings


def effective(running: Settings, fresh: Settings) -> Settings:
    """The running settings with what may change without a restart taken from the fresh ones (protocol.md §4)."""
    kept = {name: getattr(fresh, name) for name in _RELOADABLE}
    token = {"token": fresh.upstream.token, "token_file": fresh.upstream.token_file}
    upstream = running.upstream
    if fresh.upstream.own_tokens == upstream.own_tokens:
        upstream = msgspec.structs.replace(upstream, **token)
    log = msgspec.structs.replace(running.log, level=fresh.log.level)
    return msgspec.structs.replace(running, upstream=upstream, log=log, **kept)


def needs_restart(running: Settings, fresh: Settings) -> list[str]:
    """The keys whose changes wait for a restart."""
    return [key for key, _, _ in leaves() if attrgetter(key)(running) != attrgetter(key)(fresh)]


def mask(settings: Settings) -> dict[str, Any]:
    """The effective configuration as plain data, without tokens, user info of URLs and queries of the vendor's URLs."""
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    if plain["upstream"]["token"]:
        plain["upstream"]["token"] = _MASK
    for section in (plain["upstream"], plain["fallback"]):
        base, has_query, _ = section["url"].partition("?")
        section["url"] = base + (f"?{_MASK}" if has_query else "")
        section["proxy"] = _USERINFO.sub(f"{_MASK}@", section["proxy"])
    return plain


def dump(settings: Settings) -> str:
    """`mask(settings)` as YAML that `load` reads again."""
    return yaml.safe_dump(mask(settings), sort_keys=False, allow_unicode=True)


def read_token(settings: Settings) -> str:
    """The upstream token as it is now: the file is read each time. `""` where agents bring their own.

    Raises `ConfigError` when the file cannot be read or holds no token.
    """
    upstream = settings.upstream
    return read_secret(upstream.token_file, "upstream.token_file") if upstream.token_file else upstream.token


def read_secret(path: str, key: str) -> str:
    """The one word that a secret file holds, without the white space around it; `key` is where `path` is configured.

    Raises `ConfigError` when there is no such word. Neither its text nor its cause contains any of the file.
    """
    try:
        data = read_regular(path, _MAX_SECRET_BYTES)
    except (OSError, ValueError) as exc:
        raise ConfigError([Fault(key, f"cannot be read: {reason(exc)}")]) from None
    word = data.decode("ascii", "replace").strip()
    if not word:
        raise ConfigError([Fault(key, "the file is empty")])
    if not re.fullmatch(r"[!-~]+", word):
        raise ConfigError([Fault(key, "the file must hold one word of printable ASCII")])
    return word


def secrets(settings: Settings) -> list[str]:
    """The secret texts that stand in the settings themselves, for `logs.Redaction`."""
    proxies = (settings.upstream.proxy, settings.fallback.proxy)
    passwords = [password for proxy in proxies if (password := urlsplit(proxy).password)]
    # A password may be shown as the URL has it, or decoded.
    return [text for text in dict.fromkeys((settings.upstream.token, *passwords, *map(unquote, passwords))) if text]


# --- where values come from ---


def _read_file(path: str, faults: list[Fault]) -> dict[str, Any]:
    try:
        data = read_regular(path, _MAX_FILE_BYTES)
    except (OSError, ValueError) as exc:
        faults.append(Fault("", f"{path} cannot be read: {reason(exc)}"))
        return {}
    loader = None
    try:
        loader = _Loader(data)
        tree = loader.get_single_data()
        faults += loader.faults
    except (yaml.YAMLError, RecursionError) as exc:
        faults.append(Fault("", f"{path} is not valid YAML{_where(exc)}"))
        return {}
    finally:
        if loader is not None:
            loader.dispose()
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        faults.append(Fault("", f"{path} must be a map of sections"))
        return {}
    return tree


def _where(exc: Exception) -> str:
    """Line, column and problem, without the excerpt that yaml's own text has: it could show a secret."""
    if not isinstance(exc, yaml.MarkedYAMLError) or exc.problem_mark is None:
        return ""
    return f": line {exc.problem_mark.line + 1}, column {exc.problem_mark.column + 1}: {exc.problem}"


def _from_env(env: Mapping[str, str]) -> Iterator[tuple[str, Text]]:
    """Only `SHIM_MODE` and `SHIM_<SECTION>__<KEY>`: Kubernetes injects `SHIM_PORT=tcp://…` for a Service named shim."""
    known = sections()
    for name in sorted(env):
        parts = name.removeprefix(_ENV_PREFIX).lower().split("__")
        if name == "SHIM_MODE" or (name.startswith(_ENV_PREFIX) and len(parts) > 1 and parts[0] in known):
            yield ".".join(parts), Text(env[name], name)


def _from_sets(sets: Iterable[str], faults: list[Fault]) -> Iterator[tuple[str, Text]]:
    for item in sets:
        dotted, equals, text = item.partition("=")
        if equals and dotted.strip():
            yield dotted.strip(), Text(text, "--set")
        else:
            faults.append(Fault("", "--set needs section.key=value"))


def _as_map(dotted: str, value: Text, faults: list[Fault]) -> dict[str, Any]:
    try:
        found = value.json()
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    faults.append(Fault(dotted, f"must be a map of its keys, as JSON (from {value.source})"))
    return {}


def _put(tree: dict[Any, Any], dotted: str, value: Text | dict[str, Any]) -> None:
    """Set a value in the tree of sections; what stands in its way gives way."""
    *above, key = dotted.split(".")
    for name in above:
        below = tree.get(name)
        # A copy, because an alias of the file may put one map in two places.
        tree[name] = dict(below) if isinstance(below, dict) else {}
        tree = tree[name]
    tree[key] = value


class _Loader(yaml.SafeLoader):
    """YAML whose plain words stay words: true and false, null and decimal numbers are all that is resolved.

    `faults` are the keys given twice, which YAML forbids and the library lets pass.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - the library's attribute

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.faults: list[Fault] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    where = f"line {key_node.start_mark.line + 1}"
                    self.faults.append(Fault("", f"{where}: the key {key!r} is given twice"))
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
