"""What a campaign has measured before anything is tried: drift between the bases, signals of its adapters."""

from contextlib import suppress
from datetime import datetime

from sqlmodel import Session

from registry.core.campaign import State
from registry.core.errors import LoractlError
from registry.db.models import Adapter, Base, Campaign, Version
from registry.schemas import JobRequest

from .. import fits, jobs, policies
from ..references import find_data
from ..tokens import Caller
from . import access, actors, reading

_COMPARED, _HELD = 100, 4 << 30
"""Adapters that one comparison of two bases takes, and bytes of likelihoods that it may hold of them."""
_LIKELIHOODS = 2 * 512 * 4
"""Bytes by which one adapter's likelihoods, and the bare base's beside them, grow with the vocabulary."""


def measure(session: Session, campaign: Campaign, now: datetime) -> None:
    """Ask for the measured drift between the two bases, a signal for the plan and the report."""
    old, new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
    if old.weights == new.weights == "full":
        recipe = {"kind": "compare", "old": old.digest, "base": new.digest}
        request = JobRequest(recipe=recipe, queue=campaign.queue, namespace="base")
        itself = Caller(campaign.created_by, f"campaign {campaign.id}", "user", {"base": ["run"]})
        jobs.submit(session, itself, request, now, campaign_id=campaign.id, origin=actors.origin_of(campaign))
        _measure_adapters(session, campaign, old, new, now)


def _measure_adapters(session: Session, campaign: Campaign, old: Base, new: Base, now: datetime) -> None:
    """Ask what forward passes say of adapters whose policy retains inputs: some in one job, in their own namespace.

    Adapters first made on another base than ``old`` are left to the drift, as all are whose inputs nobody may read.
    """
    together: dict[tuple[str, str], set[str]] = {}
    whose: dict[str, Caller] = {}
    for item in access.items_of(session, campaign):
        adapter = session.get_one(Adapter, item.adapter_id)
        retained = policies.effective(session, adapter.namespace, adapter.name).retained
        source = reading.original(session, session.get_one(Version, item.serving_id))
        if State(item.state).final or retained is None or not source.runnable or source.base_id != old.id:
            continue
        try:
            actor = whose[adapter.namespace] = actors.actor_of(session, campaign, adapter, now)
            inputs = find_data(session, actor, "dataset", retained).digest
        except LoractlError:
            continue
        together.setdefault((adapter.namespace, inputs), set()).add(source.digest)
    most = min(_COMPARED, max(1, _HELD // (_LIKELIHOODS * _vocabulary(session, old))))
    for (namespace, inputs), versions in together.items():
        for some in _parts(sorted(versions), most):
            recipe = {"kind": "compare", "old": old.digest, "base": new.digest, "adapters": some, "inputs": inputs}
            request = JobRequest(recipe=recipe, queue=campaign.queue, namespace=namespace)
            with suppress(LoractlError), session.begin_nested():
                actor, origin = whose[namespace], actors.origin_of(campaign)
                jobs.submit(session, actor, request, now, campaign_id=campaign.id, origin=origin)


def _vocabulary(session: Session, base: Base) -> int:
    """Rows of its largest tensor, which for nearly all is the embedding: at least as many as it has tokens."""
    assert base.id is not None
    return max((tensor.shape[0] for tensor in fits.model_of(session, base.id).tensors if tensor.shape), default=1)


def _parts(values: list[str], most: int) -> list[list[str]]:
    return [values[first : first + most] for first in range(0, len(values), most)]
