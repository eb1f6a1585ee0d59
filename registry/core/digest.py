"""Digests as values: ``sha256:<hex>`` names stored blobs, ``b3:<hex>`` names base models.

Two hashes, each where it belongs (docs/adr/0003-two-hashes.md): SHA-256 because object stores check
it themselves, BLAKE3 because hashing a base model is what people wait for.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Literal, Self

from .errors import BadDigest

Algorithm = Literal["sha256", "b3"]
_FORM = re.compile(r"(sha256|b3):([0-9a-f]{64})")
_BEGINNING = re.compile(r"(sha256|b3):([0-9a-f]{8,63})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A 256-bit content digest and the algorithm that made it."""

    algorithm: Algorithm
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """``sha256:…`` or ``b3:…`` as a digest; `BadDigest` for anything else."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise BadDigest(value=text[:100])
        return cls(match[1], match[2])  # type: ignore[arg-type]  # the pattern allows only the two

    @classmethod
    def sha256(cls, data: bytes) -> Self:
        """The SHA-256 of ``data``."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    @classmethod
    def of_raw(cls, algorithm: Algorithm, raw: bytes) -> Self:
        """A digest from its 32 raw bytes."""
        return cls(algorithm, raw.hex())

    @property
    def raw(self) -> bytes:
        """The 32 bytes."""
        return bytes.fromhex(self.hex)

    @property
    def base64(self) -> str:
        """As S3 spells checksums."""
        return base64.b64encode(self.raw).decode("ascii")

    @property
    def short(self) -> str:
        """For people: the algorithm and twelve digits."""
        return f"{self.algorithm}:{self.hex[:12]}"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True)
class Beginning:
    """A digest by its first digits, as tables show it; it names what begins so, where that is one thing."""

    algorithm: Algorithm
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def named(text: str) -> Digest | Beginning:
    """What people type for a digest: all of it, or its first digits, 8 at least; `BadDigest` for anything else."""
    match = _BEGINNING.fullmatch(text)
    return Beginning(match[1], match[2]) if match else Digest.parse(text)  # type: ignore[arg-type]  # one of the two
