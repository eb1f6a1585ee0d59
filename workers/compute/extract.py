"""Extract: a LoRA adapter out of a full fine-tune, the truncated SVD of D = W_tuned − W_base, matrix by matrix.

    ΔW ≈ (U_K·√Σ_K)·(√Σ_K·V_Kᵀ)        K by the share of ‖D‖² to keep, or given

A difference can be nothing but rounding: two values of one weight, stored with ulp u, differ by errors of variance
u²⁄12 each. A random matrix of such errors with standard deviations s_ij has a largest singular value of about

    max_i √(Σ_j s_ij²) + max_j √(Σ_i s_ij²)        (Bandeira and van Handel 2016, arXiv:1408.6185)

Singular values below that (with a margin) are taken for noise: they are not spent ranks on, and a module that has
none above it is dropped. Streamed: at any time one tensor of either model is in memory, and their difference.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from registry.core.errors import NotExtractable
from registry.core.recipes import Extract

from .finetune import Report, silent
from .lora import LINEAR, Adapter, Patch, is_transposed
from .lowrank import nearest
from .model import Model, device_here
from .plain import Kept, plain
from .shards import Stored, stored_names, stored_tensors
from .table import model_of
from .weights import DTYPES

_MARGIN = 1.2
_BLOCK = 1 << 20
"""Elements that are looked at in float64 at a time."""


@dataclass(frozen=True)
class Other:
    """A parameter that differs and is no linear layer's weight."""

    bytes: int
    drift: float | None
    """‖W_tuned − W_base‖ ⁄ ‖W_base‖; None where the base's is zero."""
    replaced: bool


@dataclass(frozen=True)
class Extracted:
    """The adapter, what became of each linear module that differs, and of every other parameter that does."""

    adapter: Adapter
    modules: dict[str, Kept]
    rest: dict[str, Other]
    energy: float
    """The share of ‖D‖² over all linear modules that the adapter keeps."""


def extract(base: Path, tuned: Path, recipe: Extract, report: Report = silent) -> Extracted:
    """The adapter that makes ``tuned`` out of ``base``, as far as the recipe's energy or rank goes.

    `NotExtractable` says why there is none: other shapes or tensors, nothing that differs, or, unless the recipe
    says what to do about them, parameters that differ and that no low-rank update can change. Of a model type that
    nobody here knows, `table.model_of` says what is taken for a linear layer.
    """
    model = model_of(base)
    pairs = _pairs(model, stored_tensors(base), stored_tensors(tuned))
    linear = _linear(model)
    found: dict[str, Patch] = {}
    kept: dict[str, Kept] = {}
    rest: dict[str, tuple[Stored, float | None]] = {}
    lost = whole = 0.0
    for step, (name, (one, two)) in enumerate(pairs.items(), start=1):
        report({"step": step, "steps": len(pairs)})
        w, t = _read(one), _read(two)
        if torch.equal(w.to(t.dtype), t):
            continue  # the same, or a cast of it
        difference = _difference(w, t)
        distance = _norm(difference)
        module = linear.get(name)
        if module is None:
            if distance > _MARGIN * math.sqrt(sum(float(_noise(w[rows], t[rows]).sum()) for rows in _blocks(w))):
                size = _norm(w)
                rest[name] = (two, distance / size if size else None)
            continue
        owner, transposed = module
        noise = _edge(w, t)
        del w, t
        update, share = nearest(
            (difference.T.contiguous() if transposed else difference).to(device_here()),
            rank=recipe.rank, energy=recipe.energy or 1.0, noise=noise,
        )  # fmt: skip
        kept[owner] = Kept(min(difference.shape), update.rank, share if update.rank else 0.0)
        if update.rank:
            a_RI, b_OR = update.a_RI.float().cpu().contiguous(), update.b_OR.float().cpu().contiguous()
            found[owner] = Patch(a_RI, b_OR, 1.0)
            lost, whole = lost + distance**2 * (1 - share), whole + distance**2
    replaced, others = _rest(model, rest, recipe)
    if not found and not replaced:
        said = "they differ by no more than rounding" if kept or rest else "they are the same weights"
        raise NotExtractable(reason=said)
    adapter = plain(found, _config(model, found, replaced), _targets(found, linear), replaced)
    return Extracted(adapter, kept, others, 1 - lost / whole if whole else 1.0)


# ── which tensors, and how far apart ─────────────────────────────────────────


def _pairs(
    model: Model, base: Mapping[str, Stored], tuned: Mapping[str, Stored]
) -> dict[str, tuple[Stored, Stored]]:
    """Every parameter of the model by its own name, as both store it."""
    pairs: dict[str, tuple[Stored, Stored]] = {}
    used: set[str] = set()
    for name, _ in model.named_parameters():
        names = [stored_names(model, name, stored) for stored in (base, tuned)]
        if not names[0] or not names[1]:
            where = "the tuned model" if names[0] else "the base"
            raise NotExtractable(reason=f"{where} has no tensor '{name}'")
        one, two = base[names[0][0]], tuned[names[1][0]]
        used.add(two.name)
        if one.shape != two.shape:
            raise NotExtractable(reason=f"'{name}' is {_shape(one)} in the base and {_shape(two)} in the tuned model")
        for stored in (one, two):
            if not DTYPES[stored.dtype].is_floating_point or DTYPES[stored.dtype].itemsize == 1:
                raise NotExtractable(reason=f"'{name}' is stored as {stored.dtype}, quantised: dequantise the model")
        pairs[name] = (one, two)
    more = sorted(name for name in tuned.keys() - used if name.endswith(".weight") and name not in base)
    if more:
        raise NotExtractable(reason=f"the tuned model has tensors that the base has not: {', '.join(more[:5])}")
    return pairs


def _linear(model: Model) -> dict[str, tuple[str, bool]]:
    """Weights of linear modules: parameter -> (module, stored as inputs × outputs); not the output head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": (name, is_transposed(module))
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not head
    }


def _read(tensor: Stored) -> Tensor:
    with tensor.path.open("rb") as file:
        blocks = [block.reshape(-1) for _, block in tensor.blocks(file.fileno())]
    return torch.cat(blocks or [torch.empty(0, dtype=DTYPES[tensor.dtype])]).reshape(tensor.shape or (1,))


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Rows, so many at a time that their float64 copies are small."""
    many = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
    return (slice(first, first + many) for first in range(0, len(tensor), many))


def _difference(w: Tensor, t: Tensor) -> Tensor:
    """W_tuned − W_base, subtracted in float64 and rounded once to float32, or to a wider type of theirs."""
    difference = torch.empty(w.shape, dtype=torch.promote_types(torch.promote_types(w.dtype, t.dtype), torch.float32))
    for rows in _blocks(w):
        difference[rows] = t[rows].double() - w[rows].double()
    return difference


def _noise(w: Tensor, t: Tensor) -> Tensor:
    """The variance of rounding, element by element: u² ⁄ 12 in the coarser type, or in both where they are one."""
    coarse = max(torch.finfo(w.dtype).eps, torch.finfo(t.dtype).eps)
    variance = torch.zeros(w.shape)
    for stored in (w, t):
        if torch.finfo(stored.dtype).eps == coarse:
            _, exponent = torch.frexp(stored.float())
            variance += torch.ldexp(torch.full_like(variance, coarse**2 / 12), 2 * (exponent - 1)) * (stored != 0)
    return variance


def _edge(w: Tensor, t: Tensor) -> float:
    """About the largest singular value of a matrix of rounding errors, and a margin."""
    column_I, largest = torch.zeros(w.shape[1]), 0.0
    for rows in _blocks(w):
        variance = _noise(w[rows], t[rows])
        column_I += variance.sum(0)
        largest = max(largest, float(variance.sum(1).max()))
    return _MARGIN * (math.sqrt(largest) + math.sqrt(float(column_I.max())))


def _norm(tensor: Tensor) -> float:
    return math.sqrt(sum(float(tensor[rows].double().square().sum()) for rows in _blocks(tensor)))


# ── what is no linear layer's weight ─────────────────────────────────────────


def _rest(
    model: Model, found: Mapping[str, tuple[Stored, float | None]], recipe: Extract
) -> tuple[dict[str, Tensor], dict[str, Other]]:
    """Parameters to replace by name, and a word about every one that differs."""
    if not found or recipe.rest == "drop":
        return {}, {name: Other(stored.size, drift, replaced=False) for name, (stored, drift) in found.items()}
    cannot = {} if recipe.rest == "replace" else found
    if recipe.rest == "replace":
        cannot = {name: pair for name, pair in found.items() if not _replaceable(model, name)}
    if cannot:
        shown = ", ".join(
            f"'{name}' ({stored.size:,} bytes, drift {'∞' if drift is None else format(drift, '.2g')})"
            for name, (stored, drift) in list(cannot.items())[:5]
        )
        more = f" and {len(cannot) - 5} more" if len(cannot) > 5 else ""
        total = sum(stored.size for stored, _ in cannot.values())
        choices = "--rest drop leaves them as in the base"
        if recipe.rest == "refuse":
            choices += ", --rest replace stores embeddings, output heads and biases whole"
        raise NotExtractable(
            reason=f"{len(cannot)} parameters ({total:,} bytes) differ that a low-rank update of linear layers cannot "
            f"change: {shown}{more}; {choices}"
        )
    replaced = {}
    for name, (stored, _) in found.items():
        value = _read(stored)
        for twin in _twins(model, name):
            replaced[twin] = value
    return replaced, {name: Other(stored.size, drift, replaced=True) for name, (stored, drift) in found.items()}


def _replaceable(model: Model, name: str) -> bool:
    owner, _, parameter = name.rpartition(".")
    module = model.get_submodule(owner)
    return isinstance(module, nn.Linear | Conv1D) or (type(module) is nn.Embedding and parameter == "weight")


def _twins(model: Model, name: str) -> list[str]:
    """The parameter's names: a tied one has two, and a replacement has to reach both."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return [other for other, parameter in named.items() if parameter is named[name]]


# ── the configuration ────────────────────────────────────────────────────────


def _config(model: Model, found: Mapping[str, Patch], replaced: Mapping[str, Tensor]) -> dict[str, Any]:
    whole = sorted({name.rpartition(".")[0] for name in replaced if name.endswith(".weight")})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in found),
        "bias": "all" if any(name.endswith(".bias") for name in replaced) else "none",
        "modules_to_save": whole or None,
        "inference_mode": True,
    }


def _targets(found: Mapping[str, Patch], linear: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Last parts of names where they mean just these modules, else the whole names."""
    ends = {name.rpartition(".")[2] for name in found}
    meant = {owner for owner, _ in linear.values() if owner.rpartition(".")[2] in ends}
    return sorted(ends) if meant == found.keys() else sorted(found)


def _shape(tensor: Stored) -> str:
    return "×".join(map(str, tensor.shape))
