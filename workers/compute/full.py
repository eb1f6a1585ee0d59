"""Full fine-tuning: the base's own weights are trained, all or some; what LoRA is compared with (arXiv:2106.09685).

    W ← AdamW(W, ∂loss⁄∂W)        loss = mean over completion tokens of −ln p(token | what stands before it)

Rows, batches, rates, clipping, looks and ends are those of `finetune`, the loss is that of `loss`. Gradients, moments
and the weights that AdamW steps are float32; where the model computes in bfloat16 it is given them rounded, because a
step is far below a weight's unit in the last place (Micikevicius et al. 2018, arXiv:1710.03740). So a weight takes 16
bytes, or 18 with its copy in bfloat16, beside the activations. Vectors (norms, biases) do not decay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from registry.core.errors import NotRunnable, TrainingFailed, Unchanged
from registry.core.recipes import FullFineTune, recipe_digest
from registry.core.targets import check_parameters, runs

from . import checkpoint
from .checkpoint import State
from .course import Counted, Course, is_out_of_memory, laid_out, learning_rate, no_number
from .data import Example, Packed, Row, asked_of, encoded, pack
from .distributed import ALONE, OUT_OF_MEMORY, Ranks, load_sharded, part_of
from .finetune import Report, silent
from .loss import Loss
from .merge import OUT_TYPES, Form, Merged, rewrite
from .model import Model, attending, dtype_for, keeps_apart, load, whole
from .recompute import recomputing
from .shards import FLOATS, Stored, stored_names, stored_tensors
from .stream import Change
from .weights import DTYPES


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finished full fine-tuning."""

    weights: Mapping[str, Tensor]
    """The trained ones in float32, on the processor, by the names under which the base's files keep them."""
    losses: tuple[float, ...]
    """Of every step."""
    tokens: int
    """That it saw, padding included."""
    held_out: tuple[tuple[int, float], ...] = ()
    """Steps after which rows held out were looked at, and their loss."""
    kept: int = 0
    """The step whose weights these are: the last one, or with patience that of the best look."""
    counted: Counted = field(default_factory=Counted)
    """What became of the rows."""


def tune(
    base: Path,
    recipe: FullFineTune,
    rows: Sequence[Row],
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
    ranks: Ranks = ALONE,
) -> Tuned:
    """Train the weights of the base in folder ``base`` as ``recipe`` says; the folder stays as it is.

    ``report`` is called after every step; when it raises KeyboardInterrupt a checkpoint is left in ``checkpoint_dir``,
    from which the same call goes on to the same bytes. `TrainingFailed` names the rows on which the loss or the
    gradient was no number. All ``ranks`` call this alike; weights, gradients and moments are sharded among them, and
    the first alone has the weights in the end, and writes checkpoints.
    """
    computes_in = dtype_for(recipe.precision)
    if ranks.mesh is None:
        model, tokenizer = load(base, "fp32")
    else:
        model, tokenizer = load_sharded(base, "fp32", ranks.mesh, computes_in=computes_in)
    if getattr(model.config, "quantization_config", None):
        raise NotRunnable(what="Full fine-tuning", reason="the base is quantised; train its unquantised weights")
    names = _trained(model, recipe)
    kept_as = _kept_as(model, names, stored_tensors(base))
    ahead, held, counted = laid_out(model, recipe, encoded(tokenizer, rows))
    course = _Course(recipe=recipe, counted=counted, ahead=ahead, held=held)
    weights = _Weights(model, names, computes_in if ranks.mesh is None else torch.float32, recipe.weight_decay, ranks)
    identity = str(recipe_digest(recipe))
    if checkpoint_dir is not None and (state := checkpoint.read(checkpoint_dir, identity)) is not None:
        course.go_to(dict(state.told))
        weights.go_to(state)
        course.best = weights.by_name("best", state)
    gradients = _Gradients(model, weights, ranks)

    def save() -> None:
        if checkpoint_dir is not None:
            state = weights.state(course)
            if ranks.first:
                checkpoint.save(checkpoint_dir, {identity: state})
        ranks.wait()

    with recomputing(model) if recipe.activation_checkpointing else nullcontext():
        while not course.ended:
            _step(course, weights, gradients, report, save, ranks)
    kept = course.step if course.best is None else course.best_look[0]
    found = weights.on_the_processor() if course.best is None else course.best
    stored = {other: found[name] for name, others in kept_as.items() for other in others if ranks.first}
    return Tuned(stored, tuple(course.losses), course.tokens, tuple(course.looks), kept, counted)


def _step(
    course: "_Course",
    weights: "_Weights",
    gradients: "_Gradients",
    report: Report,
    save: Callable[[], None],
    ranks: Ranks,
) -> None:
    batch, step = next(course.ahead), course.step
    mean, tokens = gradients(batch, step + 1)
    norm = weights.norm()
    for what, value in (("loss", mean), ("gradient", norm)):
        if failure := no_number(what, value, step + 1, batch):
            raise failure
    clip = min(1.0, course.recipe.max_grad_norm / (norm + 1e-6))
    weights.step(learning_rate(course.recipe, step), clip=clip)
    course.losses.append(mean)
    course.tokens += tokens
    if course.wants_a_look:
        course.looks.append((course.step, gradients.held_out(course.held)))
        if course.is_best:
            course.best = weights.on_the_processor()
    asked_to_stop = False
    try:
        report(course.told() | ({"passes": gradients.parts} if gradients.parts > 1 else {}))
    except KeyboardInterrupt:
        asked_to_stop = True
    asked_to_stop = ranks.any(asked_to_stop)
    if asked_to_stop or course.wants_a_checkpoint:
        save()
    if asked_to_stop:
        raise KeyboardInterrupt


def write_tuned(base: Path, tuned: Tuned, out: Path, dtype: str | None = None, report: Report = silent) -> Merged:
    """The base with its trained weights, as a folder like ``base``: same files, names and ties, and the base's types
    unless ``dtype`` (a key of `OUT_TYPES`) asks for another. `Unchanged` when rounding leaves nothing of the training.
    """
    stored = stored_tensors(base)
    kind = OUT_TYPES[dtype] if dtype else None
    if all(_is_same(stored[name], value, kind) for name, value in tuned.weights.items()):
        kinds = ", ".join(sorted({kind or stored[name].dtype for name in tuned.weights}))
        raise Unchanged(steps=tuned.kept, dtype=kinds)
    changes = {name: Change(value=value) for name, value in tuned.weights.items()}
    return rewrite(base, changes, out, report, Form(dtype))


def _is_same(stored: Stored, value: Tensor, kind: str | None) -> bool:
    dtype = DTYPES[kind or stored.dtype]
    value = value.reshape(stored.shape or (1,))
    with stored.path.open("rb") as file:
        return all(torch.equal(block.to(dtype), value[rows].to(dtype)) for rows, block in stored.blocks(file.fileno()))


# ── which weights ────────────────────────────────────────────────────────────


def _trained(model: Model, recipe: FullFineTune) -> list[str]:
    """Names of the parameters to train, in the model's order; `UnknownTargets` names what means none."""
    spelled: dict[str, set[str]] = {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied one is meant by either name
        spelled.setdefault(first[id(parameter)], set()).update(runs(name))
    check_parameters(recipe.parameters, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    return [name for name, ends in spelled.items() if not recipe.parameters or ends & set(recipe.parameters)]


def _kept_as(model: Model, names: Sequence[str], stored: Mapping[str, Stored]) -> dict[str, list[str]]:
    """Under which names the base's files keep each parameter: refused before the training what cannot be written."""
    found = {name: stored_names(model, name, stored) for name in names}
    for name, others in found.items():
        if not others:
            raise NotRunnable(what="Full fine-tuning", reason=f"the base stores no tensor '{name}'")
        if any(stored[other].dtype not in FLOATS for other in others):
            raise NotRunnable(what="Full fine-tuning", reason=f"'{name}' is stored as {stored[others[0]].dtype}")
    return found


@dataclass(eq=False, kw_only=True)
class _Course(Course):
    best: Mapping[str, Tensor] | None = None
    """With patience: the weights at the best look so far."""


class _Weights:
    """The trained parameters, their float32 values, and AdamW on these."""

    def __init__(
        self, model: Model, names: Sequence[str], dtype: torch.dtype, decay: float, ranks: Ranks = ALONE
    ) -> None:
        """``model`` is in float32; from here on it computes in ``dtype``."""
        self._ranks = ranks
        self.exact: dict[str, Tensor] = {}
        self._computed: dict[str, nn.Parameter] = {}
        wanted = set(names)
        for name, parameter in model.named_parameters():
            exact = parameter.data
            if dtype != torch.float32:
                parameter.data = exact.to(dtype)
            if name not in wanted:
                continue
            parameter.requires_grad_(True)
            self._computed[name] = parameter
            if dtype == torch.float32:
                self.exact[name] = parameter
            else:
                self.exact[name] = exact
                parameter.register_post_accumulate_grad_hook(lambda p, exact=exact: _hand_over(p, exact))
        matrices, vectors = ([p for p in self.exact.values() if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)

    def clear(self) -> None:
        """Forget the gradients."""
        for name, exact in self.exact.items():
            exact.grad = self._computed[name].grad = None  # memory may run out before one is handed over

    def norm(self) -> float:
        """‖gradient‖ over all weights together."""
        grads = [exact.grad for exact in self.exact.values() if exact.grad is not None]
        return float(whole(torch.nn.utils.get_total_norm(grads)))

    @torch.no_grad()
    def step(self, rate: float, *, clip: float) -> None:
        """One step of AdamW along the gradient times ``clip``."""
        if clip < 1:
            torch._foreach_mul_([exact.grad for exact in self.exact.values() if exact.grad is not None], clip)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        for name, parameter in self._computed.items():
            if parameter is not self.exact[name]:
                parameter.copy_(self.exact[name])

    def on_the_processor(self) -> dict[str, Tensor]:
        """The weights as they are now, copied; put together where they are sharded, and kept by the first rank."""
        return self._kept({name: exact.detach() for name, exact in self.exact.items()})

    def _kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the processor: one by one put together, all ranks at once, and kept by the first of them."""
        kept = {}
        for name, tensor in tensors.items():
            put_together = whole(tensor)
            if self._ranks.first:
                kept[name] = put_together.to("cpu", copy=True)
        return kept

    # ── checkpoints ──

    def state(self, course: _Course) -> State:
        """Weights, moments, and how far the training is."""
        tensors = {f"theta.{name}": exact.detach() for name, exact in self.exact.items()}
        for name, exact in self.exact.items():
            moments = self._adamw.state.get(exact, {})  # nothing for a weight that no gradient ever reached
            tensors |= {f"{kind}.{name}": moments[key] for kind, key in _MOMENTS.items() if key in moments}
        tensors |= {f"best.{name}": value for name, value in (course.best or {}).items()}
        if self._ranks.mesh is not None:
            tensors = self._kept(tensors)
        return State(course.step, tensors, course.noted())

    @torch.no_grad()
    def go_to(self, state: State) -> None:
        """Be where a checkpoint was made."""
        for name, exact in self.exact.items():
            exact.copy_(part_of(exact, state.tensors[f"theta.{name}"]))
            if f"m.{name}" in state.tensors:
                self._adamw.state[exact] = {"step": torch.tensor(float(state.step), device=exact.device)}
                for kind, key in _MOMENTS.items():
                    self._adamw.state[exact][key] = part_of(exact, state.tensors[f"{kind}.{name}"])
            if self._computed[name] is not exact:
                self._computed[name].copy_(exact)

    def by_name(self, kind: str, state: State) -> dict[str, Tensor] | None:
        """What a checkpoint keeps of this kind, if it does."""
        kept = {name: state.tensors.get(f"{kind}.{name}") for name in self.exact}
        return {name: value for name, value in kept.items() if value is not None} or None


_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


def _hand_over(parameter: Tensor, exact: Tensor) -> None:
    """Add a gradient to the one in float32 as soon as it is there, and let it go."""
    assert parameter.grad is not None
    if exact.grad is None:
        exact.grad = parameter.grad.float()
    else:
        exact.grad.add_(parameter.grad)
    parameter.grad = None


class _Gradients:
    """The loss and the gradients of a step, in one pass or, where memory does not take that, in several."""

    def __init__(self, model: Model, weights: _Weights, ranks: Ranks) -> None:
        self._model, self._weights, self._ranks = model, weights, ranks
        self._together = keeps_apart(model)
        self._loss = Loss(model, head_is_adapted=False)
        self.parts = 1
        """Passes per step: twice as many each time that memory ran out."""

    def __call__(self, batch: Sequence[Example], step: int) -> tuple[float, int]:
        """The mean loss of a batch, and its tokens; its gradients are the weights'."""
        while True:
            self._weights.clear()
            try:
                return self._passes(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.parts >= len(batch) or self._ranks.many > 1:
                    reason = "out of memory with one row" if self._ranks.many == 1 else OUT_OF_MEMORY
                    raise TrainingFailed(step=step, reason=reason) from error
            self.parts *= 2
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(self, batch: Sequence[Example]) -> tuple[float, int]:
        sums = torch.zeros(2, dtype=torch.float64, device=self._model.device)
        for part in range(self._ranks.passes(len(batch), self.parts)):
            packed = self._packed(batch, part, self.parts, asked_of(batch))
            with attending(self._model, packed.ids_BT.shape[1]):
                total, _ = self._loss(packed)
                total.backward()
            sums += torch.tensor([float(total.detach()), packed.ids_BT.numel()], device=sums.device)
        self._ranks.add_up(sums)
        mean, tokens = sums.tolist()
        return mean, int(tokens)

    @torch.no_grad()
    def held_out(self, held: Sequence[Sequence[Example]]) -> float:
        """The mean loss over tokens of the rows held out."""
        total = torch.zeros(1, dtype=torch.float64, device=self._model.device)
        for batch in held:
            packed = self._packed(batch, 0, 1, 1)
            total += (self._loss(packed)[1].double() * packed.weights_N).sum()
        self._ranks.add_up(total)
        return float(total) / sum(map(asked_of, held))

    def _packed(self, batch: Sequence[Example], part: int, parts: int, asked: float) -> Packed:
        """This rank's rows for a pass; where it has none, a row that weighs nothing: layers need all ranks."""
        some = self._ranks.share(batch, part, parts)
        weighed = pack([some or batch[:1]], together=self._together, asked=[asked if some else math.inf])
        return weighed.to(self._model.device)
