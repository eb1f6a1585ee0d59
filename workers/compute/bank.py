"""Many adapters on one frozen base at once: the layer this project exists for (Hu et al. 2021, arXiv:2106.09685).

    h = W₀x + s_k·B_k·A_k·x        for the rows of a batch that belong to adapter k

The base product is computed once for all rows, the low-rank part by grouped products. It stands beside the module as
a forward hook, so that the base's weights are never written: what was attached is detached by forgetting it, another
adapter is switched to by naming it, and the recorded weights are there bit by bit.

All factors of an adapter are one row of a matrix θ (K×P), first every A, then every B, padded with zeros to the
largest rank of each module: an optimiser sees one tensor per adapter, and a module takes its factors of all adapters
as views. Zeros in both factors get zero gradients, so that padding, and modules that an adapter leaves alone, stay.
In training, whatever else adapters hold (`variants`) follows in the row: the cores of three factors, then lengths and
biases, then parameters of modules that are trained whole.
Legend: K adapters, R rank, I inputs, O outputs, P parameters of an adapter, B rows, T positions, L tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.core.errors import NotRunnable

from .lora import Adapter, Patch, core_of, dense, fitted, is_transposed, lengths
from .model import Model

Rows = Sequence[tuple[int | None, int]]
"""Whose the rows of a batch are, in order: (adapter, how many rows); None is the bare base."""
Parts = Mapping[str, Tensor]
"""What of an adapter is trained, by module and kind: ``….A`` (R×I), ``….B`` (O×R) or in place of both ``….R`` (R×R),
``….magnitude`` (O), ``….shift`` (O, a bias of B); replaced parameters by their names."""


def parts_of(adapter: Adapter) -> Parts:
    """The adapter's own."""
    found: dict[str, Tensor] = {}
    for name, patch in adapter.patches.items():
        if patch.basis_OR is None:
            found |= {f"{name}.A": patch.a_RI, f"{name}.B": patch.b_OR}
        else:
            found[f"{name}.R"] = core_of(patch)
        others = {"magnitude": patch.magnitude_O, "shift": patch.bias_O}
        found |= {f"{name}.{kind}": value for kind, value in others.items() if value is not None}
    return found | adapter.replaced


def with_parts(adapter: Adapter, parts: Parts) -> Adapter:
    """The adapter with others in their place."""
    patches = {}
    for name, patch in adapter.patches.items():
        core_RR = parts.get(f"{name}.R")
        if core_RR is not None and patch.basis_OR is not None:
            a_RI, b_OR = patch.a_RI, patch.basis_OR @ core_RR
        else:
            a_RI, b_OR = parts[f"{name}.A"], parts[f"{name}.B"]
        patches[name] = replace(
            patch, a_RI=a_RI, b_OR=b_OR, magnitude_O=parts.get(f"{name}.magnitude"), bias_O=parts.get(f"{name}.shift")
        )
    return replace(adapter, patches=patches, replaced={name: parts[name] for name in adapter.replaced})


# ── whose rows ───────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours that have equally many rows each: one product for all of them."""

    adapters: slice
    rows: slice

    @property
    def many(self) -> int:
        """How many adapters."""
        return int(self.adapters.stop - self.adapters.start)

    def stretched(self, length: int) -> "Group":
        """The same, where every row has become ``length`` rows."""
        return Group(self.adapters, slice(self.rows.start * length, self.rows.stop * length))


def groups_of(rows: Rows) -> list[Group]:
    """The fewest groups in which adapters follow one another with equally many rows each."""
    found: list[Group] = []
    start, before = 0, -1
    for adapter, count in rows:
        if adapter is not None and count:
            last = found[-1] if found else None
            if last is not None and (last.adapters.stop, last.rows.stop, before) == (adapter, start, count):
                found[-1] = Group(slice(last.adapters.start, adapter + 1), slice(last.rows.start, start + count))
            else:
                found.append(Group(slice(adapter, adapter + 1), slice(start, start + count)))
            before = count
        start += count
    return found


def spans_of(groups: Sequence[Group]) -> Iterator[tuple[int, slice]]:
    """Each adapter and its rows."""
    for group in groups:
        size = (group.rows.stop - group.rows.start) // group.many
        for place, which in enumerate(range(group.adapters.start, group.adapters.stop)):
            start = group.rows.start + place * size
            yield which, slice(start, start + size)


# ── one module ───────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Layer:
    """What K adapters do to one module."""

    module: nn.Module
    a_KRI: Tensor
    """A view of θ in the type that the model computes in, as is B."""
    b_KOR: Tensor
    scale_K11: Tensor
    trained: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Views of θ itself and of its gradient: A, B, and theirs; None when nothing is trained."""
    patches: dict[int, Patch]
    replaced: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    more: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """In training, views of θ and its gradient by kind: magnitude, shift, and the module's own parameters."""
    lengths_O: dict[int, Tensor] = field(default_factory=dict)
    """DoRA (Liu et al. 2024, arXiv:2402.09353): ‖W₀ + ΔW‖ by rows, a constant on the way back (§4.3)."""
    untouched: set[int] = field(default_factory=set, init=False)
    """Adapters whose views of the gradient hold nothing of this step, so that their next product overwrites them."""
    plain: bool = field(init=False)
    """Whether products of all rows say everything."""
    idle: bool = field(init=False)
    """Whether there is only room here, and nobody's part."""

    def __post_init__(self) -> None:
        self.settle()
        # A module whose input needs no gradient would have no backward, but its factors need theirs.
        self._anchor = torch.zeros((), requires_grad=self.trained is not None)
        self._leaves: dict[tuple[str, int], Tensor] = {}
        self._own_O: Tensor | None = None
        self._parts: dict[tuple[int, int], _Part] = {}

    def settle(self) -> None:
        """See whether products of all rows say everything that is here now."""
        patches = self.patches.values()
        special = any(patch.magnitude_O is not None or patch.bias_O is not None for patch in patches)
        self.plain = not (self.replaced or special or isinstance(self.module, nn.Embedding))
        self.idle = not (self.patches or self.replaced)

    def seat(self, which: int, patch: Patch | None, replaced: dict[str, Tensor] | None) -> None:
        """Let adapter ``which`` be another one, whose factors are in their place already."""
        for held in (self.patches, self.replaced, self.lengths_O):
            held.pop(which, None)
        if patch is not None:
            self.patches[which] = patch
        if replaced is not None:
            self.replaced[which] = replaced
        self.scale_K11[which] = 0.0 if patch is None else patch.scale
        self.settle()
        self.measure()

    def apply(self, x: Tensor, h: Tensor, groups: Sequence[Group], drop: "Drop | None") -> Tensor:
        """h of the rows that belong to adapters, as adapted."""
        if not groups or self.idle:
            return h
        if not self.plain:
            return self._one_by_one(x, h, groups, drop)
        dropped = x if drop is None else drop(x, groups)
        # What the base's product gave is nobody else's, and it needs no memory of its own for its backward.
        own = h if h.is_contiguous() and not h._is_view() else h.clone(memory_format=torch.contiguous_format)
        if self.trained is None:
            _forward(self, dropped, own, groups)
            return own
        added: Tensor = _Added.apply(own, dropped, self, groups, self._anchor)
        return added

    def part(self, adapters: slice) -> "_Part":
        """The factors of some; made once, as the same ones are asked for at every step."""
        key = (adapters.start, adapters.stop)
        if key not in self._parts:
            views = (self.a_KRI, self.b_KOR, self.scale_K11, *(self.trained or ())[2:])
            which = slice(*key) if adapters.stop - adapters.start > 1 else adapters.start
            self._parts[key] = _Part(*(view[which] for view in views))
        return self._parts[key]

    def is_first(self, adapters: slice) -> bool:
        """Whether the coming product is the first of this step for these adapters, all of them or none."""
        asked = set(range(adapters.start, adapters.stop))
        first = asked & self.untouched
        self.untouched -= first
        if first == asked:
            return True
        self.clear(first)
        return False

    def clear(self, adapters: Iterable[int]) -> None:
        """Forget the gradient of these."""
        if self.trained is not None:
            for which in adapters:
                for grad_K in (*self.trained[2:], *(grad_K for _, grad_K in self.more.values())):
                    grad_K[which].zero_()

    @torch.no_grad()
    def measure(self) -> None:
        """Find the lengths of rows for the factors as they are: of W₀ once, then by products of its own size × R.

        ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·wᵀ) + s²·b·(A·Aᵀ)·bᵀ      for a row w of W₀ and its row b of B
        """
        wanted = [which for which, patch in self.patches.items() if patch.magnitude_O is not None]
        if not wanted:
            return
        if self.trained is None:
            for which in wanted:
                self.lengths_O[which] = lengths(self.module, self.patches[which].update.dense())
            return
        if self._own_O is None:
            self._own_O = lengths(self.module)
        weight_OI = dense(self.module)
        for which in wanted:
            a_RI, sb_OR = self.trained[0][which], self.trained[1][which] * self.scale_K11[which]
            grown_OR = 2 * weight_OI @ a_RI.T + sb_OR @ (a_RI @ a_RI.T)
            squares_O = self._own_O.square() + (sb_OR * grown_OR).sum(1)
            self.lengths_O[which] = squares_O.clamp_min(torch.finfo(squares_O.dtype).tiny).sqrt()

    def _one_by_one(self, x: Tensor, h: Tensor, groups: Sequence[Group], drop: "Drop | None") -> Tensor:
        parts, end = [], 0
        for which, rows in spans_of(groups):
            inputs = x[rows]
            if drop is not None and not isinstance(self.module, nn.Embedding):
                inputs = drop(inputs, [Group(slice(which, which + 1), slice(0, len(inputs)))])
            parts += [h[end : rows.start], self._alone(which, x[rows], inputs, h[rows])]
            end = rows.stop
        return torch.cat([*parts, h[end:]])

    def _alone(self, which: int, x: Tensor, dropped: Tensor, h: Tensor) -> Tensor:
        if which in self.replaced:
            own = {name: self._leaf(name, which, value).to(h.dtype) for name, value in self.replaced[which].items()}
            h = _replaced(self.module, own, x, h)
        patch = self.patches.get(which)
        if patch is None:
            return h
        a_RI, b_OR = (
            self._leaf(kind, which, factors[which]).to(h.dtype)
            for kind, factors in (("A", self.a_KRI), ("B", self.b_KOR))
        )
        low = F.embedding(x, a_RI.T) if patch.embedding else F.linear(dropped, a_RI)
        shift = None if patch.bias_O is None else self._leaf("shift", which, patch.bias_O).to(h) * patch.scale
        update = F.linear(low * patch.scale, b_OR, shift)
        if patch.magnitude_O is None:
            return h + update
        magnitude_O = self._leaf("magnitude", which, patch.magnitude_O).to(self.lengths_O[which])
        stretch_O = magnitude_O / self.lengths_O[which]
        bias: Tensor | None = getattr(self.module, "bias", None)
        bare = h if bias is None else h - bias
        # What is added is rounded, not the stretch: in bfloat16 the change of a length of under 0.4 % would be lost.
        return h + (stretch_O - 1).to(h.dtype) * bare + stretch_O.to(h.dtype) * update

    def _leaf(self, kind: str, which: int, fixed: Tensor) -> Tensor:
        """One adapter's; in training as autograd's leaf, whose gradient is the view that the products add to."""
        if self.trained is None:
            return fixed
        if (kind, which) not in self._leaves:
            a_KRI, b_KOR, grad_a_KRI, grad_b_KOR = self.trained
            views = {"A": (a_KRI, grad_a_KRI), "B": (b_KOR, grad_b_KOR), **self.more}
            value_K, grad_K = views[kind]
            leaf = self._leaves[kind, which] = value_K[which].detach().requires_grad_()
            leaf.grad = grad_K[which]
        return self._leaves[kind, which]


def _replaced(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
    """The module's output with another weight or bias (``modules_to_save``, trained biases)."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    if parameters.keys() == {"bias"}:
        return h + (parameters["bias"] - own["bias"])
    weight, bias = parameters["weight"], parameters.get("bias", own.get("bias"))
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight)
    return F.linear(x, weight.T if is_transposed(module) else weight, bias)


@dataclass(frozen=True, slots=True)
class _Part:
    """Factors of neighbours: of one alone as matrices, whose plain products are the faster ones."""

    a_KRI: Tensor
    b_KOR: Tensor
    scale_K11: Tensor
    grad_a_KRI: Tensor | None = None
    grad_b_KOR: Tensor | None = None

    def rows(self, x: Tensor, group: Group) -> Tensor:
        """The group's rows of x as matrices that the factors can be multiplied with: K×L×I, or L×I of one alone."""
        own = x if group.rows == slice(0, len(x)) else x[group.rows]
        return own.reshape(-1, x.shape[-1]) if group.many == 1 else own.reshape(group.many, -1, x.shape[-1])


def _forward(layer: Layer, x: Tensor, h: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """Add s·B·A·x of all groups to h, in place; s·A·x of each."""
    lows = []
    for group in groups:
        part = layer.part(group.adapters)
        low_KLR = (part.rows(x, group) @ part.a_KRI.mT).mul_(part.scale_K11)
        _add(part.rows(h, group), low_KLR, part.b_KOR.mT)
        lows.append(low_KLR)
    return lows


class _Added(torch.autograd.Function):
    """h + s·B·A·x that keeps only x and s·A·x, and adds the gradients of A and B into their place in θ's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, layer: Layer, groups: Sequence[Group], _anchor: Tensor) -> Tensor:
        lows = _forward(layer, x, h, groups)
        ctx.layer, ctx.groups = layer, groups
        ctx.save_for_backward(x, *lows)
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        x, *lows = ctx.saved_tensors
        dh = gradients[0].contiguous()
        wanted = ctx.needs_input_grad[1]
        dx = torch.zeros_like(x) if wanted and ctx.groups[0].rows != slice(0, len(x)) else None
        for group, low_KLR in zip(ctx.groups, lows, strict=True):
            part = layer.part(group.adapters)
            assert part.grad_a_KRI is not None
            assert part.grad_b_KOR is not None
            dh_KLO = part.rows(dh, group)
            dlow_KLR = (dh_KLO @ part.b_KOR).mul_(part.scale_K11)
            first = layer.is_first(group.adapters)
            _add(part.grad_b_KOR, dh_KLO.mT, low_KLR, instead=first)
            _add(part.grad_a_KRI, dlow_KLR.mT, part.rows(x, group), instead=first)
            if wanted:
                own = dlow_KLR @ part.a_KRI
                if dx is None:
                    dx = own.view(x.shape)
                else:
                    dx[group.rows] = own.view(x[group.rows].shape)
        return gradients[0], dx, None, None, None


def _add(into: Tensor, left: Tensor, right: Tensor, *, instead: bool = False) -> None:
    """Add a product to what is there, or put it there ``instead``."""
    if into.dtype != left.dtype:
        into.copy_(left @ right) if instead else into.add_(left @ right)
    elif into.dim() == 2:
        into.addmm_(left, right, beta=0 if instead else 1)
    else:
        into.baddbmm_(left, right, beta=0 if instead else 1)


# ── dropout ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Drop:
    """Dropout of the low-rank part's input: each adapter's rate, drawn from its own chance."""

    rates: Sequence[float]
    chances: Sequence[torch.Generator]

    def __call__(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """x with a share of its values set to 0 and the others raised to keep the mean."""
        keep = torch.ones_like(x)
        for which, rows in spans_of(groups):
            if rate := self.rates[which]:
                keep[rows] = keep[rows].bernoulli_(1 - rate, generator=self.chances[which]) / (1 - rate)
        return x * keep


# ── all modules ──────────────────────────────────────────────────────────────


class Bank:
    """What K adapters hold, for one model.

    With ``train`` there is a gradient beside θ and both are float32; without it θ has the model's type.
    """

    def __init__(
        self, model: Model, adapters: Sequence[Adapter], *, train: bool = False, room_for: Iterable[Adapter] = ()
    ) -> None:
        """`NotRunnable` names what of an adapter does not fit the model.

        ``room_for``: those that may take the place of one of ``adapters`` later (`seat`).
        """
        self._model = model
        self.adapters = list(adapters)
        self._held: list[dict[str, _Held]] = [{} for _ in self.adapters]
        patches: dict[str, dict[int, Patch]] = {}
        replaced: dict[str, dict[int, dict[str, Tensor]]] = {}
        for which, adapter in enumerate(self.adapters):
            own, others, self._held[which] = self._found(adapter)
            for name, patch in own.items():
                patches.setdefault(name, {})[which] = patch
            for name, parameters in others.items():
                replaced.setdefault(name, {})[which] = parameters
        rooms: dict[str, list[Patch]] = {name: list(of.values()) for name, of in patches.items()}
        rooms |= {name: rooms.get(name, []) for name in replaced}
        for adapter in room_for:
            patched, wholes = fitted(model, adapter)
            for name, _, patch in patched:
                rooms.setdefault(name, []).append(patch)
            for name, _, _ in wholes:
                rooms.setdefault(name, [])

        spaces = {name: _space(rooms[name], replaced.get(name, {}), train) for name in rooms}
        places, self.spans, size = _laid_out(spaces)
        dtype, device = model.get_input_embeddings().weight.dtype, model.device
        shape = (len(self.adapters), size)
        self.theta_KP = torch.zeros(shape, dtype=torch.float32 if train else dtype, device=device)
        self.grad_KP = torch.zeros(shape, device=device) if train else None
        self._computed_KP = self.theta_KP if self.theta_KP.dtype == dtype else self.theta_KP.to(dtype)
        self._places = places
        self.layers: dict[str, Layer] = {}
        for name, place in places.items():
            of, others_of = patches.get(name, {}), replaced.get(name, {})
            for which, patch in of.items():
                self._write(which, place, patch)
            self.layers[name] = self._layer(model.get_submodule(name), place, of, others_of)
        if train:
            for which, adapter in enumerate(self.adapters):
                self.put(which, parts_of(adapter), self.theta_KP)
        self._bases = [
            (which, name, patch.basis_OR.to(device))
            for name, of in patches.items()
            for which, patch in of.items()
            if train and patch.basis_OR is not None
        ]
        self.refresh()
        self._groups: list[Group] | None = None
        self._rows = self._length = 0
        self.drop: Drop | None = None
        if len(self.adapters) != 1:
            self.assign([])

    def _found(
        self, adapter: Adapter
    ) -> tuple[dict[str, Patch], dict[str, dict[str, Tensor]], dict[str, "_Held"]]:
        """An adapter's patches and its replaced parameters (on the model's device) by module, and what it holds."""
        patched, others = fitted(self._model, adapter)
        patches = {name: patch for name, _, patch in patched}
        held: dict[str, _Held] = {}
        for called, (name, _, patch) in zip(adapter.patches, patched, strict=True):
            held |= _held(name, called, patch)
        replaced: dict[str, dict[str, Tensor]] = {}
        called_as = {name.rpartition(".")[0]: None for name in adapter.replaced}
        for called, (name, module, parameters) in zip(called_as, others, strict=True):
            like = next(module.parameters(), self._model.get_input_embeddings().weight)
            replaced[name] = {key: value.to(like.device, like.dtype) for key, value in parameters.items()}
            held |= {f"{called}.{key}": _Held(name, key) for key in parameters}
        return patches, replaced, held

    def _write(self, which: int, place: "_Place", patch: Patch) -> None:
        for kind, value in (("A", patch.a_RI), ("B", patch.b_OR)):
            view = place.view(self.theta_KP, kind)[which]
            view[: value.shape[0], : value.shape[1]] = value.to(view.device)

    def seat(self, which: int, adapter: Adapter) -> None:
        """Let ``adapter`` take the place of another one, of which nothing stays; not in training.

        `NotRunnable` where there is no room for it: see ``room_for``.
        """
        patches, replaced, held = self._found(adapter)
        for name in (*patches, *replaced):
            rank = patches[name].a_RI.shape[0] if name in patches else 0
            if name not in self._places or rank > self._places[name].space["A"][0]:
                raise NotRunnable(what="Switching to the adapter", reason=f"there is no room for it at '{name}'")
        self.adapters[which], self._held[which] = adapter, held
        self.theta_KP[which].zero_()
        for name, layer in self.layers.items():
            if name in patches:
                self._write(which, self._places[name], patches[name])
            layer.seat(which, patches.get(name), replaced.get(name))

    def _layer(
        self, module: nn.Module, place: "_Place", patches: dict[int, Patch], replaced: dict[int, dict[str, Tensor]]
    ) -> Layer:
        a_KRI, b_KOR = (place.view(self._computed_KP, kind) for kind in "AB")
        trained, more = None, {}
        if self.grad_KP is not None:
            theta_KP, grad_KP = self.theta_KP, self.grad_KP
            both = (theta_KP, grad_KP)
            values, gradients = ((place.view(matrix, "A"), place.view(matrix, "B")) for matrix in both)
            trained = (*values, *gradients)
            more = {kind: (place.view(theta_KP, kind), place.view(grad_KP, kind)) for kind in place.kinds}
        scales = [patches[which].scale if which in patches else 0.0 for which in range(len(self.adapters))]
        scale_K11 = torch.tensor(scales, device=a_KRI.device)[:, None, None]  # float32: rounded, it would bias all
        return Layer(module, a_KRI, b_KOR, scale_K11, trained, patches, replaced, more)

    def refresh(self) -> None:
        """Let the model compute with θ as it is now."""
        for which, name, basis_OR in self._bases:
            rank = basis_OR.shape[1]
            core_RR = self._places[name].view(self.theta_KP, "R")[which, :rank, :rank]
            self._places[name].view(self.theta_KP, "B")[which, :, :rank] = basis_OR @ core_RR
        if self._computed_KP is not self.theta_KP:
            self._computed_KP.copy_(self.theta_KP)
        for layer in self.layers.values():
            layer.measure()

    def to_cores(self) -> None:
        """Where three factors are trained, make the gradient of B that of R, by the chain rule, and A's nothing."""
        if self.grad_KP is None:
            return
        for which, name, basis_OR in self._bases:
            grad_A, grad_B, grad_R = (self._places[name].view(self.grad_KP, kind)[which] for kind in "ABR")
            rank = basis_OR.shape[1]
            grad_R[:rank, :rank] = basis_OR.T @ grad_B[:, :rank]
            grad_A.zero_()
            grad_B.zero_()

    @contextmanager
    def gradients(self) -> Iterator[Tensor]:
        """θ's gradient (K×P): what the losses that are differentiated inside the block say, and nothing of before."""
        assert self.grad_KP is not None
        everyone = range(len(self.adapters))
        for layer in self.layers.values():
            layer.untouched = set(everyone) if layer.plain else set()
            if not layer.plain:
                layer.clear(everyone)
        yield self.grad_KP
        for layer in self.layers.values():  # through some nothing went, of some adapters
            layer.clear(layer.untouched)

    def assign(self, rows: Rows) -> None:
        """Say whose the rows of the coming batches are. One adapter alone has every row unless told otherwise."""
        self._groups, self._rows = groups_of(rows), sum(count for _, count in rows)

    def parts(self, which: int, matrix_KP: Tensor | None = None) -> Parts:
        """What is trained of adapter ``which``, in its own names and ranks, on the processor: of θ or one like it."""
        matrix_KP = self.theta_KP if matrix_KP is None else matrix_KP
        return {
            name: self._view(which, held, matrix_KP).to("cpu", copy=True).contiguous()
            for name, held in self._held[which].items()
        }

    def put(self, which: int, parts: Parts, matrix_KP: Tensor) -> None:
        """Write parts to their places in a matrix like θ: what `parts` reads there."""
        for name, held in self._held[which].items():
            self._view(which, held, matrix_KP).copy_(parts[name])

    def _view(self, which: int, held: "_Held", matrix_KP: Tensor) -> Tensor:
        whole = self._places[held.module].view(matrix_KP, held.kind)[which]
        return whole[: held.rank] if held.kind == "A" else whole[:, : held.rank] if held.kind == "B" else (
            whole[: held.rank, : held.rank] if held.kind == "R" else whole
        )  # fmt: skip

    def trained(self, which: int) -> list[str]:
        """In which spans of θ there is something of adapter ``which`` to be trained."""
        held = self._held[which].values()
        found = {_like(each.kind, self._places[each.module].space[each.kind]) for each in held}
        return [like for like in ORDER if like in found]

    def touches(self, module: nn.Module | None) -> bool:
        """Whether an adapter changes what this module answers."""
        return any(layer.module is module for layer in self.layers.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model answers as adapted inside the block, and as it was after it."""
        handles = [
            layer.module.register_forward_hook(self._hook(name, layer)) for name, layer in self.layers.items()
        ]
        handles.append(self._model.register_forward_pre_hook(self._see, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        """How long the rows of this batch are: some models hand their layers all positions of all rows in a row."""
        given = next((named[key] for key in ("input_ids", "inputs_embeds") if named.get(key) is not None), None)
        self._length = (inputs[0] if given is None else given).shape[1]

    def _hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def adapt(_: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
            groups = self._groups
            if groups is None:
                groups = [Group(slice(0, 1), slice(0, len(h)))]
            elif groups and h.dim() == 2 and len(h) == self._rows * self._length:
                groups = [group.stretched(self._length) for group in groups]
            elif groups and len(h) != self._rows:
                reason = f"'{name}' was given {len(h)} rows of a batch of {self._rows}, so whose they are is unknown"
                raise NotRunnable(what="Several adapters at once", reason=reason)
            return layer.apply(inputs[0], h, groups, self.drop)

        return adapt


# ── what lies where in a row of θ ────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Held:
    """A part of an adapter: of which module, what it is, and at which rank."""

    module: str
    kind: str
    rank: int = 0


def _held(name: str, called: str, patch: Patch) -> dict[str, _Held]:
    """The parts of one patch as `parts_of` calls them."""
    kinds = ["A", "B"] if patch.basis_OR is None else ["R"]
    kinds += ["magnitude"] if patch.magnitude_O is not None else []
    kinds += ["shift"] if patch.bias_O is not None else []
    return {f"{called}.{kind}": _Held(name, kind, patch.a_RI.shape[0]) for kind in kinds}


Space = Mapping[str, tuple[int, ...]]
"""The shape of each kind of part that a module has in a row of θ."""
ORDER = ("A", "B", "R", "vectors", "whole")
"""What lies beside its like in a row of θ, for an optimiser to tell apart."""


def _space(patches: Sequence[Patch], replaced: Mapping[int, Mapping[str, Tensor]], train: bool) -> Space:
    found: dict[str, tuple[int, ...]] = {"A": (0, 0), "B": (0, 0)}
    if patches:
        (outputs, inputs), rank = patches[0].update.shape, max(patch.a_RI.shape[0] for patch in patches)
        found = {"A": (rank, inputs), "B": (outputs, rank)}
        if train and any(patch.basis_OR is not None for patch in patches):
            found["R"] = (rank, rank)
        if train and any(patch.magnitude_O is not None for patch in patches):
            found["magnitude"] = (outputs,)
        if train and any(patch.bias_O is not None for patch in patches):
            found["shift"] = (outputs,)
    if train:
        found |= {key: tuple(value.shape) for parameters in replaced.values() for key, value in parameters.items()}
    return found


def _like(kind: str, shape: tuple[int, ...]) -> str:
    return kind if kind in ORDER else "vectors" if len(shape) == 1 else "whole"


def _laid_out(spaces: Mapping[str, Space]) -> tuple[dict[str, "_Place"], dict[str, slice], int]:
    """Where each module's parts lie, where what is alike lies, and how long a row is."""
    starts: dict[str, dict[str, int]] = {name: {} for name in spaces}
    spans: dict[str, slice] = {}
    end = 0
    for like in ORDER:
        begin = end
        for name, space in spaces.items():
            for kind, shape in space.items():
                if like == _like(kind, shape):
                    starts[name][kind] = end
                    end += math.prod(shape)
        spans[like] = slice(begin, end)
    return {name: _Place(space, starts[name]) for name, space in spaces.items()}, spans, end


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module's parts lie in a row of θ."""

    space: Space
    starts: Mapping[str, int]

    @property
    def kinds(self) -> list[str]:
        """What there is beside the factors."""
        return [kind for kind in self.space if kind not in ("A", "B")]

    def view(self, matrix_KP: Tensor, kind: str) -> Tensor:
        """Of one kind, K of this shape."""
        shape, start = self.space[kind], self.starts[kind]
        return matrix_KP[:, start : start + math.prod(shape)].view(len(matrix_KP), *shape)


@contextmanager
def attached(model: Model, adapter: Adapter) -> Iterator[Bank]:
    """One adapter on a model, for the length of a block."""
    bank = Bank(model, [adapter])
    with bank.attached():
        yield bank
