"""The credentials file of a NATS user: its JWT and the seed that signs the server's nonce."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = re.compile(r"-{3,}BEGIN [A-Z ]+-{3,}\s+(\S+)\s+-{3,}END [A-Z ]+-{3,}")
_SEED_OF_A_USER = ((18 << 3) | (20 << 3) >> 5, ((20 << 3) & 31) << 3)
_SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class Credentials:
    jwt: str = field(repr=False)
    seed: bytes = field(repr=False)

    def sign(self, nonce: str) -> bytes:
        """The signature of the nonce, as the server wants it."""
        from nacl.signing import SigningKey  # noqa: PLC0415 - only who has a credentials file pays for it

        return base64.b64encode(SigningKey(self.seed).sign(nonce.encode()).signature)


def read_credentials(path: str) -> Credentials:
    """Raises `OSError`, and `ValueError` (without any of the content) for a file that is none."""
    blocks = _BLOCK.findall(Path(path).read_text(encoding="ascii", errors="replace"))
    if len(blocks) != 2:
        raise ValueError("the file does not hold a JWT and a seed")
    jwt, seed = blocks
    try:
        raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
    except binascii.Error:
        raise ValueError("the seed cannot be read") from None
    body, checksum = raw[:-2], int.from_bytes(raw[-2:], "little")
    if len(body) != 2 + _SEED_BYTES or tuple(body[:2]) != _SEED_OF_A_USER or binascii.crc_hqx(body, 0) != checksum:
        raise ValueError("the seed is not one of a user")
    return Credentials(jwt, body[2:])
