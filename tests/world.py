"""A registry in one process, without its API: database, store and a clock that tests turn."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.core.base_model import BaseModel
from registry.core.digest import Digest
from registry.core.errors import LoractlError
from registry.core.manifest import FileEntry, Kind, Manifest
from registry.core.names import SeriesName
from registry.db.engine import Database
from registry.db.models import Base, Push, Token
from registry.files import Scan, scan_folder
from registry.schemas import BaseRegistration, PushInfo, PushRequest, SignedRequest, Wishes
from registry.services import bases, pushes, verification
from registry.services.tokens import Caller
from registry.settings import Settings
from registry.storage.base import BlobStore
from tests.factories import base_of

ADMIN = Caller("admin", "admin", "user", {"*": ["admin"]})
SETTINGS = Settings(
    mode="embedded",
    database_url="sqlite://",
    broker_url="memory://",
    public_url="http://localhost",
    signing_key=b"a key of tests",
    failed_sign_ins=0,  # hundreds of them are tried from one address
)


def refused(error: type[LoractlError], call: Callable[[], object]) -> str:
    """The words of a refusal, which has to come."""
    with pytest.raises(error) as told:
        call()
    return told.value.message


def caller(name: str, **scopes: list[str]) -> Caller:
    """A user's token with scopes per namespace."""
    return Caller(name, name, "user", scopes)


@dataclass
class World:
    """What services need, and the verbs that most tests begin with."""

    database: Database
    store: BlobStore
    settings: Settings = SETTINGS
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def clock(self) -> datetime:
        """The time as the registry sees it."""
        return self.now

    def later(self, **delta: float) -> None:
        """Turn the clock."""
        self.now += timedelta(**delta)

    def with_settings(self, **changes: Any) -> "World":
        """The same registry with other settings."""
        return replace(self, settings=replace(self.settings, **changes))

    def grant(self, who: Caller) -> Caller:
        """Store the caller's token with its scopes as they are now, for what acts in its name later."""
        with self.database.write() as session:
            token = session.get(Token, who.token_id) or Token(
                id=who.token_id, hash=who.token_id, kind=who.kind, name=who.name, created_at=self.now
            )
            token.scopes = who.scopes
            session.add(token)
        return who

    # ── pushes ───────────────────────────────────────────────────────────────

    def open(
        self, kind: Kind, name: str | None, request: PushRequest, who: Caller = ADMIN, **more: Any
    ) -> PushInfo:
        series = pushes.base_series(request.wishes) if name is None else SeriesName.parse(name, kind)
        with self.database.write() as session:
            push = pushes.open_push(
                session, who, self.settings, kind=kind, series=series, request=request, now=self.now, **more
            )
        with self.database.read() as session:
            return pushes.describe(session, self.store, self.settings, push, self.now)

    def describe(self, push_id: str, who: Caller = ADMIN) -> PushInfo:
        with self.database.read() as session:
            push = pushes.get(session, who, push_id)
            return pushes.describe(session, self.store, self.settings, push, self.now)

    def send(self, info: PushInfo, contents: Mapping[str, bytes]) -> int:
        """Send every needed blob by its signed PUT; how many bytes went."""
        sent = 0
        for blob in info.blobs:
            if blob.put is not None:
                put(blob.put, contents[blob.digest]).raise_for_status()
                sent += blob.size
        return sent

    def commit(self, push_id: str, who: Caller = ADMIN) -> Push:
        """Ask for the commit, let a verifier look, ask again."""
        self.ask(push_id, who)
        self.verify()
        return self.ask(push_id, who)

    def ask(self, push_id: str, who: Caller = ADMIN) -> Push:
        return pushes.ask_commit(self.database, self.store, who, push_id, self.now)

    def verify(self, **more: Any) -> bool:
        return verification.verify_next(self.database, self.store, self.clock, **more)

    def push(
        self, kind: Kind, name: str | None, request: PushRequest, contents: Mapping[str, bytes], who: Caller = ADMIN
    ) -> dict[str, Any]:
        """The whole way; the outcome."""
        info = self.open(kind, name, request, who)
        if info.state != "committed":
            self.send(info, contents)
            self.commit(info.id, who)
            info = self.describe(info.id, who)
        assert info.outcome is not None
        return info.outcome

    # ── the usual pushes ─────────────────────────────────────────────────────

    def push_base(self, folder: Path, who: Caller = ADMIN, **wishes: Any) -> dict[str, Any]:
        request, contents = base_push(folder, **wishes)
        return self.push("base", None, request, contents, who)

    def push_adapter(
        self, folder: Path, name: str, base: BaseModel | Path, who: Caller = ADMIN, **wishes: Any
    ) -> dict[str, Any]:
        request, contents = adapter_push(folder, base, **wishes)
        return self.push("adapter", name, request, contents, who)

    def push_rows(self, kind: Kind, name: str, data: bytes, who: Caller = ADMIN) -> dict[str, Any]:
        request, contents = files_push(kind, {"data.jsonl": data})
        return self.push(kind, name, request, contents, who)

    def register(self, base: BaseModel, who: Caller = ADMIN, location: str | None = None, **wishes: Any) -> Base:
        """A base by its table, without weights."""
        request = BaseRegistration(table=table_of(base), wishes=Wishes(**wishes), location=location)
        with self.database.write() as session:
            return bases.register(session, who, self.settings, base, request, self.now)

    def one(self, query: Any) -> Any:
        """The one row of a query."""
        with self.database.read() as session:
            return session.exec(query).one()

    def all(self, query: Any) -> list[Any]:
        """All rows of a query."""
        with self.database.read() as session:
            return list(session.exec(query).all())


def put(request: SignedRequest, data: bytes) -> httpx.Response:
    """Send ``data`` as the signed request says."""
    return _http().request(request.method, request.url, headers=request.headers, content=data)


@cache
def _http() -> httpx.Client:
    return httpx.Client(timeout=30)


def table_of(base: BaseModel) -> str:
    return base64.b64encode(base.to_compressed()).decode()


def base_push(folder: Path, **wishes: Any) -> tuple[PushRequest, dict[str, bytes]]:
    base = base_of(folder)
    scan = scan_folder("base", folder, base=base.digest)
    return request_of(scan, Wishes(**wishes), table_of(base))


def adapter_push(folder: Path, base: BaseModel | Path, **wishes: Any) -> tuple[PushRequest, dict[str, bytes]]:
    model = base_of(base) if isinstance(base, Path) else base
    return request_of(scan_folder("adapter", folder, base=model.digest), Wishes(**wishes))


def files_push(
    kind: Kind, files: Mapping[str, bytes], base: str | None = None, config: dict[str, Any] | None = None, **wishes: Any
) -> tuple[PushRequest, dict[str, bytes]]:
    """A push of bytes as they are, whatever a careful client would have said to them."""
    entries = [
        FileEntry(path=path, size=len(data), digest=str(Digest.sha256(data))) for path, data in sorted(files.items())
    ]
    manifest = Manifest(kind=kind, files=tuple(entries), base=base, config=config or {})
    request = PushRequest(manifest=manifest.model_dump(mode="json", by_alias=True), wishes=Wishes(**wishes))
    return request, {str(Digest.sha256(data)): data for data in files.values()}


def request_of(
    scan: Scan, wishes: Wishes | None = None, table: str | None = None
) -> tuple[PushRequest, dict[str, bytes]]:
    """The push of what was scanned, and its bytes by digest."""
    contents = {entry.digest: scan.files[entry.path].read_bytes() for entry in scan.manifest.files}
    manifest = scan.manifest.model_dump(mode="json", by_alias=True)
    return PushRequest(manifest=manifest, wishes=wishes or Wishes(), table=table), contents
