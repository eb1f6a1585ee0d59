"""From what people type to rows: adapters, versions, datasets, with the nearest names in a refusal.

What the caller may not read is refused in the same words as what is not there.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

from sqlmodel import Session, select

from registry.core.errors import AdapterNotFound, BadReference, BadRequest, DatasetNotFound, VersionNotFound
from registry.core.lifecycle import VersionState
from registry.core.names import Reference, SeriesName
from registry.db import queries
from registry.db.models import Adapter, Base, Dataset, DatasetVersion, Version

from . import standing
from .tokens import Caller

Row = TypeVar("Row", Base, Version)


def nearest(wanted: str, names: Iterable[str]) -> str:
    """``" Did you mean 'x'?"``, or nothing."""
    found = get_close_matches(wanted, list(names), n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def one_of(found: Sequence[Row], text: str, what: str) -> Row | None:
    """The one row whose digest begins as ``text`` says, None when there is none; `BadReference` of several."""
    if len(found) > 1:
        raise BadReference(value=text[:200], what=what, rule="several begin so", examples="the same with more digits")
    return found[0] if found else None


def find_adapter(session: Session, caller: Caller, series: SeriesName) -> Adapter:
    """The series, `AdapterNotFound` when it is not there or not the caller's to read."""
    row = queries.adapter_by_name(session, series.namespace, series.name)
    if row is None or not caller.can("read", series.namespace):
        raise adapter_not_found(session, caller, series)
    return row


def adapter_not_found(session: Session, caller: Caller, series: SeriesName) -> AdapterNotFound:
    """What to say to who asked for a series that is not there, or not theirs to read."""
    known = queries.adapter_names(session, caller.readable())
    return AdapterNotFound(name=str(series), nearest=nearest(str(series), known))


def find_version(session: Session, adapter: Adapter, reference: Reference, *, gone: bool = False) -> Version:
    """The version that ``@vN`` or a digest names, else the newest live one; `VersionNotFound`, `VersionDeleted`.

    With ``gone`` a deleted one is found as well: deleting it once more changes nothing.
    An alias needs a base too: `registry.services.adapters.resolve`.
    """
    assert adapter.id is not None
    if reference.version is not None:
        row = queries.version_by_number(session, adapter.id, reference.version)
    elif reference.digest is not None:
        row = queries.version_by_digest(session, adapter.id, str(reference.digest))
    elif reference.begins is not None:
        digits = str(reference.begins)
        row = one_of(queries.versions_beginning(session, adapter.id, digits), str(reference), "one version")
    else:
        row = queries.latest_version(session, adapter.id)
    if row is None:
        raise VersionNotFound(
            ref=str(reference), name=str(reference.series), nearest=f" Its newest is v{adapter.next_version - 1}."
        )
    if row.status == VersionState.DELETED and not gone:
        standing.require_bytes(row, standing.ref(adapter, row))
    return row


def parse_version(series: SeriesName, text: str) -> Reference:
    """``vN`` or a digest, as a route's path spells it."""
    return Reference.parse(f"{series}@{text}")


def find_dataset(session: Session, caller: Caller | None, kind: str, text: str) -> DatasetVersion:
    """The version of a dataset or suite that a reference names, the newest by default; `DatasetNotFound`.

    Without a caller the registry itself asks: for what a policy names, whose author could read it.
    """
    reference = Reference.parse(text, kind)
    series = reference.series
    digits = reference.digest or reference.begins
    row = queries.dataset_version(
        session, kind, series.namespace, series.name, reference.version, str(digits) if digits else None
    )
    if row is None or (caller is not None and not caller.can("read", series.namespace)):
        known = queries.dataset_names(session, kind, caller.readable() if caller else None)
        others = [name for name in known if name != str(series)]
        raise DatasetNotFound(kind=kind, ref=text[:200], nearest=nearest(str(series), others))
    return row


def find_data(session: Session, caller: Caller, kind: str, text: str) -> DatasetVersion:
    """As `find_dataset`, or by the digest of the content alone, which is there for whoever may read one such series.

    A digest is no right: what a recipe recorded is asked for here again, before anybody trains on it.
    """
    if not text.startswith("sha256:"):
        return find_dataset(session, caller, kind, text)
    query = select(DatasetVersion, Dataset).join(Dataset).where(DatasetVersion.digest == text, Dataset.kind == kind)
    for row, dataset in session.exec(query):
        if caller.can("read", dataset.namespace):
            return row
    raise BadRequest(problems=f"no {kind} {text[:80]} that {caller.name} may read")
