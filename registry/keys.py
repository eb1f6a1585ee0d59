"""Keys that sign versions: elliptic curves P-256, P-384 and P-521 in PEM, as OpenSSF model signing takes them.

A private key never leaves the machine it was made on; the registry and the keys that people pin hold public ones. A
key's name is the SHA-256 of its public PEM, which is also the hint in a bundle.
"""

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from .core.errors import BadSignature, BadSigningKey, PassphraseNeeded
from .core.manifest import Manifest
from .core.signatures import Bundle, encoded, statement

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_ALLOWED = "expected an elliptic curve key (P-256, P-384 or P-521) in PEM"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What verifies."""

    pem: str
    key: ec.EllipticCurvePublicKey

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "PublicKey":
        """A public key in PEM, whatever its line ends; `BadSigningKey` names ``where`` it was read."""
        data = text.encode() if isinstance(text, str) else text
        if b"PRIVATE KEY" in data:
            raise BadSigningKey(path=where, reason="it is a private key, which nobody else may see; give its .pub")
        try:
            key = load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadSigningKey(path=where, reason=f"{_ALLOWED}; {error}"[:300]) from error
        return cls.of(key, where)

    @classmethod
    def of(cls, key: object, where: str) -> "PublicKey":
        """The key, if it is of an allowed curve."""
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise BadSigningKey(path=where, reason=_ALLOWED)
        return cls(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(), key)

    @property
    def fingerprint(self) -> str:
        """``sha256:…``"""
        return f"sha256:{hashlib.sha256(self.pem.encode()).hexdigest()}"

    def verify(self, bundle: Bundle, series: str, manifest: Manifest) -> None:
        """`BadSignature` unless this key signed just this version of ``series``."""
        if bundle.key != self.fingerprint:
            raise BadSignature(ref=series, reason=f"it is by key {bundle.key[:19]}, and not by {self.fingerprint[:19]}")
        bundle.require_of(series, manifest)
        try:
            self.key.verify(bundle.signature, encoded(bundle.payload), ec.ECDSA(_HASHES[self.key.curve.name]))
        except InvalidSignature as error:
            raise BadSignature(
                ref=series, reason=f"key {self.fingerprint[:19]} did not make it for these bytes"
            ) from error


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """What signs."""

    key: ec.EllipticCurvePrivateKey
    public: PublicKey

    @classmethod
    def generate(cls) -> "PrivateKey":
        """A new one, on P-256."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, PublicKey.of(key.public_key(), "a new key"))

    @classmethod
    def parse(cls, data: bytes, where: str, passphrase: str | None = None) -> "PrivateKey":
        """A private key in PEM; `PassphraseNeeded` when it is locked and there is none, `BadSigningKey`."""
        try:
            key = load_pem_private_key(data, passphrase.encode() if passphrase else None)
        except TypeError as error:
            if passphrase is None:
                raise PassphraseNeeded(path=where) from error
            return cls.parse(data, where)  # it is not locked
        except (ValueError, UnsupportedAlgorithm) as error:
            why = "the passphrase is wrong, or " if passphrase else ""
            raise BadSigningKey(path=where, reason=f"{why}{_ALLOWED}, private") from error
        public = PublicKey.of(key.public_key(), where)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, public)

    def pem(self, passphrase: str | None = None) -> str:
        """PKCS #8, locked where there is a passphrase."""
        lock = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock).decode()

    def sign(self, series: str, manifest: Manifest) -> Bundle:
        """The signature of this version of ``series``."""
        payload = statement(series, manifest)
        signature = self.key.sign(encoded(payload), ec.ECDSA(_HASHES[self.key.curve.name]))
        return Bundle(self.public.fingerprint, payload, signature)
