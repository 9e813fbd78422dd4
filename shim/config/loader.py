"""Loader of the configuration from file, environment and command line, which reports all faults at once."""

from __future__ import annotations

import codecs
import json
import math
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from shim.config.files import read_regular, reason
from shim.config.rules import cross_field_faults
from shim.config.settings import Section, Settings
from shim.errors import ConfigError, Fault
from shim.redaction import MASK, basic_credentials

ENV_PREFIX = "SHIM_"
REMOVED = frozenset({"shards", "store.credentials_file", "store.replicas"})
"""Sections and keys of earlier versions that had an effect on stores in NATS only. They are ignored, with a warning."""
_RELOADABLE = frozenset({"mode", "rollout", "fallback", "heartbeat", "poll", "commands"})
_MAX_SECRET_BYTES = 65_536
_MAX_FILE_BYTES = 262_144  # parsing this many takes a second, and it is far more than a person writes
_MAX_FAULTS_SHOWN = 100
_MIN_WEBHOOK_SECRET_CHARS = 12  # a path such as /alerts is no secret, and masking it would garble other texts
_YAML_FILE = "shim.config.yaml_file"
_PASSWORD = re.compile(r"(?<=://)([^/?#@]*?):[^/?#@]*@")
_HOST = re.compile(r"^(\w+://)(?:[^/?#@]*@)?([^/?#]*).*", re.DOTALL)
_USERINFO = re.compile(r"(?<=://)[^/?#@,]*@")


def load(path: str | None, env: Mapping[str, str], sets: Iterable[str], *, reload: bool = False) -> Settings:
    """Read and check the whole configuration. Raises `ConfigError` with all faults.

    `path` is `None` for defaults. `sets` are `section.key=value` texts; they take precedence over `env`, and `env` over
    the file. With `reload` an empty file is a fault: it may be being written, and must not reset a running shim to
    defaults.
    """
    faults: list[Fault] = []
    settings = to_settings(_read(path, env, sets, faults, reload=reload), faults)
    faults += cross_field_faults(settings, frozenset(fault.path for fault in faults))
    if faults:
        more = len(faults) - _MAX_FAULTS_SHOWN
        raise ConfigError(faults[:_MAX_FAULTS_SHOWN] + [Fault("", f"and {more} more")] * (more > 0))
    return settings


def given_keys(path: str | None, sets: Iterable[str]) -> list[str]:
    """Return the dotted paths of the known keys that have a value in the file or in `sets`. Nothing is checked."""
    tree = _read(path, {}, sets, [])
    return [key for key, _, _ in leaves() if value_at(tree, key) is not None]


def removed_keys(path: str | None, env: Mapping[str, str]) -> list[str]:
    """Return the keys of `REMOVED` that the file or `env` still has. Nothing is checked."""
    tree = _read(path, env, (), [])
    return sorted(key for key in REMOVED if value_at(tree, key) is not None)


def apply_reloadable(running: Settings, fresh: Settings) -> Settings:
    """Return the running settings with the values of `fresh` for all keys that can change without a restart."""
    kept = {name: getattr(fresh, name) for name in _RELOADABLE}
    token = {"token": fresh.upstream.token, "token_file": fresh.upstream.token_file}
    upstream = running.upstream
    if fresh.upstream.own_tokens == upstream.own_tokens:
        upstream = msgspec.structs.replace(upstream, **token)
    log = msgspec.structs.replace(running.log, level=fresh.log.level)
    return msgspec.structs.replace(running, upstream=upstream, log=log, **kept)


def needs_restart(running: Settings, fresh: Settings) -> list[str]:
    """Return the keys whose changes take effect only after a restart."""
    return [key for key, _, _ in leaves() if attrgetter(key)(running) != attrgetter(key)(fresh)]


def redacted(settings: Settings) -> dict[str, Any]:
    """Return the effective configuration as plain data without secrets.

    Tokens, user information in URLs and queries of the vendor's URLs are masked.
    """
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    if plain["upstream"]["token"]:
        plain["upstream"]["token"] = MASK
    plain["store"]["url"] = _without_password(plain["store"]["url"])
    upstream, fallback, notify, telemetry = (plain[name] for name in ("upstream", "fallback", "notify", "telemetry"))
    for section, key in ((upstream, "url"), (fallback, "url"), (telemetry, "otlp_url")):
        section[key] = _without_query(section[key])
    for section in (upstream, fallback, notify):
        section["proxy"] = _USERINFO.sub(f"{MASK}@", section["proxy"])
    if notify["url"]:
        # The secret of a webhook is in its path.
        notify["url"] = _HOST.sub(rf"\1\2/{MASK}", notify["url"])
    return plain


def _without_password(url: str) -> str:
    """Return a database's URL with password and query masked. User, hosts and database stay readable."""
    return _PASSWORD.sub(rf"\1:{MASK}@", _without_query(url))


def _without_query(url: str) -> str:
    base, has_query, _ = url.partition("?")
    return base + (f"?{MASK}" if has_query else "")


def dump(settings: Settings) -> str:
    """Return `redacted(settings)` as YAML that `load` can read."""
    from shim.config import yaml_file  # noqa: PLC0415 - see `_read_file`

    return yaml_file.dump(redacted(settings))


def read_token(settings: Settings) -> str:
    """Return the present upstream token; its file is read at every call. `""` if agents have their own tokens.

    Raises `ConfigError` if the file cannot be read or has no token.
    """
    upstream = settings.upstream
    return read_secret(upstream.token_file, "upstream.token_file") if upstream.token_file else upstream.token


def read_secret(path: str, key: str) -> str:
    """Return the one word in a secret file, without surrounding white space and the mark that Windows writes first.

    `key` is the key in which `path` is configured.

    Raises `ConfigError` if there is no such word. Neither its text nor its cause contains any of the file's content.
    """
    try:
        data = read_regular(path, _MAX_SECRET_BYTES)
    except (OSError, ValueError) as exc:
        raise ConfigError([Fault(key, f"cannot be read: {reason(exc)}")]) from None
    word = data.removeprefix(codecs.BOM_UTF8).decode("ascii", "replace").strip()
    if not word:
        raise ConfigError([Fault(key, "the file is empty")])
    if not re.fullmatch(r"[!-~]+", word):
        raise ConfigError([Fault(key, "the file must hold one word of printable ASCII")])
    return word


def secrets(settings: Settings) -> list[str]:
    """Return the secret texts in the settings themselves, for `Redaction`."""
    found = [settings.upstream.token]
    upstream, fallback = settings.upstream, settings.fallback
    proxies = (upstream.proxy, fallback.proxy, settings.notify.proxy)
    for url in (*proxies, upstream.url, fallback.url, settings.telemetry.otlp_url):
        parts = urlsplit(url.strip())
        found += [value for _, value in parse_qsl(parts.query)]
        if parts.password:
            password = unquote(parts.password)
            found += [parts.password, password, basic_credentials(unquote(parts.username or ""), password)]
    webhook = urlsplit(settings.notify.url.strip())
    found += [text for text in (webhook.path.strip("/"), webhook.query) if len(text) >= _MIN_WEBHOOK_SECRET_CHARS]
    database = urlsplit(settings.store.url.strip())
    in_query = [value for key, value in parse_qsl(database.query) if "password" in key]
    for text in (database.password or "", *in_query):
        found += [text, unquote(text)]
    return [text for text in dict.fromkeys(found) if text]


# --- where values come from ---


def forget_yaml() -> None:
    """Remove the YAML library and what uses it from memory. It is imported again when a file is read again."""
    for name in list(sys.modules):  # a copy: another thread may import something
        if name.partition(".")[0] == "yaml" or name == _YAML_FILE:
            del sys.modules[name]
    vars(sys.modules[__package__]).pop("yaml_file", None)


def _read(
    path: str | None, env: Mapping[str, str], sets: Iterable[str], faults: list[Fault], *, reload: bool = False
) -> dict[str, Any]:
    """Return the tree of all sources, the later ones of file, environment and `sets` winning."""
    tree = _read_file(path, faults, reload=reload) if path is not None else {}
    maps = sections()
    for dotted, text in [*_from_env(env), *_from_sets(sets, faults)]:
        _put(tree, dotted, _as_map(dotted, text, faults) if dotted in maps else text)
    return tree


def _read_file(path: str, faults: list[Fault], *, reload: bool) -> dict[str, Any]:
    try:
        data = read_regular(path, _MAX_FILE_BYTES)
    except (OSError, ValueError) as exc:
        faults.append(Fault("", f"{path} cannot be read: {reason(exc)}"))
        return {}
    from shim.config import yaml_file  # noqa: PLC0415 - 1.5 MB, which `forget_yaml` frees after the file was read

    try:
        tree, repeated = yaml_file.parse(data)
    except Exception as exc:  # noqa: BLE001 - no file may stop a running shim, whatever the YAML library raises
        faults.append(Fault("", f"{path} is not valid YAML{yaml_file.where(exc)}"))
        return {}
    faults += [Fault("", f"line {line}: the key {shown_key(key)!r} is given twice") for line, key in repeated]
    if tree is None:
        if reload:
            faults.append(Fault("", f"{path} is empty; write {{}} for a configuration of defaults"))
        return {}
    if not isinstance(tree, dict):
        faults.append(Fault("", f"{path} must be a map of sections"))
        return {}
    return tree


def is_read(name: str) -> bool:
    """Return True for `SHIM_MODE` and `SHIM_<SECTION>__<KEY>`, the variables that are part of the configuration.

    Kubernetes sets `SHIM_PORT=tcp://…` for a Service named shim, which must not count.
    """
    section, separator, _ = name.removeprefix(ENV_PREFIX).lower().partition("__")
    return name == "SHIM_MODE" or (name.startswith(ENV_PREFIX) and bool(separator) and section in sections())


def _from_env(env: Mapping[str, str]) -> Iterator[tuple[str, TextValue]]:
    for name in sorted(env):
        if is_read(name):
            yield name.removeprefix(ENV_PREFIX).lower().replace("__", "."), TextValue(env[name], name)


def _from_sets(sets: Iterable[str], faults: list[Fault]) -> Iterator[tuple[str, TextValue]]:
    for item in sets:
        dotted, equals, text = item.partition("=")
        if equals and dotted.strip():
            yield dotted.strip(), TextValue(text, "--set")
        else:
            faults.append(Fault("", "--set needs section.key=value"))


def _as_map(dotted: str, value: TextValue, faults: list[Fault]) -> dict[str, Any]:
    try:
        found = value.json()
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    faults.append(Fault(dotted, f"must be a map of its keys, as JSON (from {value.source})"))
    return {}


def _put(tree: dict[Any, Any], dotted: str, value: TextValue | dict[str, Any]) -> None:
    """Set a nested key; parents that are no maps are overwritten."""
    *above, key = dotted.split(".")
    for name in above:
        below = tree.get(name)
        # A copy is changed, because a YAML alias may put the same map object in two places.
        tree[name] = dict(below) if isinstance(below, dict) else {}
        tree = tree[name]
    tree[key] = value


_MAX_KEY_CHARS = 64
_MAX_SUGGESTIONS = 100  # finding a similar key takes a millisecond


class TextValue(msgspec.Struct, frozen=True):
    """A value given as text by `source`, converted by the type of its key. Lists and maps are JSON."""

    text: str
    source: str

    def json(self) -> Any:
        """Return the value of the text as JSON. Raises `ValueError` if it is none."""
        try:
            return json.loads(self.text)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def value_at(tree: Any, dotted: str) -> Any:
    """Return the value of a dotted key in a tree of maps, `None` without one."""
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def leaves(cls: type[Any] = Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every key as (dotted path, type, default), in the order of `settings.py`."""
    for name, field in _fields(cls).items():
        default = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(default, Section):
            yield from leaves(type(default), f"{prefix}{name}.")
        else:
            yield prefix + name, field.type, default


def sections() -> frozenset[str]:
    """Return the dotted paths of all sections, nested ones included."""
    parents = (path.rpartition(".")[0] for path, _, _ in leaves())
    return frozenset(
        ".".join(parent.split(".")[:depth]) for parent in parents if parent for depth in range(1, parent.count(".") + 2)
    )


def to_settings(tree: dict[Any, Any], faults: list[Fault]) -> Settings:
    """Convert a tree of maps to settings, adding to `faults`. Its leaves are plain values or `TextValue`.

    A leaf with a fault keeps its default, so that one run finds all faults.
    """
    settings: Settings = _section(Settings, tree, "", faults)
    return settings


def shown_key(key: Any) -> str:
    """Return a key of the file for a message: short, printable, and without the part after `:` or `=`.

    YAML reads `{token:SECRET}` without a space as one key, so that part may be a secret.
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
    """Return a section from its map. null and absent sections have their defaults."""
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
        if dotted in REMOVED:
            continue
        if field is None:
            hint = _suggestion(shown, path, fields) if len(faults) < _MAX_SUGGESTIONS else ""
            faults.append(Fault(dotted, f"unknown key{hint}{_source(below)}"))
        elif isinstance(field.default, Section):
            read[key] = _section(field.type, below, dotted, faults)
        else:
            read |= _leaf(key, field.type, below, dotted, faults)
    return cls(**read)


def _leaf(key: str, kind: Any, value: Any, path: str, faults: list[Fault]) -> dict[str, Any]:
    """Return the converted value under its key, or `{}` and add a fault."""
    try:
        converted = _convert(kind, value)
    except ValueError:
        how = _as_text(kind) if isinstance(value, TextValue) else ""
        faults.append(Fault(path, f"must be {_expected(kind)}{how}{_source(value)}"))
        return {}
    return {key: converted}


def _convert(kind: Any, value: Any) -> Any:
    """Convert a value strictly, a `TextValue` also by parsing its text. Raises `ValueError`."""
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


def _as_text(kind: Any) -> str:
    """Return how a list or a map is written in an environment variable or on the command line."""
    origins = {get_origin(each) for each in (kind, *get_args(kind))}
    if tuple in origins:
        return ', in JSON: ["a", "b"]'
    return ', in JSON: {"a": "b"}' if dict in origins else ""


def _source(value: Any) -> str:
    return f" (from {value.source})" if isinstance(value, TextValue) else ""


def _expected(kind: Any) -> str:
    """Return a description of the values of a type, for a fault."""
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
        str: "a text (in quotes if need be)",
    }
    return words[kind]


def _suggestion(key: str, path: str, names: Iterable[str]) -> str:
    """Return a hint with a similar key of the same section, else the same key of another section."""
    from difflib import get_close_matches  # noqa: PLC0415 - for a fault only

    near = get_close_matches(key.lower(), names, n=1)
    if near:
        return f", did you mean {path}.{near[0]}?" if path else f", did you mean {near[0]}?"
    elsewhere = [dotted for dotted, _, _ in leaves() if dotted.rpartition(".")[2] == key]
    return f", did you mean {elsewhere[0]}?" if elsewhere else ""
