"""--rank auto: train once at a high rank, read the spectrum of every module's ΔW, and keep the ranks that carry it.

    energy(r) = Σ_modules Σ_{i ≤ r} σᵢ² ⁄ Σ_modules Σ_i σᵢ²

The nearest update of a lower rank is the cut SVD of the one that was trained (Eckart and Young 1936), so that no rank
needs a training of its own. Every module keeps the energy that is asked for, at a rank of its own, or a budget of bytes
goes where a rank keeps most. The suite verifies: where the cut clearly loses more than the gate would let it (a point
of metrics between 0 and 1, 2 % of the gain over the bare base of others), more energy is kept, up to all of it; a
budget of bytes is not exceeded for that, but the loss is reported. Alpha stays while the rank
changes, as in the paper (arXiv:2106.09685, 4.1): the scale α⁄r makes up for it.
"""

from typing import Any

import torch

from registry.core.errors import BadRequest
from registry.core.metrics import is_share
from registry.core.recipes import FULL_RANK

from ..compress import Compressed, bytes_of, cut, decomposed, ranks_for
from ..lora import target_modules
from .study import Found, Study

_SHOWN = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
FULL = "full"
_POINT, _OF_GAIN = 0.01, 0.02
_BYTES = 4
"""Of a parameter: factors are float32."""


def by_rank(study: Study) -> Found:
    """The search over ranks; `RankTooHigh` when a rank that was asked for is above a module's smaller side."""
    recipe, model = study.recipe, study.model
    names = target_modules(model, recipe.training.targets)
    shapes = [model.get_submodule(name).weight.shape for name in names]
    least = _BYTES * min(map(sum, shapes))
    if recipe.bytes is not None and recipe.bytes < least:
        raise BadRequest(problems=f"bytes: {recipe.bytes:,} is below {least:,}, rank 1 of the smallest module")
    full = recipe.full_rank or min(FULL_RANK, *map(min, shapes))
    runs = study.train("rank", {FULL: recipe.training.model_copy(update={"rank": full})})
    if not runs:
        raise study.all_failed("rank")
    trained = runs[FULL]
    svds = decomposed(trained.adapter)
    ranks = {r: ranks_for(trained.adapter, svds, rank=r) for r in (2**power for power in range(full.bit_length()))}
    made: dict[str, Compressed] = {
        f"rank-{r}": cut(trained.adapter, svds, found) for r, found in ranks.items() if r < full
    }
    if recipe.bytes is not None:
        wanted = [f"bytes-{recipe.bytes}"]
        by_bytes = ranks_for(trained.adapter, svds, budget=recipe.bytes)
        made[wanted[0]] = cut(trained.adapter, svds, by_bytes)
    else:
        assert recipe.energy is not None
        wanted = [f"energy-{energy:g}" for energy in (recipe.energy, *_SHOWN) if energy >= recipe.energy]
        wanted = list(dict.fromkeys(wanted))
        for energy in sorted({recipe.energy, *_SHOWN}):
            by_energy = ranks_for(trained.adapter, svds, energy=energy)
            made[f"energy-{energy:g}"] = cut(trained.adapter, svds, by_energy)
    adapters = {FULL: trained.adapter} | {name: found.adapter for name, found in made.items()}
    records = study.score("cut", adapters)
    against = {name: study.difference(records[name], records[FULL]) for name in made}
    margin = _POINT
    if not is_share(study.metric):
        gain = study.score_of(records[FULL]) - study.score_of(records["bare"])
        margin = _OF_GAIN * max(0.0, gain)
    chosen = next((name for name in wanted if not against[name].clearly_worse(margin)), None)
    if chosen is None:
        chosen = wanted[0] if recipe.bytes is not None else FULL
    candidates: dict[str, dict[str, Any]] = {"bare": {"score": study.scores(records["bare"])}}
    for name, adapter in adapters.items():
        kept = made.get(name)
        found = [patch.a_RI.shape[0] for patch in adapter.patches.values()]
        candidates[name] = {
            "rank": max(found),
            "mean_rank": sum(found) / len(trained.adapter.patches),
            "energy": kept.energy if kept else 1.0,
            "bytes": bytes_of(adapter),
            "score": study.scores(records[name]),
        } | ({"against_full": against[name].dump()} if kept else {})
    adapter = adapters[chosen]
    modules = {name: {"before": kept.before, "after": kept.after, "energy": kept.energy}
               for name, kept in made[chosen].modules.items()} if chosen in made else {}  # fmt: skip
    as_found = {"rank": candidates[chosen]["rank"], "learning_rate": trained.rate}
    return Found(
        adapter, trained, recipe.training.model_copy(update=as_found), chosen,
        _reason(chosen, wanted[0], chosen in against and against[chosen].clearly_worse(margin), margin), candidates,
        {"full_rank": full, "margin": margin, "spectrum": _energies(svds), "modules": modules},
    )  # fmt: skip


def _energies(svds: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """The share of all modules' energy that one rank for all keeps, by rank."""
    longest = max(len(s) for _, s, _ in svds.values())
    squares = torch.zeros(longest, dtype=torch.float64)
    for _, s, _ in svds.values():
        squares[: len(s)] += s.double() ** 2
    kept = (squares.cumsum(0) / squares.sum()).tolist()
    return [[float(rank), share] for rank, share in enumerate(kept, start=1)]


def _reason(chosen: str, wanted: str, worse: bool, margin: float) -> str:
    lost = f"clearly loses more than {margin:.3g} against the full rank"
    if worse:
        return f"{chosen} is as asked for, but {lost}: allow it more bytes"
    if chosen == wanted:
        return f"{chosen} is as asked for, and does not lose clearly more than {margin:.3g} against the full rank"
    return f"{wanted} was asked for, but {lost}; {chosen} does not"
