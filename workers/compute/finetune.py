"""Fine-tuning: LoRA adapters on one frozen base, one or many at once, with the loss on completions only.

    loss = mean over completion tokens of −ln p(token | what stands before it)
         + ½·pull·(1 − t/T)·‖θ − θ_start‖²                      when training starts from another adapter

Each of many adapters has its own rows, rates, length and chance; a step is one batch of each that is not finished,
in one pass through the base. Their losses are summed, and as no parameter is shared, each gets the gradient of its own.
Where one ends (by its steps, by its loss on rows held out, by a failure) the next that waits takes its place.

The base stays in its own precision (bfloat16 where the device computes in it) and in evaluation mode; factors,
gradients and the optimiser's moments are float32. Deterministic: the order of rows and the dropout of step t are drawn
from (seed, t), so a checkpoint needs no generator's state, and a resumed run ends in the same bytes as an uninterrupted
one in the same company.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from registry.core.errors import LoractlError, TrainingFailed
from registry.core.recipes import FineTune, recipe_digest

from . import checkpoint
from .bank import Bank, Drop, Parts, parts_of, with_parts
from .checkpoint import State
from .course import Counted, Course, is_out_of_memory, laid_out, learning_rate, no_number
from .data import Example, Packed, Row, asked_of, encoded, pack
from .distributed import ALONE, OUT_OF_MEMORY, Ranks
from .lora import Adapter, fresh
from .loss import Loss
from .model import Model, Tokenizer, attending, keeps_apart
from .rate import rate_of, with_rate
from .recompute import recomputing
from .variants import varied

Report = Callable[[dict[str, Any]], None]


def silent(_: dict[str, Any]) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class Task:
    """One adapter to be trained: how, on what, and from where (None: A random, B = 0)."""

    recipe: FineTune
    rows: Sequence[Row | Example]
    start: Adapter | None = None
    owner: str = ""
    """In front of what a checkpoint is found by, for one of several trainings that belong together."""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    adapter: Adapter
    losses: tuple[float, ...]
    """Of every step."""
    tokens: int
    """That it saw, padding included."""
    held_out: tuple[tuple[int, float], ...] = ()
    """Steps after which rows held out were looked at, and their loss."""
    kept: int = 0
    """The step whose factors these are: the last one, or with patience that of the best look."""
    counted: Counted = field(default_factory=Counted)
    rate: float = 0.0
    """The learning rate of the recipe, or the one that its placement gave it."""


Outcome = Trained | LoractlError


def finetune(
    model: Model,
    tokenizer: Tokenizer,
    recipe: FineTune,
    rows: Sequence[Row | Example],
    *,
    start: Adapter | None = None,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train as ``recipe`` says; with ``start`` its modules, ranks and scales are trained on, from its factors.

    ``report`` is called after every step with ``step``, ``steps``, ``loss`` and ``tokens``; when it raises
    KeyboardInterrupt a checkpoint is left in ``checkpoint_dir``, from which the same call goes on.
    """
    [trained] = finetune_many(
        model, tokenizer, [Task(recipe, rows, start)], report=report, checkpoint_dir=checkpoint_dir, ranks=ranks
    )
    return trained


def finetune_many(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
    tokens_at_once: int | None = None,
    ranks: Ranks = ALONE,
) -> list[Trained]:
    """Train an adapter per task, all at once, as each would be alone but for rounding (see `as_trained`).

    What goes wrong with one of them is raised: `TrainingFailed` names the rows on which a loss or gradient was no
    number; the last checkpoint stays.
    """
    found: dict[int, Trained] = {}
    options: dict[str, Any] = {"report": report, "checkpoint_dir": checkpoint_dir, "tokens_at_once": tokens_at_once}
    for place, outcome in as_trained(model, tokenizer, tasks, **options, ranks=ranks):
        if isinstance(outcome, LoractlError):
            raise outcome
        found[place] = outcome
    return [found[place] for place in range(len(tasks))]


def as_trained(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
    tokens_at_once: int | None = None,
    unwanted: Collection[int] = (),
    until: int | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, Outcome]]:
    """Train an adapter per task and give each, by its place, when it ends; what one fails by is nobody else's.

    ``tokens_at_once`` limits the sum of the recipes' ``batch_tokens`` in a step (one task goes through in any case):
    whoever does not fit waits in order until there is room. ``unwanted`` are places that are looked at after every
    step: their training ends without an outcome. At step ``until`` training pauses: every task that is not finished
    gives what it has then, a checkpoint is left, and the same call with a later step, or none, goes on from there.

    Where memory does not take a step in one pass it is made in twice as many, and so on; ``passes`` is reported then.
    ``report`` is called after every step of every task, with ``task``, its place, too. All ``ranks`` call this with
    the same tasks, each reports, and each is told the same outcomes; the model is their `load_sharded`.
    """
    runs: list[_Run] = []
    known: dict[int, list[Example]] = {}  # tasks on the same rows share their tokens
    for place, task in enumerate(tasks):
        try:
            if id(task.rows) not in known:
                known[id(task.rows)] = encoded(tokenizer, task.rows)
            others = Counter(run.identity for run in runs)
            runs.append(_Run.of(place, model, task, known[id(task.rows)], others, until))
        except LoractlError as error:
            yield place, error
    if checkpoint_dir is not None:
        for run in runs:
            run.go_on_from(checkpoint.read(checkpoint_dir, run.identity))

    def save() -> None:
        if checkpoint_dir is not None and ranks.first:
            sound = [run for run in runs if run.failure is None]
            failed = [run.identity for run in runs if run.failure is not None]
            checkpoint.save(checkpoint_dir, {run.identity: run.state() for run in sound}, keep=failed)
        ranks.wait()  # who leaves earlier would have the one that writes killed

    waiting = list(runs)
    while waiting:
        for run in [run for run in waiting if run.ended or run.place in unwanted]:
            waiting.remove(run)
            if run.place not in unwanted:
                yield run.place, run.outcome()
        if live := _admitted(waiting, tokens_at_once):
            with torch.random.fork_rng():
                _together(model, live, report, save, unwanted, ranks)
            if until is not None:
                save()


def _admitted(waiting: Sequence["_Run"], tokens_at_once: int | None) -> list["_Run"]:
    """Who trains now: in order, each that still fits; at least the first."""
    live: list[_Run] = []
    room = math.inf if tokens_at_once is None else tokens_at_once
    for run in waiting:
        if not live or run.recipe.batch_tokens <= room:
            live.append(run)
            room -= run.recipe.batch_tokens
    return live


# ── one adapter's run ────────────────────────────────────────────────────────


@dataclass(eq=False, kw_only=True)
class _Run(Course):
    """A task on its way."""

    recipe: FineTune
    place: int
    start: Adapter
    parts: Parts
    """As they were when the run was left."""
    identity: str
    pulled: bool
    until: int
    """The step at which it ends for now."""
    moments: tuple[Parts, Parts] | None = None
    """The optimiser's first and second, after a step."""
    best: Parts | None = None
    """With patience: what was trained, as of the best look so far."""
    failure: LoractlError | None = None

    @classmethod
    def of(
        cls, place: int, model: Model, task: Task, examples: Sequence[Example], others: Counter[str], until: int | None
    ) -> "_Run":
        adapter = varied(model, task.recipe, task.start or fresh(model, task.recipe))
        ahead, held, counted = laid_out(model, task.recipe, examples)
        first = [factor for patch in adapter.patches.values() for factor in (patch.a_RI, patch.b_OR)][:2]
        marks = " ".join(f"{factor.double().abs().sum().item():.17g}" for factor in first)
        identity = f"{task.owner}{recipe_digest(task.recipe)} {marks}"
        while others[identity]:  # the very same task again
            identity += " again"
        return cls(
            recipe=with_rate(model, task.recipe, adapter), counted=counted, ahead=ahead, held=held, place=place,
            start=adapter, parts=parts_of(adapter), identity=identity,
            pulled=bool(task.recipe.pull) and task.start is not None,
            until=task.recipe.steps if until is None else min(until, task.recipe.steps),
        )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether no step is left to make for now, or none can be made."""
        return self.failure is not None or self.step >= self.until or super().ended

    @property
    def wants_a_look(self) -> bool:
        """Whether rows held out are due after the step just made."""
        return self.failure is None and super().wants_a_look

    def looked(self, loss: float, parts: Callable[[], Parts]) -> None:
        """Note the loss on rows held out, and with patience what is trained where it is the best so far."""
        self.looks.append((self.step, loss))
        if self.is_best:
            self.best = parts()

    def outcome(self) -> Outcome:
        """The adapter, or what it failed by."""
        if self.failure is not None:
            return self.failure
        parts, kept = (self.parts, self.step) if self.best is None else (self.best, self.best_look[0])
        adapter = with_parts(self.start, parts)
        rate = rate_of(self.recipe)
        return Trained(adapter, tuple(self.losses), self.tokens, tuple(self.looks), kept, self.counted, rate)

    # ── checkpoints: the batches and the chance of a step follow from its number ──

    def state(self) -> State:
        """What is trained, its moments, and how far the run is."""
        kinds = {"theta": self.parts} | dict(zip("mv", self.moments or (), strict=False))
        if self.best is not None:
            kinds["best"] = self.best
        tensors = {f"{kind}.{name}": part for kind, parts in kinds.items() for name, part in parts.items()}
        return State(self.step, tensors, self.noted())

    def go_on_from(self, state: State | None) -> None:
        """Be where a checkpoint left the run; nothing happens without one."""
        if state is None or not state.step:
            return

        def parts(kind: str) -> Parts:
            return {name: state.tensors[f"{kind}.{name}"] for name in self.parts}

        self.go_to(dict(state.told))
        self.moments = (parts("m"), parts("v"))
        if self.recipe.patience and self.looks:
            self.best = parts("best")
        self.parts = parts("theta")


def _together(
    model: Model,
    live: Sequence[_Run],
    report: Report,
    save: Callable[[], None],
    unwanted: Collection[int],
    ranks: Ranks,
) -> None:
    """Steps of all ``live`` runs until one of them has ended; then every run knows where it is."""
    bank = Bank(model, [run.start for run in live], train=True)
    assert bank.grad_KP is not None
    began_KP = bank.theta_KP.clone() if any(run.pulled for run in live) else None
    optimizer = _Optimizer(bank, live)
    gradients = _Gradients(model, bank, live, ranks)
    limits_K = torch.tensor([run.recipe.max_grad_norm for run in live], device=model.device)
    with bank.attached(), _sparing(model, bank, live):
        while not any(run.ended or run.place in unwanted for run in live):
            drawn = [next(run.ahead) for run in live]
            means_K, tokens_K = gradients(drawn)
            _check("loss", means_K, live, drawn)
            for place, run in enumerate(live):
                if run.pulled and began_KP is not None:
                    weight = run.recipe.pull * (1 - run.step / run.recipe.steps)
                    bank.grad_KP[place].add_(bank.theta_KP[place] - began_KP[place], alpha=weight)
            bank.to_cores()
            norms_K = torch.linalg.vector_norm(bank.grad_KP, dim=1)
            _check("gradient", norms_K.tolist(), live, drawn)
            if all(run.failure for run in live):
                return
            clip_K = (limits_K / (norms_K + 1e-6)).clamp(max=1.0)
            if bool((clip_K < 1).any()):
                bank.grad_KP.mul_(clip_K[:, None])
            optimizer.step([learning_rate(run.recipe, run.step) for run in live])
            bank.refresh()
            for run, mean, tokens in zip(live, means_K, tokens_K, strict=True):
                if run.failure is None:
                    run.losses.append(mean)
                    run.tokens += tokens
            places = [place for place, run in enumerate(live) if run.wants_a_look]
            for place, loss in zip(places, gradients.held_out(places), strict=True):
                live[place].looked(loss, lambda place=place: bank.parts(place))  # type: ignore[misc]
            asked_to_stop = _tell([run for run in live if run.failure is None], report, gradients.parts, ranks)
            if asked_to_stop is not None or any(run.wants_a_checkpoint for run in live):
                optimizer.leave(live)
                save()
            if asked_to_stop is not None:
                raise asked_to_stop
    optimizer.leave(live)


def _sparing(model: Model, bank: Bank, live: Sequence[_Run]) -> AbstractContextManager[None]:
    """Activations are computed again where one of the runs asks for it: the others' bits are the same either way."""
    if not any(run.recipe.activation_checkpointing for run in live):
        return nullcontext()
    return recomputing(model, bank.drop.chances if bank.drop else ())


class _Gradients:
    """Losses and gradients of a step, in one pass through the base or, where memory does not take that, in several."""

    def __init__(self, model: Model, bank: Bank, live: Sequence[_Run], ranks: Ranks) -> None:
        self._model, self._bank, self._live, self._ranks = model, bank, live, ranks
        if any(run.recipe.dropout for run in live):
            bank.drop = Drop([run.recipe.dropout for run in live], [torch.Generator(model.device) for _ in live])
        self._together = keeps_apart(model)
        self._loss = Loss(model, head_is_adapted=bank.touches(model.get_output_embeddings()))
        self.parts = 1
        """Passes per step: twice as many each time that memory ran out."""

    def __call__(self, drawn: Sequence[list[Example]]) -> tuple[list[float], list[int]]:
        """The mean loss and the tokens of each adapter's batch; the gradients are in the bank.

        `TrainingFailed` when there is no memory for single rows, or on one of several ranks: the others are amid the
        same pass, and wait for it.
        """
        while True:
            try:
                return self._passes(drawn)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.parts >= max(map(len, drawn)) or self._ranks.many > 1:
                    reason = "out of memory with one row of each adapter" if self._ranks.many == 1 else OUT_OF_MEMORY
                    raise TrainingFailed(step=self._live[0].step + 1, reason=reason) from error
            self.parts *= 2
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _passes(self, drawn: Sequence[list[Example]]) -> tuple[list[float], list[int]]:
        asked = [asked_of(batch) for batch in drawn]
        means_K = torch.zeros(len(drawn), device=self._model.device)
        tokens_K = torch.zeros(len(drawn), dtype=torch.long, device=self._model.device)
        for run, chance in zip(self._live, self._bank.drop.chances if self._bank.drop else [], strict=False):
            drawn_from = f"{run.recipe.seed}/{self._ranks.rank}/{run.step}"
            chance.manual_seed(random.Random(drawn_from).getrandbits(32))  # processors hear no more bits than these
        with self._bank.gradients():
            for part in range(self._ranks.passes(max(map(len, drawn)), self.parts)):
                packed = self._packed(drawn, part, self.parts, asked)
                self._bank.assign(list(enumerate(packed.rows)))
                with attending(self._model, packed.ids_BT.shape[1]):
                    total, losses_N = self._loss(packed)
                    total.backward()
                means_K.index_add_(0, packed.owner_N, losses_N * packed.weights_N)
                tokens_K += torch.tensor(packed.rows, device=tokens_K.device) * packed.ids_BT.shape[1]
        assert self._bank.grad_KP is not None
        self._ranks.add_up(self._bank.grad_KP, means_K, tokens_K)
        return means_K.tolist(), tokens_K.tolist()

    def _packed(self, drawn: Sequence[Sequence[Example]], part: int, parts: int, asked: Sequence[float]) -> Packed:
        """This rank's rows for a pass; where it has none, a row that weighs nothing: layers need all ranks."""
        some = [self._ranks.share(batch, part, parts) for batch in drawn]
        if not any(some):
            first = next(place for place, batch in enumerate(drawn) if batch)
            some = [batch[:1] if place == first else [] for place, batch in enumerate(drawn)]
            asked = [math.inf] * len(drawn)
        return pack(some, together=self._together, asked=asked).to(self._model.device)

    @torch.no_grad()
    def held_out(self, places: Sequence[int]) -> list[float]:
        """The mean loss over tokens of the rows held out, of the runs at these places."""
        sums_K, asked_K = torch.zeros(len(self._live), dtype=torch.float64), [0] * len(self._live)
        drop, self._bank.drop = self._bank.drop, None
        try:
            for batch in itertools.count():
                now = [place for place in places if batch < len(self._live[place].held)]
                if not now:
                    break
                drawn = [self._live[place].held[batch] for place in now]
                packed = self._packed(drawn, 0, 1, [1] * len(drawn))
                self._bank.assign(list(zip(now, packed.rows, strict=True)))
                losses_N = self._loss(packed)[1].double() * packed.weights_N
                sums_K.index_add_(0, torch.tensor(now)[packed.owner_N.cpu()], losses_N.cpu())
                for place, some in zip(now, drawn, strict=True):
                    asked_K[place] += asked_of(some)
        finally:
            self._bank.drop = drop
        self._ranks.add_up(sums_K)
        return [float(sums_K[place]) / asked_K[place] for place in places]


def _tell(live: Sequence[_Run], report: Report, parts: int, ranks: Ranks) -> KeyboardInterrupt | None:
    """Report the step of each run, in how many passes it was made if not in one; what a report asked to stop by."""
    asked_to_stop = None
    more = {"passes": parts} if parts > 1 else {}
    for run in live:
        try:
            report(run.told() | {"task": run.place} | more)
        except KeyboardInterrupt as interrupt:
            asked_to_stop = interrupt
    stops = ranks.any(asked_to_stop is not None)
    return asked_to_stop or (KeyboardInterrupt() if stops else None)


def _check(what: str, values: Sequence[float], live: Sequence[_Run], drawn: Sequence[Sequence[Example]]) -> None:
    """Let a run fail whose value is no number."""
    for run, value, batch in zip(live, values, drawn, strict=True):
        if run.failure is None:
            run.failure = no_number(what, value, run.step + 1, batch)


class _Optimizer:
    """AdamW, for each adapter with rates of its own; θ's rows are its parameters, all of A and all of B apart."""

    def __init__(self, bank: Bank, live: Sequence[_Run]) -> None:
        """Runs go on from where they were left."""
        assert bank.grad_KP is not None
        self._bank = bank
        self._moments = (torch.zeros_like(bank.theta_KP), torch.zeros_like(bank.theta_KP))
        groups: list[dict[str, Any]] = []
        states: list[dict[str, Any]] = []
        for place, run in enumerate(live):
            bank.put(place, run.parts, bank.theta_KP)
            for matrix, parts in zip(self._moments, run.moments or (), strict=False):
                bank.put(place, parts, matrix)
            for like in bank.trained(place):
                span = bank.spans[like]
                parameter = bank.theta_KP[place, span].detach()
                parameter.grad = bank.grad_KP[place, span]
                group: dict[str, Any] = {
                    "params": [parameter], "place": place,
                    "times": run.recipe.learning_rate_b_ratio if like == "B" else 1.0,
                    "weight_decay": 0.0 if like == "vectors" else run.recipe.weight_decay,
                }  # fmt: skip
                groups.append(group)
                state = {"step": torch.tensor(float(run.step), device=bank.theta_KP.device)}
                names = ("exp_avg", "exp_avg_sq")
                states.append(state | {n: m[place, span] for n, m in zip(names, self._moments, strict=True)})
        self._adamw = torch.optim.AdamW(groups, fused=True)
        for group, state in zip(self._adamw.param_groups, states, strict=True):
            self._adamw.state[group["params"][0]] = state
        bank.refresh()

    def step(self, rates: Sequence[float]) -> None:
        """One step of all adapters, each at its rate."""
        for group in self._adamw.param_groups:
            group["lr"] = rates[group["place"]] * group["times"]
        self._adamw.step()

    def leave(self, live: Sequence[_Run]) -> None:
        """Let every run know its parts and their moments."""
        for place, run in enumerate(live):
            run.parts = self._bank.parts(place)
            first, second = (self._bank.parts(place, matrix) for matrix in self._moments)
            run.moments = (first, second)
