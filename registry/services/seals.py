"""Seals: secrets that must be at hand, and so cannot be hashed, are kept encrypted under a key that the database lacks.

Fernet (AES-128-CBC with HMAC-SHA-256, by `cryptography`). Keys are given newest first: the first one seals, every one
opens, so a key is replaced by putting another before it, and dropped once everything was sealed anew.
"""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken


class Seals:
    """The keys of one process; without any, nothing is sealed."""

    def __init__(self, keys: Sequence[str]) -> None:
        """``keys``: 32 bytes each, as URL-safe base64; the settings have checked them."""
        self._keys = [Fernet(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def seal(self, secret: str) -> str:
        """``secret`` under the newest key."""
        return self._keys[0].encrypt(secret.encode()).decode()

    def open(self, sealed: str) -> tuple[str, bool] | None:
        """The secret, and whether the newest key sealed it; None when no key opens it."""
        for place, key in enumerate(self._keys):
            try:
                return key.decrypt(sealed.encode()).decode(), place == 0
            except InvalidToken:
                continue
        return None
