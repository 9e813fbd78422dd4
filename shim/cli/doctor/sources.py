"""Sources of the configuration to examine: this command line, a running process, or a running shim's admin port."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from shim.cli.doctor.report import Finding, failed, warned
from shim.config import loader
from shim.config.loader import leaves, to_settings, value_at
from shim.config.settings import Settings
from shim.errors import ConfigError, Fault
from shim.redaction import MASK

PROC = Path("/proc")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Sources:
    """Sources of a configuration. The dialler also takes proxies from `environ`."""

    path: str | None
    sets: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    whose: str = ""

    def load(self) -> Settings:
        """Load the configuration. Raises `ConfigError`."""
        return loader.load(self.path, self.environ, self.sets)

    def describe(self) -> str:
        """Name the sources, not the values in them."""
        names = sorted(name for name in self.environ if loader.is_read(name))
        keys = sorted({item.partition("=")[0] for item in self.sets})
        parts = [self.path or "no file"]
        parts.append(f"environment: {_some(names)}" if names else "nothing in the environment")
        parts.append(f"command line: {_some(keys)}" if keys else "nothing on the command line")
        return f"{self.whose}{', '.join(parts)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def of_process(pid: int, proc: Path = PROC) -> Sources:
    """Return the sources of a running `agent-shim run`, and change to its directory: paths may be relative.

    Raises `ConfigError` if there is no such process, or access to it is denied.
    """
    home = proc / str(pid)
    try:
        words = [os.fsdecode(word) for word in (home / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = (os.fsdecode(item).partition("=") for item in (home / "environ").read_bytes().split(b"\0"))
        environ = {name: value for name, equals, value in pairs if equals}
        os.chdir(home / "cwd")
    except FileNotFoundError:
        raise ConfigError([Fault("--pid", f"there is no process {pid}")]) from None
    except PermissionError:
        raise ConfigError(
            [Fault("--pid", f"process {pid} may not be looked at: run doctor as root, or use --url")]
        ) from None
    except OSError as error:
        raise ConfigError([Fault("--pid", f"process {pid} cannot be looked at: {error.strerror}")]) from None
    # `agent-shim run` or `python -m shim run`; other programs have a subcommand of that name, too.
    at = words.index("run") if "run" in words else 0
    if not at or Path(words[at - 1]).name not in ("agent-shim", "shim"):
        raise ConfigError([Fault("--pid", f"process {pid} is no `agent-shim run`")])
    given = words[at + 1 :]
    paths = _values(given, "--config")
    path = paths[-1] if paths else None
    if path is not None:
        path = _in_its_root(home, path)
    return Sources(path, tuple(_values(given, "--set")), environ, f"process {pid}: ")


def _in_its_root(home: Path, path: str) -> str:
    """Return the path as seen from here: the process may run in a container."""
    try:
        same = (home / "root").samefile("/")
    except OSError:
        same = True
    return path if same else str(home / "root" / (Path(path).absolute().relative_to("/")))


def _values(words: list[str], option: str) -> list[str]:
    found = []
    for word, after in pairwise([*words, ""]):
        if word == option:
            found.append(after)
        elif word.startswith(f"{option}="):
            found.append(word.removeprefix(f"{option}="))
    return found


# --- the admin port ---------------------------------------------------------------------------------------------------


def of_running(masked: Mapping[str, Any]) -> Settings:
    """Return the settings that a running shim shows, without masked values. Raises `ConfigError`."""
    faults: list[Fault] = []
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in masked.items()}
    for section in tree.values():
        if isinstance(section, dict):
            for key in [key for key, value in section.items() if isinstance(value, str) and MASK in value]:
                # A masked query, password or user is cut out; a masked token is unknown.
                for hidden in (f"?{MASK}", f":{MASK}@", f"{MASK}@", MASK):
                    section[key] = section[key].replace(hidden, "@" if hidden.startswith(":") else "")
    settings = to_settings(tree, faults)
    if faults:
        raise ConfigError(faults)
    return settings


def compare(examined: Settings, masked: Mapping[str, Any]) -> list[Finding]:
    """Warn if the running shim has another configuration than the one that is examined."""
    ours = loader.redacted(examined)
    keys = [key for key, _, _ in leaves() if _differ(key, _at(ours, key), _at(masked, key))]
    if not keys:
        return []
    todo = "examine the running one: --pid PID (as root), or --url with its admin port and no --config"
    return [warned("sources", f"the running shim has other values than those examined: {_some(keys)}", todo)]


def _differ(key: str, examined: Any, running: Any) -> bool:
    """Port 0 is any free one: the running shim may well be examined with the port that it got."""
    return bool(examined != running) and not (key in ("listen.port", "admin.port") and running == 0)


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    found = value_at(tree, dotted)
    return list(found) if isinstance(found, tuple) else found


def unknown_token() -> Finding:
    """Return the reason why the token of a running shim was not examined."""
    todo = "--token-file FILE tests a token; --pid PID, as root, reads it from the process"
    return warned("token", "not examined: the admin port shows no secret", todo)


def unreadable(where: str) -> Finding:
    """Return the finding that the admin port does not show the configuration."""
    todo = "does it ask for the admin token (--admin-token-file)? An older shim does not show it: use --config or --pid"
    return failed("config", f"{where} does not show its configuration", todo)
