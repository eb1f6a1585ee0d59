"""A recipe in people's words becomes one in digests: references are resolved, what can be derived is filled in."""

from collections.abc import Collection
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlmodel import Session, select

from registry.core.errors import BadRequest, NotRunnable
from registry.core.lifecycle import VersionState
from registry.core.names import Reference
from registry.core.recipes import (
    BASE_ROLES,
    TEXTS,
    TRAINED,
    UNLABELLED,
    AnyRecipe,
    FineTune,
    parse_recipe,
    temperature_of,
)
from registry.db import queries
from registry.db.models import Adapter, Base, DatasetVersion, StoredManifest, Version

from .. import bases, standing
from ..adapters import resolve
from ..policies import effective
from ..references import find_adapter, find_data, find_version
from ..tokens import Caller

_TAUGHT_AS_TRAINED = {"learning_rate", "batch_tokens", "max_length", "precision", "quantised", "seed"}
"""What a distillation takes over from the recorded recipe."""


def planned(session: Session, caller: Caller, words: dict[str, Any], suites: Collection[str] = ()) -> AnyRecipe:
    """A recipe in which every reference has become a digest, and what can be derived is filled in."""
    plan = dict(words)
    kind = plan.get("kind")
    adapter = plan.get("adapter")
    own = "old" if kind in ("rebase", "compare") else "base"
    if kind in ("merge", "rebase", "compress") and isinstance(adapter, str) and not plan.get(own):
        version = meant(session, caller, adapter, None)
        plan["adapter"] = version.digest
        plan[own] = session.get_one(Base, version.base_id).digest
    listed = plan.get("adapters")
    if kind in ("evaluate", "combine") and not plan.get("base") and isinstance(listed, list) and listed:
        plan["base"] = session.get_one(Base, meant(session, caller, str(listed[0]), None).base_id).digest
    for field in BASE_ROLES:
        if isinstance(plan.get(field), str):
            plan[field] = bases.find(session, plan[field]).digest
    on = queries.base_by_digest(session, str(plan.get(own)))
    for field in ("adapter", "start"):
        if isinstance(plan.get(field), str):
            plan[field] = meant(session, caller, plan[field], on).digest
    if isinstance(listed, list):
        plan["adapters"] = [meant(session, caller, str(text), on).digest for text in listed]
    if kind == "rebase" and isinstance(plan.get("made"), dict):
        plan["made"] = {tier: _made(session, caller, plan, tier, str(text)) for tier, text in plan["made"].items()}
    for field in ("datasets", "apart"):
        if isinstance(plan.get(field), list):
            plan[field] = [find_data(session, caller, "dataset", str(text)).digest for text in plan[field]]
    if kind == "rebase" and plan.get("tier") in UNLABELLED and not plan.get("inputs"):
        plan["inputs"] = _unlabelled(session, caller, plan)
    if isinstance(plan.get("inputs"), str):
        plan["inputs"] = find_data(session, caller, "dataset", plan["inputs"]).digest
    if isinstance(plan.get("suite"), str) and plan["suite"] not in suites:
        plan["suite"] = find_data(session, caller, "suite", plan["suite"]).digest
    if kind == "rebase" and plan.get("tier") in TRAINED:
        plan["training"] = _training(session, caller, plan)
    if kind == "rebase" and plan.get("tier") == "distil":
        plan["distil"] = _distillation(session, caller, plan)
    if kind == "search" and isinstance(plan.get("training"), dict):
        plan["training"] = _written(session, caller, plan, plan["training"])
    return parse_recipe(plan)


def meant(session: Session, caller: Caller, text: str, base: Base | None) -> Version:
    """The adapter version that a recipe names: by its digest, or as ``namespace/name@vN`` or ``:alias`` on ``base``."""
    if text.startswith("sha256:"):
        found = session.exec(select(Version, Adapter).join(Adapter).where(Version.digest == text)).all()
        mine = [(version, adapter) for version, adapter in found if caller.can("read", adapter.namespace)]
        if not mine:
            raise BadRequest(problems=f"no adapter version {text[:80]}")
        at_hand = (VersionState.LIVE, VersionState.YANKED)
        version, adapter = next((one for one in mine if one[0].status in at_hand), mine[0])
        standing.require_bytes(version, standing.ref(adapter, version))
        return version
    reference = Reference.parse(text)
    if reference.alias is not None:
        return resolve(session, caller, reference, base).version
    adapter = find_adapter(session, caller, reference.series)
    version = find_version(session, adapter, reference)
    standing.require_bytes(version, standing.ref(adapter, version))
    return version


def training_of(session: Session, version: Version, base: str) -> FineTune | None:
    """The recipe that ``version`` was trained by, else its policy's, for another base; None where there is none."""
    recipe = recorded_recipe(session, version)
    if recipe.get("kind") in ("rebase", "search"):
        recipe = _words(recipe.get("found") or recipe.get("training"))
    if recipe.get("kind") != "finetune":
        adapter = session.get_one(Adapter, version.adapter_id)
        written = effective(session, adapter.namespace, adapter.name).recipe
        if written is None:
            return None
        recipe = TypeAdapter(dict[str, Any]).validate_json(written)
    try:
        return FineTune.model_validate({**recipe, "base": base, "start": None, "pull": 0.0})
    except ValidationError:  # an author's own words, or those of a newer registry
        return None


def recorded_recipe(session: Session, version: Version) -> dict[str, Any]:
    """What a version's manifest says it was made by: its author's words, to be parsed; empty where there are none."""
    body = session.get_one(StoredManifest, version.digest).body
    lineage = _words(TypeAdapter(dict[str, Any]).validate_json(body).get("lineage"))
    return _words(lineage.get("recipe"))


def _words(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _made(session: Session, caller: Caller, plan: dict[str, Any], tier: str, text: str) -> str:
    """The version that ``text`` names, if ``tier`` made it of the plan's adapter for the plan's base."""
    base = queries.base_by_digest(session, str(plan.get("base")))
    version = meant(session, caller, text, base)
    recipe, asked = recorded_recipe(session, version), {"kind": "rebase", "tier": tier}
    asked |= {name: str(plan.get(name)) for name in ("adapter", "old", "base")}
    if base is None or version.base_id != base.id or any(recipe.get(name) != said for name, said in asked.items()):
        raise BadRequest(problems=f"made.{tier}: {text[:80]} is not what that tier makes of the adapter on this base")
    return version.digest


def _training(session: Session, caller: Caller, plan: dict[str, Any]) -> dict[str, Any]:
    given = plan.get("training")
    if isinstance(given, dict):
        return _written(session, caller, plan, given)
    version = meant(session, caller, str(plan["adapter"]), None)
    recorded = training_of(session, version, str(plan.get("base")))
    if recorded is None:
        raise NotRunnable(what=f"tier '{plan['tier']}'", reason="neither the version nor its policy has a recipe")
    for digest in recorded.datasets:
        find_data(session, caller, "dataset", digest)
    if plan["tier"] == "warm-start":
        adapter = session.get_one(Adapter, version.adapter_id)
        steps, candidates = effective(session, adapter.namespace, adapter.name).warm_start(recorded.steps)
        plan.setdefault("candidates", candidates)
        recorded = recorded.model_copy(update={"steps": steps, "warmup_steps": min(recorded.warmup_steps, steps)})
    return recorded.model_dump(mode="json")


def _unlabelled(session: Session, caller: Caller, plan: dict[str, Any]) -> str | None:
    """Text of what the adapter is for: its policy's retained inputs, else what it was trained on, if the caller may."""
    version = meant(session, caller, str(plan["adapter"]), None)
    adapter = session.get_one(Adapter, version.adapter_id)
    if retained := effective(session, adapter.namespace, adapter.name).retained:
        return retained
    training = training_of(session, version, str(plan.get("base")))
    with suppress(BadRequest):
        return find_data(session, caller, "dataset", training.datasets[0]).digest if training else None
    return None


def _distillation(session: Session, caller: Caller, plan: dict[str, Any]) -> dict[str, Any]:
    """How to distil: as asked, else as the adapter was trained.

    Where what counts is right or wrong, the teacher answers with what it finds likeliest: that is what is asked of it.
    To few inputs it draws several answers each all the same.
    """
    asked = _words(plan.get("distil"))
    version = meant(session, caller, str(plan["adapter"]), None)
    recorded = training_of(session, version, str(plan.get("base")))
    found = recorded.model_dump(mode="json", include=_TAUGHT_AS_TRAINED) if recorded else {}
    adapter = session.get_one(Adapter, version.adapter_id)
    gates = effective(session, adapter.namespace, adapter.name).gates
    inputs, texts = plan.get("inputs"), asked.get("texts", TEXTS)
    if gates and isinstance(inputs, str) and isinstance(texts, int):
        rows = session.exec(select(DatasetVersion.rows).where(DatasetVersion.digest == inputs)).first() or 0
        found |= {"temperature": temperature_of(gates[0].metric)} if rows >= texts else {}
    return found | asked


def _written(session: Session, caller: Caller, plan: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The training recipe that stands in another one."""
    words = {"kind": "finetune", "base": plan.get("base"), **given}
    return planned(session, caller, words).model_dump(mode="json")
