"""Which modules and parameters of a base the words of a recipe mean: by a loaded model, or by a tensor table alone.

A target is the end of a module's name (``q_proj``, ``layers.0.mlp.up_proj``, ``lm_head``); modules with a matrix take
factors. A parameter is named by any run of the parts of its name (``q_proj``, ``layers.0``, ``mlp.up_proj.weight``).
"""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from .base_model import BaseModel
from .errors import RankTooHigh, UnknownTargets

ALL_LINEAR = ("all-linear",)
_FULL = ("F64", "F32", "F16", "BF16")


def means(target: str, module: str) -> bool:
    """Whether a module is one of those that a target means."""
    return f".{module}".endswith(f".{target}")


def runs(name: str) -> set[str]:
    """All that a parameter may be called by."""
    parts = name.split(".")
    return {".".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(end)}


def check_targets(targets: Sequence[str], modules: Collection[str]) -> None:
    """`UnknownTargets` names the targets that mean none of ``modules``, and what may have been meant."""
    unknown = [target for target in targets if not any(means(target, module) for module in modules)]
    if unknown:
        raise _refusal(unknown, {module.rpartition(".")[2] for module in modules})


def check_rank(rank: int, targets: Sequence[str], base: BaseModel, but: Sequence[str] = ()) -> None:
    """`RankTooHigh` names a targeted matrix of the tensor table whose smaller side is below ``rank``.

    Nothing is said of what only a loaded model shows: a tied head, weights in 8 or 4 bits, an unknown model type.
    """
    sides: dict[str, tuple[int, ...]] = {}
    for module in modules_of(base):
        tensor = base.by_name.get(f"{module}.weight")
        if tensor is None or tensor.dtype not in _FULL or any(means(target, module) for target in but):
            continue
        in_layer = any(part.isdecimal() for part in module.split("."))
        if in_layer if tuple(targets) == ALL_LINEAR else any(means(target, module) for target in targets):
            sides[module] = tensor.shape
    for module, shape in sides.items():
        if rank > min(shape):
            turned = base.family is not None and base.family.in_by_out.search(module)
            outputs, inputs = reversed(shape) if turned else shape
            most = min(map(min, sides.values()))
            raise RankTooHigh(rank=rank, module=module, outputs=outputs, inputs=inputs, most=most)


def check_parameters(wanted: Sequence[str], names: Collection[str]) -> None:
    """`UnknownTargets` names what means none of the parameters ``names``."""
    spelled = set().union(*map(runs, names))
    if unknown := [word for word in wanted if word not in spelled]:
        raise _refusal(unknown, {part for name in names for part in name.split(".")[:-1] if not part.isdecimal()})


def names_of(base: BaseModel) -> tuple[str, ...]:
    """Names of the parameters that a loaded model has, a tied head too; none where only a loaded model can tell."""
    if base.family is None:
        return ()
    return tuple(dict.fromkeys((*base.by_name, base.family.head)))


def modules_of(base: BaseModel) -> tuple[str, ...]:
    """Names of the modules that take factors, as `names_of`."""
    table = base.by_name  # a head that is not in it is tied to an embedding
    matrices = [name for name in names_of(base) if name not in table or len(table[name].shape) == 2]
    return tuple(name.removesuffix(".weight") for name in matrices if name.endswith(".weight"))


def _refusal(unknown: Sequence[str], known: Collection[str]) -> UnknownTargets:
    ends = sorted(known)
    near = [close for word in unknown for close in get_close_matches(word, ends, n=3, cutoff=0.5)]
    advice = f"Did you mean {_listed(near)}?" if near else f"There are {_listed(ends)}."
    return UnknownTargets(targets=_listed(unknown), nearest=f" {advice}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in dict.fromkeys(names))
