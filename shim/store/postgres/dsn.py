"""Connection parameters derived from `store.*`: hosts, TLS, password, settings of the session."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shim.config import loader, settings
from shim.errors import ConfigError, Fault
from shim.hosts import is_this_machine

SCHEMA = "agent_shim"
# The kernel closes a connection whose peer has vanished. If idle, after 5 s of silence and three probes a second apart;
# with unacknowledged data, after 8 s.
_NETWORK = {
    "connect_timeout": "4",
    "keepalives_idle": "5",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "8000",
}


def application(process: str, shard: int | None = None) -> str:
    """Return the `application_name` of a connection: the process, and the shard if it serves one."""
    return f"agent-shim {process}" if shard is None else f"agent-shim {process} {shard}"


def conninfo(configured: settings.Store, name: str, **options: str) -> str:
    """Return the connection string for psycopg. `options` are settings of the session.

    The password file is read at each call, so that the next connection uses a rotated password. Raises `ConfigError`.
    """
    given = _parse(configured.url)
    parameters: dict[str, Any] = _NETWORK | given
    if configured.password_file:
        parameters["password"] = loader.read_secret(configured.password_file, "store.password_file")
    if not configured.allow_insecure and not _on_this_machine(given):
        parameters["sslmode"] = "verify-full"
    elif configured.ca_file:
        parameters.setdefault("sslmode", "verify-full")
    if str(parameters.get("sslmode", "")).startswith("verify"):
        parameters["sslrootcert"] = configured.ca_file or given.get("sslrootcert") or _authorities()
    if configured.client_cert_file:
        parameters |= {"sslcert": configured.client_cert_file, "sslkey": configured.client_key_file}
    session = {"search_path": SCHEMA, **options}
    parameters |= {
        "application_name": name,
        "client_encoding": "UTF8",
        "target_session_attrs": "read-write",
        "options": " ".join(f"-c {key}={value}" for key, value in session.items()),
    }
    return make_conninfo("", **parameters)


def _parse(url: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(url))
    except psycopg.Error:
        # Do not pass on the driver's message: it repeats a part of the URL, possibly the password.
        message = "is no PostgreSQL URL: a parameter is unknown, or a % is out of place"
        raise ConfigError([Fault("store.url", message)]) from None


def _on_this_machine(given: Mapping[str, Any]) -> bool:
    """Return True if the database is certainly on this machine.

    What the URL does not have comes from the environment, and a service's host from a file.
    """
    found = {key: str(given.get(key) or os.environ.get(f"PG{key.upper()}", "")) for key in ("host", "hostaddr")}
    service = given.get("service") or os.environ.get("PGSERVICE")
    return not service and all(is_this_machine(host) for hosts in found.values() for host in hosts.split(","))


def _authorities() -> str:
    """Return the path of the system's CA bundle. The OpenSSL that the driver bundles does not know it."""
    found = ssl.get_default_verify_paths().cafile or ""
    for path in (found, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"):
        if path and Path(path).exists():
            return path
    return "system"
