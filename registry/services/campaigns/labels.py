"""Labels of the answers in which a candidate and what serves differ: handed out, and taken."""

from datetime import datetime

from sqlmodel import Session

from registry.core.campaign import Facts, PoolFacts, State
from registry.core.errors import NoLabelsWanted
from registry.db.models import Campaign, CampaignItem
from registry.schemas import DisagreementsInfo, LabelsRequest
from registry.storage.base import BlobStore

from .. import ledger, pools
from ..references import find_data
from ..tokens import Caller
from . import access


def disagreements(
    session: Session, store: BlobStore, caller: Caller, identity: str, adapter: str, alias: str
) -> DisagreementsInfo:
    """Inputs on which an adapter's candidate and what serves differ; `NoLabelsWanted` where there are none to label.

    Whoever may promote may see them, and must be able to read the inputs.
    """
    access.get(session, caller, identity)
    item = access.named_item(session, caller, identity, adapter, alias, lock=False)
    pool = Facts.model_validate(item.facts).pool
    if pool is None or pool.paper is None or pool.data is None:
        raise NoLabelsWanted(campaign=identity, adapter=adapter, reason=_no_labels(item, pool))
    find_data(session, caller, "dataset", pool.data)
    return DisagreementsInfo(
        adapter=adapter,
        alias=alias,
        n=pool.n or 0,
        differ=pool.differ or 0,
        paper=pool.paper,
        lines=pools.read_blob(store, pool.paper).decode(),
    )


def label(
    session: Session, store: BlobStore, caller: Caller, identity: str, request: LabelsRequest, now: datetime
) -> Campaign:
    """Take the labels of an adapter's differing answers; the same ones again change nothing.

    `NoLabelsWanted` when it is too early or too late for them; what `registry.core.pool.parse_labels` refuses, and
    `LabelsContradict` for others than were taken: the gate's error allows one look.
    """
    campaign = access.get(session, caller, identity)
    item = access.named_item(session, caller, identity, request.adapter, request.alias)
    facts = Facts.model_validate(item.facts)
    pool, assigned = facts.pool, item.id
    assert assigned is not None
    late = State(item.state).final and (pool is None or pool.labels is None)
    if pool is None or pool.paper is None or late:
        raise NoLabelsWanted(campaign=identity, adapter=request.adapter, reason=_no_labels(item, pool))
    names = (identity, request.adapter)
    labelled = pools.label(
        session, store, caller, item_id=assigned, pool=pool, lines=request.lines, names=names, now=now
    )
    if labelled == pool:
        return campaign
    item.facts = facts.model_copy(update={"pool": labelled}).model_dump(mode="json")
    item.revision += 1
    item.changed_at = now
    session.add(item)
    told = {"pool": labelled.name, "paper": labelled.paper, "labels": labelled.labels, "differ": labelled.differ}
    ledger.note(session, campaign, "labelled", now, by=caller, item=item, **told)
    return campaign


def _no_labels(item: CampaignItem, pool: PoolFacts | None) -> str:
    if State(item.state).final:
        return f"it is {item.state} already"
    if pool is None:
        return "its policy names no pool"
    if pool.verdict is not None:
        return "no label would change the verdict"
    return pool.missing or f"it is {item.state}, and the pool is asked when no tier passes and one is unresolved"
