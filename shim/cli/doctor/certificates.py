"""Findings on the peer's certificate."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from shim.cli.doctor.report import Finding, passed, warned
from shim.clock import Clock

EXPIRES_SOON_S = 14 * 86_400.0


def certificate(check: str, tls: ssl.SSLObject, ca_file: str) -> Finding:
    """Describe a verified certificate: its issuer and its remaining validity."""
    found = tls.getpeercert() or {}
    expires = str(found.get("notAfter", ""))
    left_s = ssl.cert_time_to_seconds(expires) - Clock().wall_s() if expires else EXPIRES_SOON_S
    trusted = f"trusted by {ca_file}" if ca_file else "trusted"
    text = f"{tls.version()}, {trusted}, issued by {_issuer(found)}, expires in {left_s / 86_400:.0f} days"
    if left_s < EXPIRES_SOON_S:
        return warned(check, text, "have the certificate renewed, or expect the link to fail then")
    return passed(check, text)


def trust(why: str, host: str, url_key: str, ca_key: str) -> str:
    """Return a remedy for a certificate that is refused, or `""` if `why` is another TLS failure.

    `why` is OpenSSL's text; the keys are those of the configuration.
    """
    message = why.lower()
    if "expired" in message or "not yet valid" in message:
        return "the certificate must be renewed, unless the clock of this machine is wrong: see the line clock"
    if "mismatch" in message or "not valid for" in message:
        return f"the certificate is for other names: {url_key} must use one of them instead of {host}"
    if "certificate" in message and "alert" not in message:
        return f"a private authority or an inspecting proxy? put its certificate into {ca_key}"
    return ""


def _issuer(found: Mapping[str, object]) -> str:
    names = found.get("issuer")
    parts = {}
    if isinstance(names, tuple):
        parts = {pair[0]: pair[1] for group in names for pair in group}
    return str(parts.get("organizationName") or parts.get("commonName") or "?")
