"""Fine-tuning: LoRA adapters on one frozen base, one or many at once, with the loss on completions only.

    loss = mean over completion tokens of −ln p(token | what stands before it)
         + ½·pull·(1 − t/T)·‖θ − θ_start‖²                      when training starts from another adapter

Each of many adapters has its own rows, rates, length and chance; a step is one batch of each that is not finished,
in one pass through the base. Their losses are summed, and as no parameter is shared, each gets the gradient of its own.

The base stays in its own precision (bfloat16 where the device computes in it) and in evaluation mode; factors,
gradients and the optimiser's moments are float32. Deterministic: the order of rows and the dropout of step t are drawn
from (seed, t), so a checkpoint needs no generator's state, and a resumed run ends in the same bytes as an uninterrupted
one in the same company.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import NotRunnable, TrainingFailed
from registry.core.recipes import FineTune, recipe_digest

from .bank import Bank, Drop, Factors, factors_of, with_factors
from .data import Example, Row, asked_of, batches, pack, tokenize
from .lora import Adapter, fresh
from .loss import Loss
from .model import Model, Tokenizer, check_tokens, keeps_apart
from .weights import read_metadata, read_tensors, write_tensors

Report = Callable[[dict[str, Any]], None]
CHECKPOINT = "checkpoint.safetensors"


def silent(_: dict[str, Any]) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class Task:
    """One adapter to be trained: how, on what, and from where (None: A random, B = 0)."""

    recipe: FineTune
    rows: Sequence[Row]
    start: Adapter | None = None


@dataclass(frozen=True)
class Trained:
    """A finished training: the adapter, the loss of every step, and the tokens it saw, padding included."""

    adapter: Adapter
    losses: tuple[float, ...]
    tokens: int


def finetune(
    model: Model,
    tokenizer: Tokenizer,
    recipe: FineTune,
    rows: Sequence[Row],
    *,
    start: Adapter | None = None,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
) -> Trained:
    """Train as ``recipe`` says; with ``start`` its modules, ranks and scales are trained on, from its factors.

    ``report`` is called after every step with ``step``, ``steps``, ``loss`` and ``tokens``; when it raises
    KeyboardInterrupt a checkpoint is left in ``checkpoint_dir``, from which the same call goes on.
    """
    [trained] = finetune_many(
        model, tokenizer, [Task(recipe, rows, start)], report=report, checkpoint_dir=checkpoint_dir
    )
    return trained


def finetune_many(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
) -> list[Trained]:
    """Train an adapter per task, all at once, as each would be alone but for rounding.

    Where memory does not take a step in one pass it is made in twice as many, and so on; ``passes`` is reported then.

    ``report`` is called after every step of every task, with ``task``, its place, too. `TrainingFailed` names the
    rows on which a loss or gradient was no number; the last checkpoint stays.
    """
    runs = [_Run.of(place, model, tokenizer, task) for place, task in enumerate(tasks)]
    path = None if checkpoint_dir is None else checkpoint_dir / CHECKPOINT
    if path is not None:
        _resume(path, runs)
    with torch.random.fork_rng():
        while live := [run for run in runs if not run.finished]:
            _together(model, live, report, lambda: None if path is None else _save(path, runs))
    return [Trained(with_factors(run.start, run.factors), tuple(run.losses), run.tokens) for run in runs]


# ── one adapter's run ────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Run:
    """A task on its way."""

    place: int
    recipe: FineTune
    start: Adapter
    factors: Factors
    """As they were when the run was left."""
    identity: str
    ahead: Iterator[list[Example]]
    pulled: bool
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    moments: tuple[Factors, Factors] | None = None
    """The optimiser's first and second, after a step."""

    @classmethod
    def of(cls, place: int, model: Model, tokenizer: Tokenizer, task: Task) -> "_Run":
        adapter = task.start or fresh(model, task.recipe)
        if any(patch.magnitude_O is not None for patch in adapter.patches.values()):
            raise NotRunnable(what="Training from this adapter", reason="it has DoRA magnitudes")
        examples = [tokenize(tokenizer, _trainable(row), task.recipe.max_length) for row in task.rows]
        check_tokens(model, (token for example in examples for token in example.ids))
        first = [factor for patch in adapter.patches.values() for factor in (patch.a_RI, patch.b_OR)][:2]
        marks = " ".join(f"{factor.double().abs().sum().item():.17g}" for factor in first)
        ahead = batches(examples, task.recipe.batch_tokens, task.recipe.seed)
        pulled = bool(task.recipe.pull) and task.start is not None
        identity = f"{recipe_digest(task.recipe)} {marks}"
        return cls(place, task.recipe, adapter, factors_of(adapter), identity, ahead, pulled)

    @property
    def finished(self) -> bool:
        return len(self.losses) >= self.recipe.steps


def _together(model: Model, live: Sequence[_Run], report: Report, save: Callable[[], object]) -> None:
    """Steps of all ``live`` runs until one of them is finished; then every run knows where it is."""
    bank = Bank(model, [run.start for run in live], train=True)
    assert bank.grad_KP is not None
    began_KP = bank.theta_KP.clone() if any(run.pulled for run in live) else None
    optimizer = _Optimizer(bank, live)
    gradients = _Gradients(model, bank, live)
    limits_K = torch.tensor([run.recipe.max_grad_norm for run in live], device=model.device)
    with bank.attached():
        while not any(run.finished for run in live):
            steps = [len(run.losses) for run in live]
            drawn = [next(run.ahead) for run in live]
            means_K, tokens_K = gradients(drawn)
            _finite("loss", means_K, live, drawn)
            for place, (run, step) in enumerate(zip(live, steps, strict=True)):
                if run.pulled and began_KP is not None:
                    weight = run.recipe.pull * (1 - step / run.recipe.steps)
                    bank.grad_KP[place].add_(bank.theta_KP[place] - began_KP[place], alpha=weight)
            norms_K = torch.linalg.vector_norm(bank.grad_KP, dim=1)
            _finite("gradient", norms_K.tolist(), live, drawn)
            clip_K = (limits_K / (norms_K + 1e-6)).clamp(max=1.0)
            if bool((clip_K < 1).any()):
                bank.grad_KP.mul_(clip_K[:, None])
            optimizer.step([learning_rate(run.recipe, step) for run, step in zip(live, steps, strict=True)])
            bank.refresh()
            for run, mean, tokens in zip(live, means_K, tokens_K, strict=True):
                run.losses.append(mean)
                run.tokens += tokens
            asked_to_stop = _tell(live, report, gradients.parts)
            if asked_to_stop is not None or _checkpoint_is_due(live):
                optimizer.leave(live)
                save()
            if asked_to_stop is not None:
                raise asked_to_stop
    optimizer.leave(live)


class _Gradients:
    """Losses and gradients of a step, in one pass through the base or, where memory does not take that, in several."""

    def __init__(self, model: Model, bank: Bank, live: Sequence[_Run]) -> None:
        self._model, self._bank, self._live = model, bank, live
        if any(run.recipe.dropout for run in live):
            bank.drop = Drop([run.recipe.dropout for run in live], [torch.Generator(model.device) for _ in live])
        self._together = keeps_apart(model)
        self._loss = Loss(model, head_is_adapted=bank.touches(model.get_output_embeddings()))
        self.parts = 1
        """Passes per step: twice as many each time that memory ran out."""

    def __call__(self, drawn: Sequence[list[Example]]) -> tuple[list[float], list[int]]:
        """The mean loss and the tokens of each adapter's batch; the gradients are in the bank.

        `TrainingFailed` when there is no memory for single rows.
        """
        while True:
            try:
                return self._passes(drawn)
            except RuntimeError as error:  # torch's errors of memory are of this kind on every device
                if not _is_out_of_memory(error):
                    raise
                if self.parts >= max(map(len, drawn)):
                    step = len(self._live[0].losses) + 1
                    raise TrainingFailed(step=step, reason="out of memory with one row of each adapter") from error
            self.parts *= 2
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(self, drawn: Sequence[list[Example]]) -> tuple[list[float], list[int]]:
        asked = [asked_of(batch) for batch in drawn]
        means_K = torch.zeros(len(drawn), device=self._model.device)
        tokens_K = [0] * len(drawn)
        for run, chance in zip(self._live, self._bank.drop.chances if self._bank.drop else [], strict=False):
            chance.manual_seed((run.recipe.seed << 32) + len(run.losses))
        with self._bank.gradients(at_once=self.parts == 1):
            for part in range(min(self.parts, max(map(len, drawn)))):
                some = [batch[part :: self.parts] for batch in drawn]
                packed = pack(some, together=self._together, asked=asked).to(self._model.device)
                self._bank.assign(list(enumerate(packed.rows)))
                total, losses_N = self._loss(packed)
                total.backward()
                means_K.index_add_(0, packed.owner_N, losses_N * packed.weights_N)
                width = packed.ids_BT.shape[1]
                tokens_K = [tokens + rows * width for tokens, rows in zip(tokens_K, packed.rows, strict=True)]
        return means_K.tolist(), tokens_K


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tell(live: Sequence[_Run], report: Report, parts: int) -> KeyboardInterrupt | None:
    """Report the step of each run, in how many passes it was made if not in one; what the report asked to stop by."""
    asked_to_stop = None
    more = {"passes": parts} if parts > 1 else {}
    for run in live:
        told = {"step": len(run.losses), "steps": run.recipe.steps, "loss": run.losses[-1], "tokens": run.tokens}
        try:
            report(told | {"task": run.place} | more)
        except KeyboardInterrupt as interrupt:
            asked_to_stop = interrupt
    return asked_to_stop


def _checkpoint_is_due(live: Sequence[_Run]) -> bool:
    return any(run.recipe.checkpoint_every and len(run.losses) % run.recipe.checkpoint_every == 0 for run in live)


def _finite(what: str, values: Sequence[float], live: Sequence[_Run], drawn: Sequence[Sequence[Example]]) -> None:
    for run, value, batch in zip(live, values, drawn, strict=True):
        if not math.isfinite(value):
            raise TrainingFailed(step=len(run.losses) + 1, reason=f"the {what} is {value} on {_lines(batch)}")


class _Optimizer:
    """AdamW, for each adapter with rates of its own; θ's rows are its parameters, all of A and all of B apart."""

    def __init__(self, bank: Bank, live: Sequence[_Run]) -> None:
        """Runs go on from where they were left."""
        assert bank.grad_KP is not None
        self._bank = bank
        self._moments = (torch.zeros_like(bank.theta_KP), torch.zeros_like(bank.theta_KP))
        groups = []
        for place, run in enumerate(live):
            bank.put(place, run.factors, bank.theta_KP)
            for matrix, factors in zip(self._moments, run.moments or (), strict=False):
                bank.put(place, factors, matrix)
            ratio = run.recipe.learning_rate_b_ratio
            for part, times in ((slice(0, bank.size_a), 1.0), (slice(bank.size_a, None), ratio)):
                parameter = bank.theta_KP[place, part].detach()
                parameter.grad = bank.grad_KP[place, part]
                groups.append({"params": [parameter], "times": times, "weight_decay": run.recipe.weight_decay})
        self._adamw = torch.optim.AdamW(groups, fused=True)
        for group, (place, part) in zip(self._adamw.param_groups, self._parts(len(live)), strict=True):
            self._adamw.state[group["params"][0]] = {
                "step": torch.tensor(float(len(live[place].losses)), device=bank.theta_KP.device),
                "exp_avg": self._moments[0][place, part],
                "exp_avg_sq": self._moments[1][place, part],
            }
        bank.refresh()

    def _parts(self, many: int) -> list[tuple[int, slice]]:
        ends = (slice(0, self._bank.size_a), slice(self._bank.size_a, None))
        return [(place, part) for place in range(many) for part in ends]

    def step(self, rates: Sequence[float]) -> None:
        """One step of all adapters, each at its rate."""
        for group, (place, _) in zip(self._adamw.param_groups, self._parts(len(rates)), strict=True):
            group["lr"] = rates[place] * group["times"]
        self._adamw.step()

    def leave(self, live: Sequence[_Run]) -> None:
        """Let every run know its factors and moments."""
        for place, run in enumerate(live):
            run.factors = self._bank.factors(place)
            first, second = (self._bank.factors(place, matrix) for matrix in self._moments)
            run.moments = (first, second)


def learning_rate(recipe: FineTune, step: int) -> float:
    """The rate of A at a step counted from 0: a linear rise over the warm-up, then the schedule down towards 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    match recipe.schedule:
        case "constant":
            return recipe.learning_rate
        case "linear":
            return recipe.learning_rate * (1 - done)
        case "cosine":
            return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _trainable(row: Row) -> Row:
    if "choices" in row.value:
        raise row.refuse("rows with 'choices' are for suites; training needs one completion")
    return row


def _lines(batch: Sequence[Example]) -> str:
    return "rows " + ", ".join(f"{example.row.path}:{example.row.line}" for example in batch)


# ── checkpoints ──────────────────────────────────────────────────────────────


def _save(path: Path, runs: Sequence[_Run]) -> None:
    """Factors, moments, and how far each run is: the batches and the chance of a step follow from its number."""
    tensors: dict[str, Tensor] = {}
    for run in runs:
        kinds = {"theta": run.factors} | dict(zip("mv", run.moments or (), strict=False))
        for kind, factors in kinds.items():
            for name, (a_RI, b_OR) in factors.items():
                tensors |= {f"{run.place}.{kind}.{name}.A": a_RI, f"{run.place}.{kind}.{name}.B": b_OR}
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [{"identity": run.identity, "losses": run.losses, "tokens": run.tokens} for run in runs]
    write_tensors(path, tensors, {"runs": json.dumps(told)})


def _resume(path: Path, runs: Sequence[_Run]) -> None:
    """Put every run where the checkpoint left it; nothing happens when there is none of these very runs."""
    if not path.is_file():
        return
    told = json.loads(read_metadata(path).get("runs", "[]"))
    if [run.identity for run in runs] != [saved["identity"] for saved in told]:
        return
    tensors = read_tensors(path)

    def factors(run: _Run, kind: str) -> Factors:
        place = f"{run.place}.{kind}"
        return {name: (tensors[f"{place}.{name}.A"], tensors[f"{place}.{name}.B"]) for name in run.factors}

    for run, saved in zip(runs, told, strict=True):
        run.losses, run.tokens = saved["losses"], saved["tokens"]
        if run.losses:
            run.moments = (factors(run, "m"), factors(run, "v"))
            run.factors = factors(run, "theta")
            run.ahead = itertools.islice(run.ahead, len(run.losses), None)
