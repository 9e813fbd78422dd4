"""The listener's side of TLS: version, certificate, and a certificate that is replaced while connections stay."""

from __future__ import annotations

import logging
import ssl

from shim.config.file_watch import FileFingerprint, fingerprints
from shim.config.files import require_regular
from shim.config.settings import TlsFiles

logger = logging.getLogger(__name__)


class ServerTls:
    """Takes the certificate anew when its files have changed; what is in use stays when the new one cannot be used.

    The files are looked at when a client says hello, so that no task and no signal is needed; Kubernetes' swap of a
    symlink is a change like any other.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises `OSError` (`ssl.SSLError` included) when a file cannot be used."""
        self._files = files
        self._signature = self._look()
        self._current = self._build()
        # The context that the listener is given for good. A handshake that has begun with it goes on with the current
        # one: the callback comes with every hello, also with one that names no server.
        self.context = self._current
        self.context.sni_callback = self._on_hello

    def _look(self) -> tuple[FileFingerprint, ...]:
        """What tells the files from others; empty when one is missing."""
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
        # An encrypted key must not stop the process at a prompt.
        context.load_cert_chain(self._files.cert_file, self._files.key_file or None, password="")
        return context

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        signature = self._look()
        if signature != self._signature:
            self._signature = signature  # a faulty pair is tried and told of once
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
