"""What is asked all day: questions that come at the same moment are answered together, in the statements of one.

`Reads.resolution` looks at what the alias means now. That is all that the answer depends on and that may change, so an
answer made from the same facts before is given again; those that are not there yet are made together. Any other
question, and every refusal, is left to who answers one alone: the words are theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlmodel import Session
from starlette.concurrency import run_in_threadpool

from registry import parts as house
from registry.core.errors import VersionDeleted, VersionQuarantined
from registry.core.fit import FitClass
from registry.core.names import Reference, SeriesName
from registry.db import queries
from registry.db.models import Adapter, Version
from registry.schemas import AdapterInfo, Resolution, VersionInfo
from registry.services import adapters, bases, downloads, signatures
from registry.services.adapters import BY_DEFAULT, Filter, Resolved
from registry.services.tokens import Caller

from .answers import Answers
from .together import Together
from .turns import Turns

_MANIFEST_S = 1.0
"""Seconds that a manifest is given on without a look whether its version was deleted."""
_PAGES = 16
"""Pages of one call, each of up to 500 rows."""


@dataclass(frozen=True, slots=True)
class Question:
    """Which version does ``reference`` mean for ``base`` (None: the current one of its line), in one of ``classes``?"""

    reference: Reference
    base: str | None = None
    classes: Sequence[FitClass] = BY_DEFAULT
    engine: str | None = None


class _Seen(NamedTuple):
    """An alias, and what it meant at a look."""

    pointer: queries.Pointer
    pointed: queries.Pointed


class Named(NamedTuple):
    """A version, by what never means another."""

    namespace: str
    name: str
    digest: str


class SeriesPage(NamedTuple):
    """As `adapters.page` takes it."""

    namespaces: Sequence[str] | None
    text: str | None
    task: str | None
    after: tuple[str, str]
    limit: int


class VersionsPage(NamedTuple):
    """As `adapters.versions_page` takes it."""

    series: SeriesName
    before: int
    limit: int


class Reads:
    """The questions that one API process is asked, and some of its answers."""

    def __init__(self, parts: house.Parts, turns: Turns) -> None:
        self._parts = parts
        self.resolutions = Answers()
        """Bodies by all facts that may change; they live as long as their signed URLs are young."""
        self.manifests = Answers()
        """Bodies by `Named`, for a moment."""
        self._looks = Together(self._look, turns)
        self._makes = Together(self._make, turns)
        self._bodies_of = Together(self._manifests, turns)
        self._shows = Together(self._shown, turns)
        self._lists = Together(self._listed, turns, most=_PAGES)
        self._version_lists = Together(self._listed_versions, turns, most=_PAGES)

    async def series_page(self, asked: SeriesPage) -> list[tuple[Adapter, AdapterInfo]]:
        """Series by name."""
        return await self._lists.ask(asked)

    async def versions_page(self, asked: VersionsPage) -> list[tuple[Version, VersionInfo]] | None:
        """Versions of a series, newest first; None where there is no such series."""
        return await self._version_lists.ask(asked)

    async def manifest(self, named: Named) -> bytes | None:
        """The canonical bytes of a version's manifest, None where there is no such version any more."""
        return self.manifests.get(named) or await self._bodies_of.ask(named)

    async def series(self, name: SeriesName) -> AdapterInfo | None:
        """A series with its newest version and its aliases, None where it is not there."""
        return await self._shows.ask(name)

    def _listed(self, asked: Sequence[SeriesPage]) -> list[list[tuple[Adapter, AdapterInfo]]]:
        with self._parts.database.read() as session:
            pages = [adapters.page(session, **page._asdict()) for page in asked]
            rows = {row.id: row for page in pages for row in page}
            infos = dict(zip(rows, adapters.describe_adapters(session, list(rows.values())), strict=True))
        return [[(row, infos[row.id]) for row in page] for page in pages]

    def _listed_versions(self, asked: Sequence[VersionsPage]) -> list[list[tuple[Version, VersionInfo]] | None]:
        with self._parts.database.read() as session:
            rows = queries.adapters_by_name(session, {(page.series.namespace, page.series.name) for page in asked})
            series = {SeriesName(row.namespace, row.name): row for row in rows}
            pages = [
                adapters.versions_page(session, series[page.series], before=page.before, limit=page.limit)
                if page.series in series
                else None
                for page in asked
            ]
            adapter_of = {row.id: row for row in rows}
            found = {version.id: version for page in pages for version in page or ()}
            infos = adapters.describe(session, [(one, adapter_of[one.adapter_id]) for one in found.values()])
        described = dict(zip(found, infos, strict=True))
        return [None if page is None else [(one, described[one.id]) for one in page] for page in pages]

    def _manifests(self, asked: Sequence[Named]) -> list[bytes | None]:
        with self._parts.database.read() as session:
            found = queries.manifests_of_versions(session, {named.digest for named in asked})
        for named in asked:
            if named in found:
                self.manifests.keep(named, found[named], life_s=_MANIFEST_S)
        return [found.get(named) for named in asked]

    def _shown(self, names: Sequence[SeriesName]) -> list[AdapterInfo | None]:
        with self._parts.database.read() as session:
            rows = queries.adapters_by_name(session, {(name.namespace, name.name) for name in names})
            found = {info.name: info for info in adapters.describe_adapters(session, rows)}
        return [found.get(str(name)) for name in names]

    # ── resolve ──────────────────────────────────────────────────────────────

    async def resolution(self, caller: Caller, question: Question) -> bytes:
        """The answer to ``question``, or the refusal of `adapters.resolve`."""
        pointer = adapters.pointer(caller, question.reference, question.base)
        if pointer is not None:
            pointed = await self._looks.ask(pointer)
            bit = Filter(engine=question.engine).engine_bit
            if pointed is not None and pointed.given(exact=FitClass.EXACT in question.classes, engine_bit=bit):
                body = self.resolutions.get(pointed) or await self._makes.ask(_Seen(pointer, pointed))
                if body is not None:
                    return body
        return await run_in_threadpool(self._alone, caller, question)

    def _look(self, pointers: Sequence[queries.Pointer]) -> list[queries.Pointed | None]:
        with self._parts.database.read() as session:
            return queries.pointed_at(session, pointers)

    def _make(self, seen: Sequence[_Seen]) -> Sequence[bytes | None]:
        """The answers; None where something changed since the look, or is changing."""
        try:
            with self._parts.database.read() as session:
                found = adapters.exact(session, {pointed.version_id for _, pointed in seen})
                bodies = dict(zip(found, self._bodies(session, list(found.values())), strict=True))
                now = queries.pointed_at(session, [pointer for pointer, _ in seen])
        except (VersionDeleted, VersionQuarantined):  # one of them, since the look
            return [None] * len(seen)
        made: list[bytes | None] = []
        for (_, pointed), still in zip(seen, now, strict=True):
            made.append(bodies[pointed.version_id] if pointed == still else None)
            if made[-1] is not None:
                self.resolutions.keep(pointed, made[-1], life_s=self._parts.settings.url_ttl_s / 4)
        return made

    def _alone(self, caller: Caller, question: Question) -> bytes:
        with self._parts.database.read() as session:
            base = bases.find(session, question.base) if question.base is not None else None
            classes, engine = question.classes, question.engine
            found = adapters.resolve(session, caller, question.reference, base, classes=classes, engine=engine)
            return self._bodies(session, [found])[0]

    def _bodies(self, session: Session, found: Sequence[Resolved]) -> list[bytes]:
        """What goes out, for any number in the same six statements."""
        infos = adapters.describe(session, [(one.version, one.adapter) for one in found])
        files = downloads.files(
            session, self._parts.store, self._parts.settings, {one.version.digest for one in found}
        )
        required = signatures.required_in(session, {one.adapter.namespace for one in found})
        answers = (
            Resolution(
                version=info,
                fit=one.fit,
                base=one.base.digest,
                base_assumed=one.assumed,
                manifest=one.version.digest,
                files=files[one.version.digest],
                signature_required=one.adapter.namespace in required,
            )
            for one, info in zip(found, infos, strict=True)
        )
        return [answer.model_dump_json(by_alias=True).encode() for answer in answers]
