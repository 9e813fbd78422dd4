"""Reasons why a dial failed, in texts without secrets: aiohttp's own texts contain the URL with its token."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import aiohttp

from shim.errors import ShimError
from shim.ports import DialFailure

UNANSWERED = "the connection was closed before an answer came"
PROXY_UNREACHED = "cannot reach the proxy"


class DialError(ShimError):
    """A dial ended without the answer that was wanted. `failure` has the reason."""

    def __init__(self, failure: DialFailure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a `Retry-After` header (RFC 9110 §10.2.3), `None` if it is missing or malformed.

    A date is compared with the response's own `Date`, so that a wrong clock on either side does no harm.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        then = parsedate_to_datetime(value)
        now = parsedate_to_datetime(headers.get("Date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):  # TypeError: only one of the dates names a zone
        return None


def failure_of(error: Exception) -> DialFailure:
    """Classify an exception of a dial.

    Of an unexpected one only the type is reported, because its text may hold a secret.
    """
    if isinstance(error, DialError):
        return error.failure
    reason, detail = _classify(error)
    return DialFailure(reason, detail=detail)


def _classify(error: Exception) -> tuple[str, str]:
    match error:
        case TimeoutError():
            return "timeout", "no answer in time"
        case aiohttp.ClientHttpProxyError():
            return "proxy", f"the proxy answered HTTP {error.status}"
        case aiohttp.ClientProxyConnectionError():
            return "proxy", f"{PROXY_UNREACHED}: {_os_text(error.os_error)}"
        case aiohttp.ClientConnectorDNSError():
            return "dns", f"cannot resolve {error.host}: {_os_text(error.os_error)}"
        case aiohttp.ClientConnectorCertificateError():
            return "tls", tls_text(error.certificate_error)
        case aiohttp.ClientConnectorSSLError():
            return "tls", tls_text(error.os_error)
        case aiohttp.ClientConnectorError():
            return "tcp", _os_text(error.os_error)
    return "handshake", _answer_text(error)


def _answer_text(error: Exception) -> str:
    """Return a description of a malformed or missing reply."""
    match error:
        case aiohttp.WSServerHandshakeError():
            return error.message
        case aiohttp.ClientResponseError():  # only the parser raises this: no status is treated as an error
            return "the answer is no HTTP, or its head is too large"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | aiohttp.ClientOSError():
            return "the connection was closed before the answer was complete"
    return type(error).__name__


def _os_text(error: OSError) -> str:
    # asyncio puts a text of its own with the address into strerror, so the number is translated again. Errors of the
    # resolver have negative numbers, which `os.strerror` does not know.
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or type(error).__name__


def tls_text(error: Exception) -> str:
    """Return OpenSSL's description of an error, without its location in OpenSSL's source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, str) and reason else type(error).__name__
