"""Settings: the only reader of the environment (``LORACTL_*``), once per process, then passed in.

Secrets have no default outside embedded mode; there ``loractl up`` makes them at first start and keeps
them with mode 0600.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from .core.errors import Usage

MOST_TOGETHER = 64
"""Adapters that a worker may ask to train at once."""
_LAST_PORT = 65535
_LOG_LEVELS = ("info", "debug", "warning", "error")


class BadSetting(Usage):
    """A setting is missing or not readable."""

    code = "bad-setting"
    says = "Setting {name} {reason}."
    help = "See docs/deploy.md for every setting."


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where an S3-compatible store is: one endpoint for our calls, one for signing (a signature covers the host)."""

    bucket: str
    endpoint: str | None
    public_endpoint: str | None
    region: str
    access_key: str
    secret_key: str = field(repr=False)
    path_style: bool = True
    """``host/bucket/key``; AWS prefers ``bucket.host/key``."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Whoever has ``value`` as, or among, the claim gets the scopes; the value ``*`` fits everybody."""

    claim: str
    value: str
    scopes: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class OidcSettings:
    """An OpenID Connect provider, and the table from its claims to scopes per namespace."""

    issuer: str
    audience: str
    """Whom a token must be for: the client id of ``loractl``, unless the provider was told otherwise."""
    client_id: str
    grants: tuple[Grant, ...]
    scope: str = "openid email profile"


@dataclass(frozen=True, slots=True)
class Settings:
    """What API and daemons need."""

    mode: Literal["embedded", "fleet"]
    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    public_url: str
    """How clients reach the API; the local store's URLs begin with it."""
    signing_key: bytes = field(repr=False)
    """Signs the local store's URLs and page cursors."""
    data: Path | None = None
    """Embedded: the folder of the local store."""
    s3: S3Settings | None = None
    replica: Path | S3Settings | None = None
    """A copy of the store that `fsck --repair` may read from: a folder such as that of a backup, or a bucket."""
    bootstrap_token: str | None = field(default=None, repr=False)
    """The first admin's token, made valid at start."""
    bootstrap_worker_token: str | None = field(default=None, repr=False)
    file_roots: tuple[Path, ...] = ()
    """Embedded: folders under which ``file://`` locations of base models are allowed."""
    push_ttl_s: int = 24 * 3600
    url_ttl_s: int = 3600
    lease_s: int = 60
    part_size: int = 32 << 20
    multipart_from: int = 64 << 20
    max_file_bytes: int = 1 << 40
    max_checkpoint_bytes: int = 16 << 30
    """Larger checkpoints of jobs stay on the disk of their worker."""
    oidc: OidcSettings | None = None
    rate: int = 1000
    """Requests a second that a token may make for good, and twice as many at once; 0: any number."""
    failed_sign_ins: int = 60
    """Refused tokens a minute that an address may send, and a sixth of them of one token; 0: any number."""
    in_flight: int = 512
    """Requests that one API process is at work on at most; 0: any number."""
    seal_keys: tuple[str, ...] = field(default=(), repr=False)
    """Encrypt secrets of webhooks in the database: the first one does, all of them open."""
    webhook_private: bool = False
    """Whether webhooks may lead to addresses that are not on the internet."""
    metrics_port: int = 0
    """Where daemons answer Prometheus; 0: nowhere. The API answers at its own port."""
    metrics_host: str = "127.0.0.1"
    log_level: str = "info"

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Self:
        """Settings from ``LORACTL_*``; `BadSetting` names what is missing or wrong."""
        read = _Reader(env)
        mode = read.choice("MODE", "fleet", "embedded")
        bucket = read("S3_BUCKET", "") if mode == "embedded" else read("S3_BUCKET")
        endpoint = read("S3_ENDPOINT", "") or None
        return cls(
            mode="embedded" if mode == "embedded" else "fleet",
            database_url=read("DATABASE_URL"),
            broker_url=read("BROKER_URL"),
            public_url=read("PUBLIC_URL").rstrip("/"),
            signing_key=read("SIGNING_KEY").encode(),
            data=Path(read("DATA")) if mode == "embedded" and not bucket else None,
            s3=S3Settings(
                bucket=bucket,
                endpoint=endpoint,
                public_endpoint=read("S3_PUBLIC_ENDPOINT", "") or endpoint,
                region=read("S3_REGION", "us-east-1"),
                access_key=read("S3_ACCESS_KEY"),
                secret_key=read("S3_SECRET_KEY"),
                path_style=read.choice("S3_ADDRESSING", "path", "virtual") == "path",
            )
            if bucket
            else None,
            replica=read.replica(),
            bootstrap_token=read("BOOTSTRAP_TOKEN", "") or None,
            bootstrap_worker_token=read("BOOTSTRAP_WORKER_TOKEN", "") or None,
            file_roots=tuple(Path(part).resolve() for part in read("FILE_ROOTS", "").split(":") if part),
            push_ttl_s=read.number("PUSH_TTL_S", 24 * 3600),
            url_ttl_s=read.number("URL_TTL_S", 3600),
            lease_s=read.number("LEASE_S", 60),
            part_size=read.number("PART_SIZE", 32 << 20),
            multipart_from=read.number("MULTIPART_FROM", 64 << 20),
            max_file_bytes=read.number("MAX_FILE_BYTES", 1 << 40),
            max_checkpoint_bytes=read.number("MAX_CHECKPOINT_BYTES", 16 << 30),
            oidc=read.oidc(),
            rate=read.number("RATE", 1000, least=0),
            failed_sign_ins=read.number("FAILED_SIGN_INS", 60, least=0),
            in_flight=read.number("IN_FLIGHT", 512, least=0),
            seal_keys=read.keys("SEAL_KEYS"),
            webhook_private=read.choice("WEBHOOK_PRIVATE", "no", "yes") == "yes",
            metrics_port=read.number("DAEMONS_METRICS_PORT", 0, _LAST_PORT, least=0),
            metrics_host=read("METRICS_HOST", "127.0.0.1"),
            log_level=read.choice("LOG_LEVEL", *_LOG_LEVELS),
        )


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs: a URL, a token, a broker. No database, no storage key."""

    url: str
    token: str = field(repr=False)
    broker_url: str = field(repr=False)
    cache: Path
    cache_bytes: int
    name: str
    log_level: str = "info"
    together: int = 8
    """How many jobs are trained at most at once on one loaded base."""
    checkpoint_s: float = 60.0
    """The shortest time between two checkpoints that are sent to storage."""
    grace_s: float = 10.0
    """For how long a job may go on to its end after SIGTERM, before it is stopped and handed back."""
    metrics_port: int = 0
    """Where the worker answers Prometheus; 0: nowhere."""
    metrics_host: str = "127.0.0.1"

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Self:
        """Worker settings from ``LORACTL_*``; `BadSetting` names what is missing or wrong."""
        read = _Reader(env)
        return cls(
            url=read("URL"),
            token=read("TOKEN"),
            broker_url=read("BROKER_URL"),
            cache=Path(read("CACHE_DIR", str(Path(env.get("HOME", ".")) / ".cache" / "loractl"))),
            cache_bytes=read.number("CACHE_BYTES", 200 << 30),
            name=read("WORKER_NAME", env.get("HOSTNAME", "worker")),
            log_level=read.choice("LOG_LEVEL", *_LOG_LEVELS),
            together=read.number("TOGETHER", 8, MOST_TOGETHER),
            checkpoint_s=read.number("CHECKPOINT_S", 60),
            grace_s=read.number("GRACE_S", 10, least=0),
            metrics_port=read.number("WORKER_METRICS_PORT", 0, _LAST_PORT, least=0),
            metrics_host=read("METRICS_HOST", "127.0.0.1"),
        )


class _Reader:
    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env

    def __call__(self, name: str, default: str | None = None) -> str:
        text = self.env.get(f"LORACTL_{name}", default)
        if text is None or (default is None and not text):
            raise BadSetting(name=f"LORACTL_{name}", reason="is missing")
        return text

    def choice(self, name: str, default: str, *others: str) -> str:
        text = self(name, default).lower()
        if text not in (default, *others):
            *words, last = (f"'{word}'" for word in sorted((default, *others)))
            allowed = f"{', '.join(words)} and {last}"
            raise BadSetting(name=f"LORACTL_{name}", reason=f"is '{text[:40]}'; {allowed} are allowed")
        return text

    def oidc(self) -> OidcSettings | None:
        issuer = self("OIDC_ISSUER", "")
        if not issuer:
            return None
        if not issuer.startswith(("https://", "http://127.0.0.1", "http://localhost")):
            raise BadSetting(name="LORACTL_OIDC_ISSUER", reason="must begin with https://: its keys decide who is who")
        client_id = self("OIDC_CLIENT_ID")
        try:
            rows = json.loads(self("OIDC_GRANTS"))
            grants = tuple(
                Grant(str(row["claim"]), str(row["value"]), {str(n): list(s) for n, s in row["scopes"].items()})
                for row in rows
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = '[{"claim": "groups", "value": "ml", "scopes": {"team": ["read"]}}, …]'
            raise BadSetting(name="LORACTL_OIDC_GRANTS", reason=f"is not a list like {wanted}") from error
        audience, scope = self("OIDC_AUDIENCE", client_id), self("OIDC_SCOPE", "openid email profile")
        return OidcSettings(issuer, audience, client_id, grants, scope)

    def keys(self, name: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in self(name, "").split(",") if part.strip())
        for place, key in enumerate(found, 1):
            try:
                sound = len(base64.b64decode(key, altchars=b"-_", validate=True)) == 32
            except ValueError:
                sound = False
            if not sound:
                reason = f"has a key (number {place}) that is not 32 bytes in URL-safe base64"
                raise BadSetting(name=f"LORACTL_{name}", reason=reason)
        return found

    def replica(self) -> Path | S3Settings | None:
        url = self("REPLICA_URL", "")
        kind, _, rest = url.partition("://")
        if kind == "s3" and rest.strip("/") and "/" not in rest.strip("/"):
            return S3Settings(
                bucket=rest.strip("/"),
                endpoint=self("REPLICA_S3_ENDPOINT", self("S3_ENDPOINT", "")) or None,
                public_endpoint=None,
                region=self("REPLICA_S3_REGION", self("S3_REGION", "us-east-1")),
                access_key=self("REPLICA_S3_ACCESS_KEY", self("S3_ACCESS_KEY", "") or None),
                secret_key=self("REPLICA_S3_SECRET_KEY", self("S3_SECRET_KEY", "") or None),
                path_style=self.choice("REPLICA_S3_ADDRESSING", "path", "virtual") == "path",
            )
        folder = rest if kind == "file" else url
        if url and not folder.startswith("/"):
            raise BadSetting(name="LORACTL_REPLICA_URL", reason=f"is '{url[:80]}'; expected /a/folder or s3://bucket")
        return Path(folder) if url else None

    def number(self, name: str, default: int, most: int | None = None, least: int = 1) -> int:
        text = self(name, str(default))
        try:
            value = int(text)
        except ValueError as error:
            raise BadSetting(name=f"LORACTL_{name}", reason=f"is '{text}'; expected a whole number") from error
        if value < least:
            raise BadSetting(name=f"LORACTL_{name}", reason=f"is {value}; expected more than {least - 1}")
        if most is not None and value > most:
            raise BadSetting(name=f"LORACTL_{name}", reason=f"is {value}; {most} is the most")
        return value
