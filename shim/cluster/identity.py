"""Certificate of a replica, made at start-up. Others verify it by the fingerprint in the member's row."""

from __future__ import annotations

import hashlib
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LASTS = timedelta(days=3650)
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a file that only we may read, for the moment in which it is loaded


def fingerprint_of(certificate: bytes) -> str:
    """Return the fingerprint of a certificate (DER)."""
    return hashlib.sha256(certificate).hexdigest()


def make_identity(wall_s: float) -> tuple[ssl.SSLContext, str]:
    """Make a key and a certificate. Return a server's TLS context that uses them, and the fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent-shim replica")])
    now = datetime.fromtimestamp(wall_s, UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LASTS)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _load(context, certificate.public_bytes(serialization.Encoding.PEM) + private)
    return context, fingerprint_of(certificate.public_bytes(serialization.Encoding.DER))


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Load a certificate with its key by a temporary file: `ssl` needs one. Shared memory works on a read-only root."""
    folder = SHARED_MEMORY if Path(SHARED_MEMORY).is_dir() else None
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
