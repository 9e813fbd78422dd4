"""TLS context of the client side: version, trust, client certificate.

Rules: docs/reference/protocol.md#2-upstream-side-the-websocket.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from shim.config.file_watch import FileFingerprint, fingerprints
from shim.config.files import read_regular, reason
from shim.config.settings import DialSettings
from shim.ports import DialFailure
from shim.upstream.dial_errors import DialError, tls_text

_MAX_FILE_BYTES = 4_194_304  # the system's certificate bundle has 0.2 MB


class ClientTls:
    """The TLS context for dials, created anew when one of its files has changed."""

    def __init__(self, settings: DialSettings) -> None:
        self._settings = settings
        names = ("ca_file", "client_cert_file", "client_key_file")
        self._files = {name: Path(path) for name in names if (path := getattr(settings, name))}
        self._context: ssl.SSLContext | None = None
        self._signature: tuple[FileFingerprint, ...] = ()

    def context(self) -> ssl.SSLContext:
        """Return the context. Raises `DialError`, whose text names the key of an unusable file."""
        try:
            signature = fingerprints(self._files.values())
        except OSError:
            signature = ()  # `_build` reports the missing file
        if self._context is None or signature != self._signature or len(signature) < len(self._files):
            self._context = self._build()
            self._signature = signature
        return self._context

    def _build(self) -> ssl.SSLContext:
        settings = self._settings
        for name, path in self._files.items():
            try:
                read_regular(path, _MAX_FILE_BYTES)
            except (OSError, ValueError) as error:
                raise self._unusable(reason(error), name) from None
        try:
            # With a CA file only its authorities are trusted, and no public ones.
            context = ssl.create_default_context(cafile=settings.ca_file or None)
        except OSError as error:
            raise self._unusable(f"no PEM file of certificates ({tls_text(error)})", "ca_file") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.client_cert_file:
            try:
                # With an empty password an encrypted key is an error. Otherwise OpenSSL would prompt for one and block.
                context.load_cert_chain(settings.client_cert_file, settings.client_key_file or None, password="")
            except OSError as error:
                text = f"no PEM certificate and key that fit each other ({tls_text(error)})"
                raise self._unusable(text, "client_cert_file", "client_key_file") from None
        if settings.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _unusable(self, why: str, *names: str) -> DialError:
        keys = ", ".join(self._settings.key(name) for name in names)
        return DialError(DialFailure("tls", detail=f"{keys}: {why}"))
