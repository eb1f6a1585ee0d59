"""What a signature of a version says, and the file it lies in: OpenSSF model signing's format, over a version's digest.

    statement = in-toto Statement v1 {subject: series, sha256(file digests in order); predicate: files, version digest}
    signed    = "DSSEv1" SP len(type) SP type SP len(statement) SP statement      (DSSE's pre-authentication encoding)
    bundle    = sigstore bundle v0.3 {hint of the public key, DSSE envelope of statement and signature}

The format is that of the `model-signing` library (predicate v1.0), whose verifier checks such a bundle against a folder
of files. What it ignores is our one addition, ``predicate.loractl.version``: the version's digest, which also covers
the base, the configuration and the lineage. A series and a manifest have one statement, byte for byte, so nothing that
was signed is ever interpreted: it is written again, and compared (docs/adr/0022).
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from .digest import Digest
from .errors import BadDigest, BadSignature
from .manifest import Manifest, canonical_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
BESIDE = ".loractl"
"""The folder, beside a version's files, that holds its manifest and signatures; no file of the version."""
MAX_BUNDLE_BYTES = 4 << 20
MAX_SIGNATURES = 16
"""That come with one push."""


def statement(series: str, manifest: Manifest) -> bytes:
    """The bytes that a signature of this version of ``series`` (``team/bot``) is over."""
    resources = [
        {"name": entry.path, "algorithm": "sha256", "digest": Digest.parse(entry.digest).hex}
        for entry in manifest.files
    ]
    root = Digest.sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources))
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [BESIDE]}
    return canonical_json({
        "_type": STATEMENT_TYPE,
        "subject": [{"name": series, "digest": {"sha256": root.hex}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": serialization,
            "resources": resources,
            "loractl": {"version": str(manifest.digest)},
        },
    })  # fmt: skip


def encoded(payload: bytes) -> bytes:
    """What a key signs: DSSE's pre-authentication encoding of a statement."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


@dataclass(frozen=True, slots=True)
class Bundle:
    """One signature with what it is over; whether it holds is for who has the key and the manifest."""

    key: str
    """``sha256:…`` of the public key's PEM."""
    payload: bytes
    signature: bytes

    @classmethod
    def parse(cls, document: object, series: str) -> "Bundle":
        """The bundle in its JSON; `BadSignature` says what it is not."""
        try:
            found = _Reader(document)
            if found.text("mediaType") != BUNDLE_TYPE:
                raise ValueError(f"mediaType is not '{BUNDLE_TYPE}'")
            hint = found.text("verificationMaterial", "publicKey", "hint")
            key = Digest.parse(f"sha256:{hint}")
            if found.text("dsseEnvelope", "payloadType") != PAYLOAD_TYPE:
                raise ValueError(f"payloadType is not '{PAYLOAD_TYPE}'")
            payload = found.binary("dsseEnvelope", "payload")
            if len(found.at("dsseEnvelope", "signatures")) != 1:
                raise ValueError("one bundle holds one signature")
            return cls(str(key), payload, found.binary("dsseEnvelope", "signatures", 0, "sig"))
        except (KeyError, IndexError, TypeError, ValueError, BadDigest, BadSignature) as error:
            raise BadSignature(ref=series, reason=f"it is no bundle of one DSSE signature by a key: {error}") from error

    def document(self) -> dict[str, Any]:
        """The bundle as JSON."""
        return {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": self.key.removeprefix("sha256:")},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(self.payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(self.signature).decode(), "keyid": ""}],
            },
        }

    def require_of(self, series: str, manifest: Manifest) -> None:
        """`BadSignature` when it is over anything but this version of this series."""
        if self.payload != statement(series, manifest):
            raise BadSignature(ref=series, reason=self._other(series, str(manifest.digest)))

    @property
    def series(self) -> str | None:
        """The series that it claims to be of."""
        try:
            return _Reader(json.loads(self.payload)).text("subject", 0, "name")
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def _other(self, series: str, digest: str) -> str:
        try:
            said = _Reader(json.loads(self.payload)).text("predicate", "loractl", "version")
        except (KeyError, IndexError, TypeError, ValueError):
            said = None
        if self.series not in (None, series):
            return f"it is of '{str(self.series)[:130]}'"
        if said is None:
            return "it names no version: it was not made by loractl"
        return f"it is of {said[:80]}, and this is {digest}" if said != digest else "it lists other files"


class _Reader:
    """Values inside JSON of others; whatever is not as expected is a ValueError or its kin."""

    def __init__(self, document: object) -> None:
        self.document = document

    def at(self, *path: str | int) -> Any:
        """What lies there."""
        found: Any = self.document
        for step in path:
            found = found[step]
        return found

    def text(self, *path: str | int) -> str:
        """Text."""
        if not isinstance(found := self.at(*path), str):
            raise TypeError(f"{path[-1]} is no text")
        return found

    def binary(self, *path: str | int) -> bytes:
        """Base64 of bytes."""
        try:
            return base64.b64decode(self.text(*path), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{path[-1]} is not base64") from error
