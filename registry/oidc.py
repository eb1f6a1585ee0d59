"""Sign-in by OpenID Connect: a provider's signed token becomes a person with scopes, by a table in the settings.

Checked are signature (the provider's published keys), issuer, audience and times; keys are remembered for an hour and
asked for again, once a minute at most, when a token names one that is not known. So a provider may be away for a
while, and may renew its keys at any time. JOSE itself is joserfc's.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from .core.errors import ProviderDown, TokenRefused
from .core.manifest import check_json
from .schemas import SCOPES
from .settings import BadSetting, OidcSettings

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"]
"""Signatures by a key that only the provider has; none that a key which everybody reads could make."""
LEEWAY_S = 30
FRESH_S, PAUSE_S = 3600.0, 60.0
ANYBODY = "*"


@dataclass(frozen=True, slots=True)
class Person:
    """Whom a provider vouches for, and what the table gives them here."""

    id: str
    """The same for one subject of one issuer, and in the form of a token's public part."""
    name: str
    scopes: dict[str, list[str]]
    until: datetime


def is_jwt(text: str) -> bool:
    """Whether a bearer token has the form of a provider's."""
    return text.count(".") == 2 and not text.startswith("lora_")


class Provider:
    """The provider that the settings name."""

    def __init__(self, settings: OidcSettings, clock: Callable[[], datetime]) -> None:
        unknown = {scope for grant in settings.grants for given in grant.scopes.values() for scope in given} - {*SCOPES}
        if unknown:
            raise BadSetting(name="LORACTL_OIDC_GRANTS", reason=f"gives {sorted(unknown)}, which is no scope")
        self.settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: KeySet | None = None
        self._asked_at = 0.0

    def person(self, text: str) -> Person:
        """Whom the token stands for; `TokenRefused` with the reason, `ProviderDown` when its keys cannot be had."""
        claims = self._claims(text)
        subject, issuer = str(claims["sub"]), self.settings.issuer
        name = str(claims.get("email") or claims.get("preferred_username") or subject)[:200]
        try:
            check_json([subject, name])
            until = datetime.fromtimestamp(claims["exp"], UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise TokenRefused(reason=f"the provider's token does not hold: {str(error)[:200]}") from error
        identity = hashlib.sha256(f"{issuer} {subject}".encode()).hexdigest()[:15]
        return Person(f"o{identity}", name, self.granted(claims), until)

    def granted(self, claims: dict[str, Any]) -> dict[str, list[str]]:
        """Scopes per namespace: the union of all rows of the table that fit."""
        found: dict[str, set[str]] = {}
        for grant in self.settings.grants:
            said = claims.get(grant.claim)
            if said == grant.value or (isinstance(said, list) and grant.value in said) or grant.value == ANYBODY:
                for namespace, scopes in grant.scopes.items():
                    found.setdefault(namespace, set()).update(scopes)
        if not found:
            raise TokenRefused(reason="it is good, but no row of this registry's table gives its holder anything")
        return {namespace: [scope for scope in SCOPES if scope in scopes] for namespace, scopes in found.items()}

    def _claims(self, text: str) -> dict[str, Any]:
        try:
            try:
                token = jwt.decode(text, self._known_keys(), algorithms=ALGORITHMS)
            except InvalidKeyIdError:
                token = jwt.decode(text, self._known_keys(older_than_s=PAUSE_S), algorithms=ALGORITHMS)
            claims: dict[str, Any] = dict(token.claims)
            now = int(self._clock().timestamp())
            wanted = jwt.JWTClaimsRegistry(
                now=now,
                leeway=LEEWAY_S,
                iss={"essential": True, "value": self.settings.issuer},
                aud={"essential": True, "value": self.settings.audience},
                sub={"essential": True},
                exp={"essential": True},
            )
            wanted.validate(claims)
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise TokenRefused(reason=f"the provider's token does not hold: {str(error)[:200]}") from error
        return claims

    def _known_keys(self, older_than_s: float = FRESH_S) -> KeySet:
        with self._lock:
            if self._keys is None or time.monotonic() - self._asked_at > older_than_s:
                try:
                    self._keys = self._published()
                except ProviderDown:
                    if self._keys is None:
                        raise
                self._asked_at = time.monotonic()
            return self._keys

    def _published(self) -> KeySet:
        issuer = self.settings.issuer
        try:
            with httpx.Client(timeout=5) as http:
                about = http.get(f"{issuer.rstrip('/')}/.well-known/openid-configuration").raise_for_status().json()
                if about["issuer"] != issuer:
                    raise ProviderDown(issuer=issuer, reason=f"it says that it is {str(about['issuer'])[:100]}")
                return KeySet.import_key_set(http.get(about["jwks_uri"]).raise_for_status().json())
        except (httpx.HTTPError, JoseError, ValueError, KeyError, TypeError) as error:
            raise ProviderDown(issuer=issuer, reason=f"{type(error).__name__}: {str(error)[:200]}") from error
