"""Make the client side's TLS context: version, trust, client certificate.

Rules: docs/reference/protocol.md#2-upstream-side-the-websocket.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from shim.filemarks import Mark, marks
from shim.regular_files import require_regular
from shim.settings import DialSettings


class ClientTls:
    """Makes the TLS context of the next dial, and a new one when one of its files has changed."""

    def __init__(self, settings: DialSettings) -> None:
        self._settings = settings
        names = (settings.ca_file, settings.client_cert_file, settings.client_key_file)
        self._files = [Path(name) for name in names if name]
        self._context: ssl.SSLContext | None = None
        self._signature: tuple[Mark, ...] = ()

    def context(self) -> ssl.SSLContext:
        """Return the context. Raises `OSError` (`ssl.SSLError` included) when a file cannot be used."""
        signature = marks(self._files)
        if self._context is None or signature != self._signature:
            self._context = self._build()
            self._signature = signature
        return self._context

    def _build(self) -> ssl.SSLContext:
        settings = self._settings
        for path in self._files:
            require_regular(path)
        # With a CA file of its own the upstream is trusted by that alone, not by every public authority, too.
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.client_cert_file:
            # An encrypted key must not stop the process at a prompt.
            context.load_cert_chain(settings.client_cert_file, settings.client_key_file or None, password="")
        if settings.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
