"""TLS of the agent listener: protocol version, and a certificate that is reloaded without a restart."""

from __future__ import annotations

import logging
import ssl

from shim.config.file_watch import FileFingerprint, fingerprints
from shim.config.files import require_regular
from shim.config.settings import TlsFiles

logger = logging.getLogger(__name__)


class ServerTls:
    """The TLS context of the listener, rebuilt when the certificate files change.

    If the new files cannot be used, the previous certificate stays in use. The files are checked at each client hello,
    so neither a task nor a signal is needed. Kubernetes replaces them by changing a symlink, which is detected as well.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Load the certificate. Raises `OSError`, which includes `ssl.SSLError`, if a file cannot be used."""
        self._files = files
        self._signature = self._look()
        self._current = self._build()
        # The listener keeps this first context. Each handshake starts with it and switches to the current one in the
        # callback, which OpenSSL calls for every client hello, even if the hello names no server.
        self.context = self._current
        self.context.sni_callback = self._on_hello

    def _look(self) -> tuple[FileFingerprint, ...]:
        """Return the fingerprints of the certificate files, or an empty tuple if one is missing."""
        names = (self._files.cert_file, self._files.key_file)
        try:
            return fingerprints(name for name in names if name)
        except OSError:
            return ()

    def _build(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for name in filter(None, (self._files.cert_file, self._files.key_file)):
            require_regular(name)
        # With a password given, an encrypted key raises an error. Otherwise OpenSSL would wait at a password prompt.
        context.load_cert_chain(self._files.cert_file, self._files.key_file or None, password="")
        return context

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        signature = self._look()
        if signature != self._signature:
            self._signature = signature  # remembered before loading: a faulty pair is loaded and logged only once
            self._replace()
        if self._current is not context:
            connection.context = self._current

    def _replace(self) -> None:
        try:
            self._current = self._build()
        except OSError as error:
            logger.error("the new certificate of listen.tls cannot be used, the old one stays: %s", _reason(error))
        else:
            logger.info("the certificate of listen.tls was replaced")


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__
