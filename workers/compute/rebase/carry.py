"""Tier 0: the adapter as it is, on the new base (docs: rebase).

Factors stay the same bytes. What lies in the old base's own numbers moves with the base, so that an adapter that
changes nothing there changes nothing here (docs/adr/0016):

    whole parameters (``modules_to_save``, biases)    W₂ + (saved − W₁)
    DoRA, m ⁄ ‖W + ΔW‖ by rows                        m₂ = m · ‖W₂ + ΔW‖ ⁄ ‖W₁ + ΔW‖

What else can be tried without a step of training (`free` tries it, and chooses by a suite or by unlabelled text):

    α·ΔW, and α of all that is above
    shifted    ΔW − β·D_K, cut back to the rank    D_K: the K leading singular triplets of D = W₂ − W₁,
                                                   β = ⟨ΔW, D_K⟩ ⁄ ‖D_K‖²
    expressed  A₂ = A₁·C,  C = argmin ‖X₁ − C·X₂‖² + λ‖C − 1‖²: what A read in the old activations, read in the new ones

The ridge draws C to the identity, not to zero: where the text says nothing, A stays as it is.
Legend: R rank, I inputs, O outputs, T tokens, K singular triplets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from registry.core.errors import NotRunnable

from ..bank import attached
from ..lora import Adapter, Patch
from ..lowrank import LowRank, leading
from ..model import Model
from ..shards import Stored
from .parameters import Parameters
from .text import Said, watch

PAIRS = 8
"""Singular triplets of D that ΔW's component along it is taken from."""
RIDGE = 0.1
"""λ as a share of the mean square of the activations."""
MEMORY = 1 << 30
"""Bytes of X₂·X₂ᵀ that are held at once; the text is read again for the modules that do not fit."""
_BLOCK = 1 << 22


def carry(adapter: Adapter, old: Path, base: Path, alpha: float = 1.0) -> Adapter:
    """``alpha`` times ``adapter``, made on the base in folder ``old``, for the base in folder ``base``."""
    patches = adapter.patches
    if alpha != 1.0:
        patches = {name: _scaled(patch, alpha) for name, patch in patches.items()}
    if not adapter.replaced and all(patch.magnitude_O is None for patch in patches.values()):
        return adapter if alpha == 1.0 else replace(adapter, patches=patches)
    one, two = Parameters.at(old), Parameters.at(base)
    moved = {name: _moved(one, two, name, value, alpha) for name, value in adapter.replaced.items()}
    if any(patch.magnitude_O is not None for patch in patches.values()):
        patches = {
            name: replace(patch, magnitude_O=_magnitude(one, two, name, adapter.patches[name], alpha))
            for name, patch in patches.items()
        }
    return replace(adapter, patches=patches, replaced=moved)


def shifted(adapter: Adapter, old: Path, base: Path) -> Adapter:
    """The adapter without ΔW's component along the drift, of the same ranks; what has no B·A stays as it is.

    Reads one weight of either base at a time.
    """
    one, two = Parameters.at(old), Parameters.at(base)
    patches = {}
    for name, patch in adapter.patches.items():
        patches[name] = patch
        if patch.embedding or patch.magnitude_O is not None:
            continue
        u, s, v = leading(two.weight(name) - one.weight(name), PAIRS)
        drift = LowRank((s[:, None] * v).float(), u.float())
        if not float(s[0]):
            continue
        update = patch.update
        beta = update.inner(drift) / float(s.square().sum())
        cut = (update + drift * -beta).truncate(update.rank)
        patches[name] = replace(patch, a_RI=cut.a_RI, b_OR=cut.b_OR / patch.scale)
    return replace(adapter, patches=patches)


def expressed(adapter: Adapter, read: Mapping[str, Tensor], model: Model, texts: Sequence[Said]) -> Adapter:
    """The carried adapter, its A reading in the new ``model`` what it ``read`` in the old one, of the same ``texts``.

    Either is looked at as the adapter adapts it: activations of the bare ones are not what it meets.
    Modules with DoRA stay as they are: their gain is that of the old A.
    """
    patches = dict(adapter.patches)
    names = [name for name in read if patches[name].magnitude_O is None]
    for some in _within(names, {name: patches[name].a_RI.shape[1] ** 2 * 4 for name in names}):
        sums = {name: _Sums(adapter.patches[name].a_RI, read[name]) for name in some}
        with attached(model, adapter):
            watch(model, texts, {name: one.add for name, one in sums.items()})
        patches |= {name: replace(patches[name], a_RI=sums.pop(name).solved()) for name in some}
    return replace(adapter, patches=patches)


class _Sums:
    """X₂·X₂ᵀ and A·(X₁ − X₂)·X₂ᵀ of one module, added up text by text."""

    def __init__(self, a_RI: Tensor, read_RT: Tensor) -> None:
        self._a_RI, self._read_RT, self._at = a_RI, read_RT, 0
        self._xx_II = torch.zeros(a_RI.shape[1], a_RI.shape[1])
        self._miss_RI = torch.zeros(a_RI.shape)

    def add(self, x_TI: Tensor) -> None:
        """The module's inputs for the next text."""
        then_RT = self._read_RT[:, self._at : self._at + len(x_TI)]
        self._at += len(x_TI)
        self._xx_II.addmm_(x_TI.T, x_TI)
        self._miss_RI.addmm_(then_RT - self._a_RI.float() @ x_TI.T, x_TI)

    def solved(self) -> Tensor:
        """A₂ = A + A·(X₁ − X₂)·X₂ᵀ·(X₂·X₂ᵀ + λ)⁻¹."""
        xx_II = self._xx_II.double()
        xx_II.diagonal().add_(RIDGE * float(xx_II.diagonal().mean()))
        change_RI: Tensor = torch.linalg.solve(xx_II, self._miss_RI.double().T).T
        return (self._a_RI.double() + change_RI).to(self._a_RI.dtype)


def _within(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in their order, by as many as take `MEMORY` bytes together, and at least one at a time."""
    some: list[str] = []
    for name in names:
        if some and sum(sizes[other] for other in (*some, name)) > MEMORY:
            yield some
            some = []
        some.append(name)
    if some:
        yield some


# ── what lies in the old base's own numbers ──────────────────────────────────


def _scaled(patch: Patch, alpha: float) -> Patch:
    bias_O = None if patch.bias_O is None else patch.bias_O * alpha
    return replace(patch, b_OR=patch.b_OR * alpha, bias_O=bias_O)


def _moved(one: Parameters, two: Parameters, name: str, value: Tensor, alpha: float) -> Tensor:
    """W₂ + α·(value − W₁), by blocks."""
    sides = []
    for base in (one, two):
        here = base.find(name)
        if here is None:
            raise NotRunnable(what="Carrying the adapter", reason=f"it replaces '{name}', which a base does not store")
        if here.shape != tuple(value.shape):
            shapes = " and ".join("×".join(map(str, shape)) for shape in (value.shape, here.shape))
            raise NotRunnable(what="Carrying the adapter", reason=f"'{name}' is {shapes} in it and in a base")
        sides.append(here)
    flat_N, moved_N = value.reshape(-1), torch.empty(value.numel(), dtype=value.dtype)
    for first in range(0, len(flat_N), _BLOCK):
        last = min(first + _BLOCK, len(flat_N))
        w1_n, w2_n = (side.elements(first, last).float() for side in sides)
        moved_N[first:last] = alpha * flat_N[first:last].float() + (w2_n - alpha * w1_n)
    return moved_N.view(value.shape)


def _magnitude(one: Parameters, two: Parameters, name: str, patch: Patch, alpha: float) -> Tensor | None:
    """(1 + α·(g − 1))·‖W₂ + α·ΔW‖ of the gain g = m ⁄ ‖W₁ + ΔW‖."""
    if patch.magnitude_O is None:
        return None
    gain_O = patch.magnitude_O.double() / _lengths(*one.matrix(name), patch.update)
    made_O = (1 + alpha * (gain_O - 1)) * _lengths(*two.matrix(name), patch.update * alpha)
    return made_O.to(patch.magnitude_O.dtype)


def _lengths(stored: Stored, transposed: bool, update: LowRank) -> Tensor:
    """‖W + ΔW‖ by outputs, in float64, the weight read by blocks."""
    squares_O = torch.zeros(update.shape[0], dtype=torch.float64)
    with stored.path.open("rb") as file:
        for rows, block in stored.blocks(file.fileno()):
            if transposed:
                squares_O += (block.float() + update.a_RI.T[rows] @ update.b_OR.T).double().square().sum(0)
            else:
                squares_O[rows] = (block.float() + update.b_OR[rows] @ update.a_RI).double().square().sum(1)
    return squares_O.sqrt()
