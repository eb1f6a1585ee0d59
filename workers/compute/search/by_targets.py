"""--targets auto: where adapters earn their bytes. Groups of modules are added while the next one clearly helps.

    rank(placement) = ⌊P ⁄ Σ_modules (inputs + outputs)⌋        P parameters, the same for every placement

Groups are attention and feed-forward, as module paths tell them apart, ``other`` for linear modules that are neither,
and ``embeddings``: that of tokens, with the output head where it has weights of its own. A round trains what stands
plus each group that is left, all in one many-adapter run, and takes the best if its paired gain over what stands (at
first: over the bare base) has a lower bound above zero; a round's error is shared by its candidates (Bonferroni). As
bytes are equal, a group is added only where it is the better place for them; one for which they do not make rank 1 is
dropped. Without a rate in the recipe every placement is trained at the default for its share of the matrices.
"""

import re
from collections.abc import Sequence
from typing import Any

from registry.core.errors import BadRequest
from registry.core.recipes import FineTune

from ..lora import takes_factors, target_modules
from ..metrics import ALPHA, Difference
from ..model import Model
from .study import Found, Study

_KINDS = (
    ("attention", re.compile(r"\.(\w*attn\w*|\w*attention\w*)\.")),
    ("feed-forward", re.compile(r"\.(\w*mlp\w*|\w*ffn\w*|\w*feed_?forward\w*|\w*experts?\w*)\.")),
)
_OTHER, _EMBEDDINGS = "other", "embeddings"
_BYTES = 4


def by_targets(study: Study) -> Found:
    """The search over placements; `BadRequest` when the budget is below rank 1 of one of them."""
    model, training = study.model, study.recipe.training
    groups = groups_of(model)
    if len(groups) < 2:
        raise BadRequest(problems=f"targets: this base has but one group of modules, {', '.join(groups)}")
    if study.recipe.bytes is not None:
        budget = study.recipe.bytes // _BYTES
    else:
        everything = [module for modules in groups.values() for module in modules]
        own = training.rank * cost(model, target_modules(model, training.targets))
        budget = max(own, cost(model, everything))
    standing: tuple[str, ...] = ()
    stands: tuple[Any, ...] | None = None
    candidates: dict[str, dict[str, Any]] = {}
    reason = ""
    trained = None
    while left := [group for group in groups if group not in standing]:
        number = len(standing) + 1
        recipes: dict[str, FineTune] = {}
        too_dear: dict[str, str] = {}
        for group in left:
            together = tuple(name for name in groups if name in (*standing, group))
            modules = [module for name in together for module in groups[name]]
            try:
                recipes["+".join(together)] = placed(model, training, modules, budget)
            except BadRequest as error:
                too_dear["+".join(together)] = error.problems
        candidates |= {name: {"round": number, "dropped": why} for name, why in too_dear.items()}
        if not recipes and not standing:
            raise BadRequest(problems="; ".join(too_dear.values()))
        if not recipes:
            reason += "; the bytes are too few for one more group"
            break
        phase = f"targets-{number}"
        runs = study.train(phase, recipes)
        if not runs and not standing:
            raise study.all_failed(phase)
        records = study.score(f"{phase}-scores", {name: run.adapter for name, run in runs.items()})
        before = records["bare"] if stands is None else stands
        gains = {name: study.difference(records[name], before, ALPHA / len(recipes)) for name in runs}
        candidates.setdefault("bare", {"score": study.scores(records["bare"])})
        for name, recipe in recipes.items():
            candidates[name] = _known(model, recipe, number)
            if name in runs:
                gain = {"gain": gains[name].dump(), "over": "+".join(standing) or "bare"}
                rate = {"learning_rate": runs[name].rate}
                candidates[name] |= {"score": study.scores(records[name])} | gain | rate
        for name, why in study.failed(phase).items():
            candidates[name]["dropped"] = why
        if not runs:
            reason += "; every placement with one more group diverged"
            break
        best = max(runs, key=lambda name: study.score_of(records[name]))
        if not standing or gains[best].clearly_better:
            reason = _reason(best, gains[best], standing)
            standing = tuple(group for group in groups if group in best.split("+"))
            trained, chosen, stands = runs[best], recipes[best], records[best]
        if not gains[best].clearly_better:
            if candidates[best]["over"] != "bare":
                reason += f"; {best} is not: {_interval(gains[best])} over it"
            break
    assert trained is not None
    facts = {
        "parameters": budget,
        "groups": {name: list(targets_of(model, modules)) for name, modules in groups.items()},
    }
    as_found = chosen.model_copy(update={"learning_rate": trained.rate})
    return Found(trained.adapter, trained, as_found, "+".join(standing), reason, candidates, facts)


def groups_of(model: Model) -> dict[str, list[str]]:
    """Linear modules, the embedding of tokens and the head by the group they belong to, in the model's order."""
    found: dict[str, list[str]] = {name: [] for name in (*(kind for kind, _ in _KINDS), _OTHER, _EMBEDDINGS)}
    for name in target_modules(model, ("all-linear",)):
        # The innermost kind counts: what is an expert's inside a block that is called attention is no attention.
        at = {kind: [match.end() for match in pattern.finditer(f".{name}")] for kind, pattern in _KINDS}
        known = {kind: max(ends) for kind, ends in at.items() if ends}
        found[max(known, key=known.__getitem__) if known else _OTHER].append(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    found[_EMBEDDINGS] = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return {name: modules for name, modules in found.items() if modules}


def targets_of(model: Model, names: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of names that mean these modules and no other one that takes factors."""
    wanted = set(names)
    others = [name for name, module in model.named_modules() if takes_factors(module) and name not in wanted]
    ends: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            if not any(f".{other}".endswith(f".{end}") for other in others):
                ends[end] = None
                break
    assert set(target_modules(model, tuple(ends))) == wanted
    return tuple(ends)


def placed(model: Model, training: FineTune, names: Sequence[str], budget: int) -> FineTune:
    """The recipe on these modules, at the highest rank that ``budget`` parameters and their sides allow."""
    of_one = cost(model, names)
    rank = min(budget // of_one, *(min(model.get_submodule(name).weight.shape) for name in names))
    targets = targets_of(model, names)
    if rank < 1:
        raise BadRequest(
            problems=f"{budget * _BYTES:,} bytes are too few: rank 1 on {', '.join(targets)} takes "
            f"{of_one * _BYTES:,} (raise --bytes, or the rank of the recipe)"
        )
    return training.model_copy(update={"targets": targets, "rank": rank})


def cost(model: Model, names: Sequence[str]) -> int:
    """Parameters of rank 1."""
    return sum(sum(model.get_submodule(name).weight.shape) for name in names)


def _known(model: Model, recipe: FineTune, number: int) -> dict[str, Any]:
    parameters = recipe.rank * cost(model, target_modules(model, recipe.targets))
    return {"round": number, "targets": list(recipe.targets), "rank": recipe.rank, "bytes": parameters * _BYTES}


def _reason(best: str, gain: Difference, standing: Sequence[str]) -> str:
    over = "+".join(standing) or "the bare base"
    word = "clearly" if gain.clearly_better else "not clearly"
    return f"{best} is {word} better than {over}: {_interval(gain)}"


def _interval(gain: Difference) -> str:
    return f"{gain.estimate:+.4g} (between {gain.lower:+.4g} and {gain.upper:+.4g})"
