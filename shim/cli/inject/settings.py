"""The operator's settings in the sidecar's ConfigMap: the keys that the pod decides, and the checks of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec

from shim.cli.inject import sidecar
from shim.cli.inject.sidecar import InjectError
from shim.config import loader
from shim.config.files import read_regular, reason
from shim.config.settings import Settings
from shim.errors import ConfigError, Fault

_MAX_CA_BYTES = 524_288  # a ConfigMap holds 1 MiB
_TOKEN_FILE = f"{sidecar.TOKEN_DIR}/token"

_DECIDED = {
    "listen.host": "127.0.0.1",
    "listen.port": 7080,
    "admin.host": "",
    "admin.port": sidecar.ADMIN_PORT,
    "store.path": f"{sidecar.STORE_DIR}/data/agent-shim.db",
    "upstream.token_file": _TOKEN_FILE,
}
"""Keys that the pod decides, with their values. The same value may be given, another one is an error."""

_REFUSED = {
    "upstream.url": "the sidecar takes it from the agent's own PIPEOPS_API_URL: change it there",
    "upstream.token": "a ConfigMap is no place for a secret; the sidecar reads the agent's Secret",
    "store.url": "a database is for the chart's gateway mode",
}
_AUTHORITIES = ("upstream.ca_file", "fallback.ca_file", "notify.ca_file")
"""Files that go into the ConfigMap. Certificates of authorities are no secrets, unlike the content of other files."""


@dataclass(frozen=True, slots=True)
class PodSettings:
    """Settings of the operator: keys that the pod decides are not in `tree`.

    `files` are texts by their name in the ConfigMap.
    """

    tree: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def read(path: str | None, sets: Sequence[str], own_token: bool) -> PodSettings:
    """Read a configuration file and `KEY=VALUE` texts, and check them as `agent-shim run` in the pod would.

    Raises `ConfigError` with all faults, and `InjectError` for the first key that has no place in the pod.
    """
    in_the_pod = {} if own_token else {"SHIM_UPSTREAM__TOKEN_FILE": _TOKEN_FILE}
    keys = loader.given_keys(path, sets)
    for key in keys:
        if key in _REFUSED:
            raise InjectError(f"{key}: {_REFUSED[key]}")
    settings = loader.load(path, in_the_pod, sets)
    tree: dict[str, Any] = {}
    files: dict[str, str] = {}
    if loader.secrets(settings):
        raise InjectError(f"{_with_secrets(settings, keys)}: a secret is in it, and a ConfigMap is no place for one")
    for key in keys:
        value = attrgetter(key)(settings)
        _require_place(key, value)
        if key in _AUTHORITIES and value:
            name = f"{key.partition('.')[0]}-ca.pem"
            files[name] = _authority(key, value)
            value = f"{sidecar.CONFIG_DIR}/{name}"
        if key not in _DECIDED:
            _put(tree, key.split("."), msgspec.to_builtins(value))
    return PodSettings(tree, files)


def _with_secrets(settings: Settings, keys: Sequence[str]) -> str:
    shown, plain = loader.redacted(settings), msgspec.to_builtins(settings)
    return ", ".join(key for key in keys if loader.value_at(shown, key) != loader.value_at(plain, key))


def _require_place(key: str, value: Any) -> None:
    if key in _DECIDED and value != _DECIDED[key]:
        decided = _DECIDED[key] or "its own address"
        raise InjectError(f"{key}: in the pod it is {decided}; leave it out")
    if key.endswith("_file") and value and key not in (*_AUTHORITIES, *_DECIDED):
        raise InjectError(f"{key}: the sidecar has no such file; the chart adds it by extraVolumes")


def _authority(key: str, path: str) -> str:
    try:
        # Bundles of authorities name them in comments, in letters of all languages.
        return read_regular(path, _MAX_CA_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        why = "it is no PEM text" if isinstance(error, UnicodeDecodeError) else reason(error)
        raise ConfigError([Fault(key, f"{path} cannot be read: {why}")]) from None


def _put(tree: dict[str, Any], names: Sequence[str], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of settings with another one added, whose values win."""
    both = {key: merge(below[key], above[key]) for key in below if isinstance(above.get(key), Mapping)}
    return {**below, **above, **both}
