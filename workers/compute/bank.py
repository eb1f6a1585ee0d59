"""Many adapters on one frozen base at once: the layer this project exists for (Hu et al. 2021, arXiv:2106.09685).

    h = W₀x + s_k·B_k·A_k·x        for the rows of a batch that belong to adapter k

The base product is computed once for all rows, the low-rank part by grouped products. It stands beside the module as
a forward hook, so that the base's weights are never written: what was attached is detached by forgetting it, another
adapter is switched to by naming it, and the recorded weights are there bit by bit.

All factors of an adapter are one row of a matrix θ (K×P), first every A, then every B, padded with zeros to the
largest rank of each module: an optimiser sees one tensor per adapter, and a module takes its factors of all adapters
as views. Zeros in both factors get zero gradients, so that padding, and modules that an adapter leaves alone, stay.
Legend: K adapters, R rank, I inputs, O outputs, P parameters of an adapter, B rows, T positions, L tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.core.errors import NotRunnable

from .lora import Adapter, Patch, dense, fitted, is_transposed
from .model import Model

Rows = Sequence[tuple[int | None, int]]
"""Whose the rows of a batch are, in order: (adapter, how many rows); None is the bare base."""
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A (R×I) and B (O×R) by module."""


def factors_of(adapter: Adapter) -> Factors:
    """The adapter's own."""
    return {name: (patch.a_RI, patch.b_OR) for name, patch in adapter.patches.items()}


def with_factors(adapter: Adapter, factors: Factors) -> Adapter:
    """The adapter with others in their place."""
    patches = {name: replace(patch, a_RI=factors[name][0], b_OR=factors[name][1])
               for name, patch in adapter.patches.items()}  # fmt: skip
    return replace(adapter, patches=patches)


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
    stretch_O: dict[int, Tensor] = field(default_factory=dict)
    """DoRA (Liu et al. 2024, arXiv:2402.09353): magnitude ⁄ ‖W₀ + ΔW‖ by rows."""
    untouched: set[int] = field(default_factory=set, init=False)
    """Adapters whose views of the gradient hold nothing of this step, so that their next product overwrites them."""
    plain: bool = field(init=False)
    """Whether products of all rows say everything."""

    def __post_init__(self) -> None:
        special = any(patch.bias_O is not None for patch in self.patches.values())
        self.plain = not (self.replaced or self.stretch_O or special or isinstance(self.module, nn.Embedding))
        # A module whose input needs no gradient would have no backward, but its factors need theirs.
        self._anchor = torch.zeros((), requires_grad=self.trained is not None)
        self._leaves: tuple[Tensor, Tensor] | None = None
        self._parts: dict[tuple[int, int], _Part] = {}

    def apply(self, x: Tensor, h: Tensor, groups: Sequence[Group], drop: "Drop | None") -> Tensor:
        """h of the rows that belong to adapters, as adapted."""
        if not groups:
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
                self.trained[2][which].zero_()
                self.trained[3][which].zero_()

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
            h = _replaced(self.module, self.replaced[which], x, h)
        patch = self.patches.get(which)
        if patch is None:
            return h
        a_RI, b_OR = (factor[which].to(h.dtype) for factor in self._factors())
        low = F.embedding(x, a_RI.T) if patch.embedding else F.linear(dropped, a_RI)
        shift = None if patch.bias_O is None else patch.bias_O.to(h) * patch.scale
        update = F.linear(low * patch.scale, b_OR, shift)
        if which not in self.stretch_O:
            return h + update
        bias: Tensor | None = getattr(self.module, "bias", None)
        bare = h if bias is None else h - bias
        return self.stretch_O[which] * (bare + update) + (h - bare)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B; in training as autograd's leaves, whose gradients are the views that the products add to."""
        if self.trained is None:
            return self.a_KRI, self.b_KOR
        if self._leaves is None:
            a_KRI, b_KOR, grad_a_KRI, grad_b_KOR = self.trained
            self._leaves = (a_KRI.detach().requires_grad_(), b_KOR.detach().requires_grad_())
            self._leaves[0].grad, self._leaves[1].grad = grad_a_KRI, grad_b_KOR
        return self._leaves


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
    """The factors of K adapters for one model.

    With ``train`` there is a gradient beside θ and both are float32; without it θ has the model's type.
    """

    def __init__(self, model: Model, adapters: Sequence[Adapter], *, train: bool = False) -> None:
        """`NotRunnable` names what of an adapter does not fit the model."""
        self.adapters = tuple(adapters)
        self._called: list[dict[str, str]] = []
        patches: dict[str, dict[int, Patch]] = {}
        replaced: dict[str, dict[int, dict[str, Tensor]]] = {}
        for which, adapter in enumerate(self.adapters):
            patched, others = fitted(model, adapter)
            self._called.append({name: called for called, (name, _, _) in zip(adapter.patches, patched, strict=True)})
            for name, _, patch in patched:
                patches.setdefault(name, {})[which] = patch
            for name, module, parameters in others:
                like = next(module.parameters(), model.get_input_embeddings().weight)
                replaced.setdefault(name, {})[which] = {key: value.to(like) for key, value in parameters.items()}

        sizes = [_Size.of(of.values()) for of in patches.values()]
        self.size_a = sum(size.rank * size.inputs for size in sizes)
        """How many of θ's columns are A's."""
        shape = (len(self.adapters), self.size_a + sum(size.rank * size.outputs for size in sizes))
        dtype, device = model.get_input_embeddings().weight.dtype, model.device
        self.theta_KP = torch.zeros(shape, dtype=torch.float32 if train else dtype, device=device)
        self.grad_KP = torch.zeros(shape, device=device) if train else None
        self._computed_KP = self.theta_KP if self.theta_KP.dtype == dtype else self.theta_KP.to(dtype)
        self.layers: dict[str, Layer] = {}
        self._places: dict[str, _Place] = {}
        at_a, at_b = 0, self.size_a
        for (name, of), size in zip(patches.items(), sizes, strict=True):
            place = self._places[name] = _Place(size, at_a, at_b)
            self.layers[name] = self._layer(model.get_submodule(name), place, of, replaced.pop(name, {}))
            at_a, at_b = at_a + size.rank * size.inputs, at_b + size.rank * size.outputs
        for name, others_of in replaced.items():
            self.layers[name] = self._layer(model.get_submodule(name), _Place(_Size(0, 0, 0), 0, 0), {}, others_of)
        for which, adapter in enumerate(self.adapters):
            self.put(which, factors_of(adapter), self.theta_KP)
        self.refresh()
        self._groups: list[Group] | None = None
        self._rows = 0
        self.drop: Drop | None = None
        if len(self.adapters) != 1:
            self.assign([])

    def _layer(
        self, module: nn.Module, place: "_Place", patches: dict[int, Patch], replaced: dict[int, dict[str, Tensor]]
    ) -> Layer:
        a_KRI, b_KOR = place.views(self._computed_KP)
        trained = None if self.grad_KP is None else (*place.views(self.theta_KP), *place.views(self.grad_KP))
        scales = [patches[which].scale if which in patches else 0.0 for which in range(len(self.adapters))]
        scale_K11 = torch.tensor(scales, device=a_KRI.device)[:, None, None]  # float32: rounded, it would bias all
        stretch = {
            which: _stretch(module, patch).to(a_KRI.dtype)
            for which, patch in patches.items()
            if patch.magnitude_O is not None
        }
        return Layer(module, a_KRI, b_KOR, scale_K11, trained, patches, replaced, stretch)

    def refresh(self) -> None:
        """Let the model compute with θ as it is now."""
        if self._computed_KP is not self.theta_KP:
            self._computed_KP.copy_(self.theta_KP)

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

    def factors(self, which: int, matrix_KP: Tensor | None = None) -> Factors:
        """A and B of adapter ``which`` in its own names and ranks, on the processor: of θ, or of a matrix like it."""
        found = {}
        for name, called in self._called[which].items():
            rank = self.adapters[which].patches[called].a_RI.shape[0]
            a_KRI, b_KOR = self._places[name].views(self.theta_KP if matrix_KP is None else matrix_KP)
            found[called] = (
                a_KRI[which, :rank].to("cpu", copy=True).contiguous(),
                b_KOR[which, :, :rank].to("cpu", copy=True).contiguous(),
            )
        return found

    def put(self, which: int, factors: Factors, matrix_KP: Tensor) -> None:
        """Write factors to their places in a matrix like θ: what `factors` reads there."""
        for name, called in self._called[which].items():
            a_RI, b_OR = factors[called]
            a_KRI, b_KOR = self._places[name].views(matrix_KP)
            a_KRI[which, : len(a_RI)] = a_RI.to(matrix_KP.device)
            b_KOR[which, :, : b_OR.shape[1]] = b_OR.to(matrix_KP.device)

    def touches(self, module: nn.Module | None) -> bool:
        """Whether an adapter changes what this module answers."""
        return any(layer.module is module for layer in self.layers.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model answers as adapted inside the block, and as it was after it."""
        handles = [
            layer.module.register_forward_hook(self._hook(name, layer)) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def adapt(_: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
            groups = self._groups
            if groups is None:
                groups = [Group(slice(0, 1), slice(0, len(h)))]
            elif groups and len(h) != self._rows:
                reason = f"'{name}' was given {len(h)} rows of a batch of {self._rows}, so whose they are is unknown"
                raise NotRunnable(what="Several adapters at once", reason=reason)
            return layer.apply(inputs[0], h, groups, self.drop)

        return adapt


@dataclass(frozen=True, slots=True)
class _Size:
    rank: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, patches: Iterable[Patch]) -> "_Size":
        found = list(patches)
        rank = max(patch.a_RI.shape[0] for patch in found)
        return cls(rank, found[0].a_RI.shape[1], found[0].b_OR.shape[0])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module's factors lie in a row of θ."""

    size: _Size
    at_a: int
    at_b: int

    def views(self, matrix_KP: Tensor) -> tuple[Tensor, Tensor]:
        many, (rank, inputs, outputs) = len(matrix_KP), (self.size.rank, self.size.inputs, self.size.outputs)
        a_KRI = matrix_KP[:, self.at_a : self.at_a + rank * inputs].view(many, rank, inputs)
        return a_KRI, matrix_KP[:, self.at_b : self.at_b + rank * outputs].view(many, outputs, rank)


def _stretch(module: nn.Module, patch: Patch) -> Tensor:
    """DoRA's magnitude ⁄ ‖W₀ + ΔW‖, by rows of W."""
    assert patch.magnitude_O is not None
    own_OI = dense(module)
    length_O = (own_OI + patch.update.dense().to(own_OI.device)).norm(dim=1)
    stretch_O: Tensor = patch.magnitude_O.to(length_O) / length_O
    return stretch_O


@contextmanager
def attached(model: Model, adapter: Adapter) -> Iterator[Bank]:
    """One adapter on a model, for the length of a block."""
    bank = Bank(model, [adapter])
    with bank.attached():
        yield bank
