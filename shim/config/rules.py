"""Rules for values beyond their types: bounds, formats, and keys that depend on each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from shim.config.settings import Fallback, Section, Settings, Store, Sunset, Upstream
from shim.errors import Fault
from shim.hosts import is_loopback, is_this_machine, plain_host

_PORT = (0, 65_535)
_COUNT = (1, 1_000_000)
_BYTES = (1024, 1 << 30)
_LONG_S = 315_360_000  # ten years
_WAIT_S = (0.001, 3600)
_KEPT_S = (1, _LONG_S)

# Lowest and highest allowed value of every key that is a number.
BOUNDS: dict[str, tuple[float, float]] = {
    "listen.port": _PORT,
    "listen.max_body_bytes": _BYTES,
    "listen.max_status_body_bytes": _BYTES,
    "listen.max_connections": _COUNT,
    "listen.max_in_flight_per_session": _COUNT,
    "listen.header_timeout_s": _WAIT_S,
    "listen.body_timeout_s": _WAIT_S,
    "listen.keepalive_s": _WAIT_S,
    "admin.port": _PORT,
    "upstream.max_links": _COUNT,
    "upstream.connect_timeout_s": _WAIT_S,
    "upstream.ping_interval_s": _WAIT_S,
    "upstream.read_timeout_s": _WAIT_S,
    "upstream.heartbeat_interval_s": _WAIT_S,
    "upstream.idle_close_s": (0, _LONG_S),
    "upstream.reconnect.initial_s": _WAIT_S,
    "upstream.reconnect.max_s": _WAIT_S,
    "upstream.reconnect.refused_max_s": _WAIT_S,
    "upstream.reconnect.stable_after_s": (0, 3600),
    "upstream.max_message_bytes": _BYTES,
    "upstream.max_send_bytes": _BYTES,
    # Agents time out after 30 s, both for a register (docs/reference/legacy-agents.md#11-register) and for a poll
    # (docs/reference/protocol.md#13-poll).
    "register.deadline_s": (0.1, 29),
    "poll.hold": (0, 25),
    "poll.max_hold_s": (0.1, 25),
    "poll.max_batch": _COUNT,
    "poll.max_bytes": _BYTES,
    "poll.frequency_s": (1, 3600),
    "commands.ttl_s": _KEPT_S,
    "commands.retain_s": _KEPT_S,
    "commands.dedupe_s": (0, _LONG_S),
    "commands.evidence_s": (0.1, _LONG_S),
    "commands.max_attempts": _COUNT,
    "commands.max_queued": _COUNT,
    "commands.max_queued_bytes": _BYTES,
    "sessions.retain_s": _KEPT_S,
    "sessions.max_per_owner": _COUNT,
    "cluster.port": _PORT,
    "cluster.lease_s": (1, 600),
    "fallback.after_s": (0, _LONG_S),
    "fallback.hold_down_s": (0, _LONG_S),
    "rollout.percent": (0, 100),
}

_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not bound
_ADVERTISED = re.compile(r"(?:[A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)
HOST = re.compile(r"[A-Za-z0-9_.:\-]+", re.ASCII)
PATH = re.compile(r"(?:/[^?#\s]*)?")
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)  # names of query parameters with secrets
DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d))?", re.ASCII)


def parse_date_s(text: str) -> float:
    """Return the Unix seconds of an RFC 3339 time, or of the begin (UTC) of a date. Raises `ValueError`."""
    if not DATE.fullmatch(text):
        raise ValueError("neither RFC 3339 nor a date")
    moment = datetime.fromisoformat(text.upper())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def is_past(sunset: Sunset, wall_unix: float) -> bool:
    """Return True after the configured end of the vendor's HTTP API: then no call goes there, whatever the mode is."""
    return bool(sunset.at) and wall_unix >= parse_date_s(sunset.at)


def cross_field_faults(settings: Settings, broken: frozenset[str]) -> list[Fault]:
    """Return all faults of settings whose values have the right types. Keys in `broken` have a fault already.

    A rule that reads a broken key is skipped: it would check the default that replaces the broken value.
    """
    checks = _Checks(settings, broken)
    checks.numbers_and_texts()
    checks.listeners()
    checks.upstream()
    checks.times()
    checks.queue_and_store()
    checks.modes()
    checks.notifications_and_traces()
    return checks.faults


class _Checks:
    def __init__(self, settings: Settings, broken: frozenset[str]) -> None:
        self.settings = settings
        self.faults: list[Fault] = []
        self._broken = set(broken)

    def _require(self, fulfilled: bool, message: str, path: str, *read: str) -> bool:
        """Report `message` under `path` unless `fulfilled`. `read` are the other keys that the rule reads."""
        if fulfilled or not self._broken.isdisjoint((path, *read)):
            return fulfilled
        self.faults.append(Fault(path, message))
        return False

    def numbers_and_texts(self) -> None:
        """Check the bounds of numbers and the characters of texts."""
        for path, value in _values(self.settings):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                low, high = BOUNDS[path]
                if not self._require(low <= value <= high, f"must be from {low} to {high}", path):
                    self._broken.add(path)
            elif not all(text.isprintable() for text in _texts(value)):
                self._require(False, "must not contain line breaks or other control characters", path)
                self._broken.add(path)

    def listeners(self) -> None:
        """Check addresses, ports, host names and certificates of the listeners."""
        listen, admin = self.settings.listen, self.settings.admin
        for path, hosts in (("listen.host", listen.hosts), ("admin.host", admin.hosts)):
            is_host = bool(hosts) and all(map(HOST.fullmatch, hosts))
            self._require(is_host, "must be a host name or an address, or a list of them", path)
        self._require(
            listen.auth != "off" or listen.on_loopback,
            "must not be off while listen.host is reachable from other machines",
            "listen.auth",
            "listen.host",
        )
        self._require(
            listen.port == 0 or listen.port != admin.port or set(listen.hosts).isdisjoint(admin.hosts),
            "must differ from listen.port",
            "admin.port",
            *("admin.host", "listen.host", "listen.port"),
        )
        self._require(
            _is_path(listen.base_path), "must be empty or start with / and have no ? or #", "listen.base_path"
        )
        if self.settings.store.url:
            self._cluster()
        names = {"listen.allowed_hosts": listen.allowed_hosts, "admin.allowed_hosts": admin.allowed_hosts}
        for path, hosts in names.items():
            self._require(all(map(HOST.fullmatch, hosts)), "must be host names or addresses", path)
        self._pair(listen.tls.cert_file, listen.tls.key_file, "listen.tls.cert_file", "listen.tls.key_file")

    def _cluster(self) -> None:
        """Check the internal listener, which is used with a PostgreSQL store only."""
        cluster, listen, admin = self.settings.cluster, self.settings.listen, self.settings.admin
        self._require(bool(HOST.fullmatch(cluster.host)), "must be a host name or an address", "cluster.host")
        for path, port in (("listen.port", listen.port), ("admin.port", admin.port)):
            self._require(cluster.port != (port or -1), f"must differ from {path}", "cluster.port", path)
        self._require(
            bool(cluster.advertise) or cluster.host not in _EVERY_ADDRESS,
            "must be set while cluster.host is every address: it is where other replicas reach this one",
            "cluster.advertise",
            "cluster.host",
        )
        self._require(
            not cluster.advertise or bool(_ADVERTISED.fullmatch(cluster.advertise)),
            "must be a host name or an address, with or without a port (an IPv6 address in brackets)",
            "cluster.advertise",
        )

    def upstream(self) -> None:
        """Check the URL, the path, the token and the dialling of the link."""
        upstream = self.settings.upstream
        self._url("upstream.url", upstream.url, ("https", "wss"), ("http", "ws"))
        self._require(_is_path(upstream.path), "must be empty or start with / and have no ? or #", "upstream.path")
        self._require(
            not (upstream.token and upstream.token_file),
            "must be empty while upstream.token is set",
            "upstream.token_file",
            "upstream.token",
        )
        self._require(
            not upstream.token or bool(_TOKEN.fullmatch(upstream.token)),
            "must be one word of printable ASCII",
            "upstream.token",
        )
        self._dialling("upstream", upstream)
        hosts = upstream.gateway_hosts
        self._require(all(map(HOST.fullmatch, hosts)), "must be host names or addresses", "upstream.gateway_hosts")

    def times(self) -> None:
        """Check the order of times: timeouts, delays, holds and the dates of the sunset."""
        upstream, poll, sunset = self.settings.upstream, self.settings.poll, self.settings.sunset
        self._at_least("upstream.read_timeout_s", upstream.read_timeout_s, "upstream.ping_interval_s", more=True)
        self._at_least("upstream.reconnect.max_s", upstream.reconnect.max_s, "upstream.reconnect.initial_s")
        refused = upstream.reconnect.refused_max_s
        self._at_least("upstream.reconnect.refused_max_s", refused, "upstream.reconnect.initial_s")
        if isinstance(poll.hold, float):
            self._require(
                poll.hold <= poll.max_hold_s, "must not exceed poll.max_hold_s", "poll.hold", "poll.max_hold_s"
            )
        start_s = self._date("sunset.deprecation_at", sunset.deprecation_at)
        end_s = self._date("sunset.at", sunset.at)
        if start_s is not None and end_s is not None:
            # RFC 9745 §4
            message = "must not be earlier than sunset.deprecation_at"
            self._require(start_s <= end_s, message, "sunset.at", "sunset.deprecation_at")
        link = _split(sunset.link)
        fits = link is not None and link.scheme in ("http", "https") and not re.search(r'[\s<>"]', sunset.link)
        self._require(not sunset.link or fits, "must be a URL http:// or https://", "sunset.link")

    def queue_and_store(self) -> None:
        """Check the types of commands and the store's path, certificate and URL."""
        commands, store = self.settings.commands, self.settings.store
        self._require(bool(commands.types), "must name at least one type", "commands.types")
        for path, names in (("commands.types", commands.types), ("commands.at_most_once", commands.at_most_once)):
            self._require(all(names), "must not contain an empty text", path)
        self._require(bool(store.path), "must not be empty", "store.path")
        self._pair(store.client_cert_file, store.client_key_file, "store.client_cert_file", "store.client_key_file")
        if store.url:
            self._database(store)

    def _database(self, store: Store) -> None:
        """Check what can be checked of a PostgreSQL URL without the driver, which is an optional dependency."""
        try:
            parts = urlsplit(store.url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("postgresql", "postgres") or re.search(r"\s", store.url):
            self._require(False, "must be postgresql://user@host:port/database, several hosts with commas", "store.url")
            return
        query = dict(parse_qsl(parts.query))
        named = len(parts.path) > 1 or bool(query.get("dbname"))
        self._require(named, "must name a database: postgresql://user@host/DATABASE", "store.url")
        addresses = parts.netloc.rpartition("@")[2].split(",")
        ports = [found[1] for each in addresses if (found := re.search(r":([^:\]]*)\Z", each)) and found[1]]
        if not all(port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16 for port in ports):
            self._require(False, "must have a port from 1 to 65535: postgresql://user@host:5432/database", "store.url")
            return
        hosts = [re.sub(r":\d*$", "", each) for each in addresses]
        for key in ("host", "hostaddr"):
            hosts += query.get(key, "").split(",")
        local = all(map(is_this_machine, hosts)) and not query.get("service")  # a service's host is in a file
        verified = query.get("sslmode", "verify-full") == "verify-full"
        message = "must leave sslmode at verify-full off this machine, unless store.allow_insecure is true"
        self._require(local or verified or store.allow_insecure, message, "store.url", "store.allow_insecure")

    def modes(self) -> None:
        """Check the HTTP fallback and the rollout."""
        settings, fallback = self.settings, self.settings.fallback
        if fallback.url:
            self._url("fallback.url", fallback.url, ("https",), ("http",))
        self._dialling("fallback", fallback)
        for key in ("include", "exclude"):
            patterns = getattr(settings.rollout, key)
            self._require(all(patterns), "must not hold an empty name: it matches no agent", f"rollout.{key}")
        self._require(
            not (fallback.use_upstream_token and settings.upstream.own_tokens),
            "needs upstream.token or upstream.token_file",
            "fallback.use_upstream_token",
            *("upstream.token", "upstream.token_file"),
        )

    def notifications_and_traces(self) -> None:
        """Check the webhook and the collector of traces."""
        notify = self.settings.notify
        parts = _split(notify.url)
        fits = parts is not None and parts.scheme in ("http", "https")
        self._require(not notify.url or fits, "must be a URL http:// or https://", "notify.url")
        both = notify.url and notify.url_file
        self._require(not both, "must be empty while notify.url is set", "notify.url_file", "notify.url")
        self._proxy("notify", notify.proxy)
        otlp_url = self.settings.telemetry.otlp_url
        parts = _split(otlp_url)
        fits = parts is not None and parts.scheme in ("http", "https") and "@" not in parts.netloc
        message = "must be a URL http:// or https:// without user name; OTEL_EXPORTER_OTLP_HEADERS takes credentials"
        self._require(not otlp_url or fits, message, "telemetry.otlp_url")

    def _dialling(self, section: str, given: Upstream | Fallback) -> None:
        """Check the keys for opening connections, which are the same in both sections."""
        client = (given.client_cert_file, given.client_key_file)
        self._pair(*client, f"{section}.client_cert_file", f"{section}.client_key_file")
        self._proxy(section, given.proxy)

    def _proxy(self, section: str, url: str) -> None:
        parts = _split(url)
        self._require(
            not url or (parts is not None and parts.scheme in ("http", "https")),
            "must be a URL http://host:port or https://host:port",
            f"{section}.proxy",
        )

    def _pair(self, cert: str, key: str, cert_path: str, key_path: str) -> None:
        """Check that a certificate and its key are both set or both empty.

        The fault is reported under the missing one.
        """
        self._require(bool(key) or not cert, f"must be set with {cert_path}", key_path, cert_path)
        self._require(bool(cert) or not key, f"must be set with {key_path}", cert_path, key_path)

    def _at_least(self, path: str, value: float, other: str, *, more: bool = False) -> None:
        bound = dict(_values(self.settings))[other]
        word = "more than" if more else "at least"
        self._require(value > bound or (value == bound and not more), f"must be {word} {other}", path, other)

    def _url(self, path: str, url: str, secure: tuple[str, ...], plain: tuple[str, ...]) -> None:
        """Check a URL to which tokens are sent."""
        parts = _split(url)
        or_words = " or ".join(f"{scheme}://" for scheme in secure)
        schemes = ", ".join(f"{scheme}://" for scheme in (*secure, *plain))
        if parts is None or parts.scheme not in (*secure, *plain):
            self._require(False, f"must be a URL with a host, starting with one of {schemes}", path)
            return
        self._require("@" not in parts.netloc, "must not contain user name or password", path)
        self._require(
            not any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)),
            "must not contain a token: put it into the file that upstream.token_file names, or into upstream.token",
            path,
        )
        self._require(not parts.fragment, "must not contain #", path)
        self._require(
            parts.scheme in secure or is_loopback(parts.hostname or "") or self.settings.upstream.allow_insecure,
            f"must be {or_words} unless its host is loopback or upstream.allow_insecure is true",
            path,
            "upstream.allow_insecure",
        )
        # An operator may set the shim's address in the vendor's Secret, which the shim reads too, instead of in the
        # agent's variable. The shim would then call itself.
        listen = self.settings.listen
        port = parts.port or (443 if parts.scheme in ("https", "wss") else 80)
        self._require(
            port != listen.port or not (is_loopback(parts.hostname or "") or parts.hostname in listen.hosts),
            "is the shim's own address, where agents call: set the vendor's",
            path,
            *("listen.host", "listen.port"),
        )

    def _date(self, path: str, text: str) -> float | None:
        try:
            return parse_date_s(text) if text else None
        except ValueError:
            self._require(False, "must be a date (2026-01-31) or an RFC 3339 time (2026-01-31T12:00:00Z)", path)
            return None


def _values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value: the value itself, or those of a list or of a map's keys and values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value
        yield from value.values()


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL with a host and, if given, a valid port; `None` for anything else."""
    try:
        parts = urlsplit(url)
        well_formed = parts.port != 0 and bool(HOST.fullmatch(plain_host(parts.hostname or "")))
    except ValueError:
        return None
    return parts if well_formed and not re.search(r"\s", url) else None


def _is_path(path: str) -> bool:
    return bool(PATH.fullmatch(path))
