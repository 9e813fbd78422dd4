"""Warnings for likely mistakes: variables with misspelt names, files that do not exist, and removed keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from operator import attrgetter

from shim.config.files import reason, require_regular
from shim.config.loader import ENV_PREFIX, is_read, leaves, read_secret, removed_keys
from shim.config.settings import Settings
from shim.errors import ConfigError

_MAX_SHOWN = 20
# Kubernetes sets these for each Service of a namespace: SHIM_SERVICE_HOST, SHIM_PORT=tcp://…, SHIM_PORT_7080_TCP_ADDR.
_OF_A_SERVICE = re.compile(
    r"_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)$"
)
_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")


def find_warnings(settings: Settings, env: Mapping[str, str], path: str | None = None) -> list[str]:
    """Return one sentence for each likely mistake in settings that were loaded from the file `path` and from `env`.

    No sentence contains the value of a secret key.
    """
    removed = [f"{key} has no effect: stores in NATS are gone, remove it" for key in removed_keys(path, env)]
    found = [*removed, *_variables(env), *_files(settings)]
    more = len(found) - _MAX_SHOWN
    return found[:_MAX_SHOWN] + [f"and {more} more"] * (more > 0)


def _variables(env: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that is not read but resembles one that is."""
    keys = [path for path, _, _ in leaves()]
    names = {ENV_PREFIX + key.upper().replace(".", "__"): key for key in keys}
    by_letters = {_letters(name): name for name in names}
    by_last_part = {key.rpartition(".")[2].upper(): name for name, key in names.items()}
    for name in sorted(env):
        folded = name.upper().removeprefix("AGENT_")
        if not folded.startswith(ENV_PREFIX) or is_read(name):
            continue
        if _OF_A_SERVICE.search(folded) or _ADDRESS.match(env[name]):
            continue
        meant = by_letters.get(_letters(folded)) or by_last_part.get(folded.removeprefix(ENV_PREFIX))
        if meant is None:
            from difflib import get_close_matches  # noqa: PLC0415 - for a warning only

            near = get_close_matches(folded[:64], names, n=1, cutoff=0.8)
            meant = near[0] if near else None
        shown = "".join(char if char.isprintable() else "?" for char in name[:64])
        if meant is not None:
            yield f"environment: {shown} is not read, did you mean {meant}?"
        elif "__" in folded:
            yield f"environment: {shown} is not read: there is no such section"


def _letters(name: str) -> str:
    return name.replace("_", "")


def _files(settings: Settings) -> Iterator[str]:
    """Yield a warning for each configured file that cannot be read."""
    for key, _, _ in leaves():
        path = attrgetter(key)(settings) if key.endswith("_file") else ""
        if not path:
            continue
        try:
            if key.endswith(("token_file", "password_file")):
                read_secret(path, key)
            else:
                require_regular(path)
        except ConfigError as error:
            yield f"{error} ({path})"
        except (OSError, ValueError) as error:
            yield f"{key}: cannot be read: {reason(error)} ({path})"
