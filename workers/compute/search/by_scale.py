"""--scale auto: scale and learning rate searched together, because more of one makes up for less of the other.

    ΔW = (α⁄r)·B·A        candidates: the recipe's α times each of ``scales``, its rate times each of ``rates``

All candidates go through one many-adapter run with the same rows, seed and schedule. Successive halving (Jamieson and
Talwalkar 2016, arXiv:1502.07943): at a quarter and at half of the steps all are scored, and the better half goes on
from where it is. So the winner was trained on the whole schedule, just as its recipe alone would train it, and K
candidates cost about as many steps as K ⁄ 2 full trainings. A candidate that diverges is dropped and reported.
"""

from typing import Any

from registry.core.recipes import FineTune

from ..finetune import Trained
from ..lora import fresh
from ..rate import rate_of, with_rate
from .study import Found, Records, Study

RUNGS = (0.25, 0.5, 1.0)
"""Shares of the steps after which the worse half ends."""
_PHASE = "scale"
_SAME = 1e-9


def by_scale(study: Study) -> Found:
    """The search over scales and rates; `TrainingFailed` when every candidate diverges."""
    training = with_rate(study.model, study.recipe.training, fresh(study.model, study.recipe.training))
    recipes = {
        _name(scale, rate): _with(training, scale, rate)
        for scale in study.recipe.scales for rate in study.recipe.rates
    }  # fmt: skip
    candidates: dict[str, dict[str, Any]] = {
        name: {"alpha": recipe.alpha, "scale": _scale(recipe), "learning_rate": rate_of(recipe), "steps": 0}
        for name, recipe in recipes.items()
    }
    live = list(recipes)
    rungs = sorted({max(1, round(share * training.steps)) for share in RUNGS})
    trained: dict[str, Trained] = {}
    records: Records = {}
    for until in rungs:
        phase = f"{_PHASE}-{until}"
        before = study.scored(phase)
        if before is None or until == rungs[-1]:
            trained = study.train(_PHASE, {name: recipes[name] for name in live}, until)
            if not trained:
                raise study.all_failed(_PHASE)
            before = study.score(phase, {name: run.adapter for name, run in trained.items()})
        records = before
        for name, found in records.items():
            if name != "bare":
                candidates[name] |= {"steps": until, "score": study.scores(found)}
        live = sorted(records.keys() - {"bare"}, key=lambda name: (-candidates[name]["score"]["calibration"], name))
        if until != rungs[-1]:
            live = live[: (len(live) + 1) // 2]
    for name, reason in study.failed(_PHASE).items():
        candidates[name]["dropped"] = reason
    candidates["bare"] = {"score": study.scores(records["bare"])}
    best, *others = live
    second = study.difference(records[best], records[others[0]]) if others else None
    facts: dict[str, Any] = {"edge": _edge(study, candidates[best], training)}
    if second is not None:
        facts["over_second"] = second.dump()
    reason = f"{best} has the best score of {len(live)} that were trained to the end"
    if facts["edge"]:
        reason += f"; {' and '.join(facts['edge'])} is at the edge of what was tried, so more of it may be better"
    return Found(trained[best].adapter, trained[best], recipes[best], best, reason, candidates, facts)


def _name(scale: float, rate: float) -> str:
    return f"scale-{scale:g}-rate-{rate:g}"


def _with(training: FineTune, scale: float, rate: float) -> FineTune:
    return training.model_copy(update={"alpha": training.alpha * scale, "learning_rate": rate_of(training) * rate})


def _scale(recipe: FineTune) -> float:
    """α⁄r, or α⁄√r."""
    return float(recipe.alpha / (recipe.rank**0.5 if recipe.rank_stabilised else recipe.rank))


def _edge(study: Study, best: dict[str, Any], training: FineTune) -> list[str]:
    """Which of scale and rate is the smallest or largest that was tried."""
    return [
        f"its {what}"
        for what, value, tried in (
            ("scale", best["alpha"] / training.alpha, study.recipe.scales),
            ("rate", best["learning_rate"] / rate_of(training), study.recipe.rates),
        )
        if len(tried) > 1 and min(abs(value / end - 1) for end in (min(tried), max(tried))) < _SAME
    ]
