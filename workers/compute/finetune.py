"""Fine-tuning: one LoRA adapter on a frozen base, with the loss on completions only.

    loss = mean over completion tokens of −ln p(token | what stands before it)
         + ½·pull·(1 − t/T)·‖θ − θ_start‖²                      when training starts from another adapter

The base stays in its own precision (bfloat16 where the device computes in it) and in evaluation mode; the
factors and the optimiser's moments are float32. Logits are computed only where a completion is predicted.
Deterministic: the order of rows and the dropout of step t are drawn from (seed, t), so a checkpoint needs
no generator's state, and a resumed run ends in the same bytes as an uninterrupted one.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from registry.core.errors import NotRunnable, TrainingFailed
from registry.core.recipes import FineTune, recipe_digest

from .data import Example, Row, batches, collate, tokenize
from .lora import Adapter, Layer, attached, fresh, layers_of
from .model import Model, Tokenizer
from .weights import read_metadata, read_tensors, write_tensors

Report = Callable[[dict[str, Any]], None]
CHECKPOINT = "checkpoint.safetensors"


def silent(_: dict[str, Any]) -> None:
    """A report that nobody reads."""


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
    adapter = start or fresh(model, recipe)
    if any(patch.magnitude_O is not None for patch in adapter.patches.values()):
        raise NotRunnable(what="Training from this adapter", reason="it has DoRA magnitudes")
    examples = [tokenize(tokenizer, _trainable(row), recipe.max_length) for row in rows]
    hooks = layers_of(model, adapter, recipe.dropout)
    layers = dict(zip(adapter.patches, (hook for hook in hooks if isinstance(hook, Layer)), strict=True))
    factors_a = [layer.a_RI.requires_grad_() for layer in layers.values()]
    factors_b = [layer.b_OR.requires_grad_() for layer in layers.values()]
    parameters = [*factors_a, *factors_b]
    began = [parameter.detach().clone() for parameter in parameters]
    ratio = recipe.learning_rate_b_ratio
    optimizer = torch.optim.AdamW(
        [{"params": factors_a, "ratio": 1.0}, {"params": factors_b, "ratio": ratio}], weight_decay=recipe.weight_decay
    )
    losses: list[float] = []
    tokens = 0
    identity = f"{recipe_digest(recipe)} {_fingerprint(began)}"
    if checkpoint_dir is not None:
        losses, tokens = _resume(checkpoint_dir / CHECKPOINT, identity, parameters, optimizer)

    ahead = itertools.islice(batches(examples, recipe.batch_tokens, recipe.seed), len(losses), recipe.steps)
    with attached(hooks), torch.random.fork_rng():
        for step, batch in enumerate(ahead, start=len(losses)):
            torch.manual_seed((recipe.seed << 32) + step)
            ids_BT, asked_BT, targets_N = collate(batch, model.device)
            loss = _loss(model, ids_BT, asked_BT, targets_N)
            if not math.isfinite(value := loss.item()):
                raise TrainingFailed(step=step + 1, reason=f"the loss is {value} on {_lines(batch)}")
            optimizer.zero_grad()
            loss.backward()
            if recipe.pull and start is not None:
                _pull(parameters, began, recipe.pull * (1 - step / recipe.steps))
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
            if not math.isfinite(norm):
                raise TrainingFailed(step=step + 1, reason=f"the gradient is {norm} on {_lines(batch)}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step) * group["ratio"]
            optimizer.step()
            losses.append(value)
            tokens += ids_BT.numel()
            save = checkpoint_dir is not None and recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0
            try:
                report({"step": step + 1, "steps": recipe.steps, "loss": value, "tokens": tokens})
            except KeyboardInterrupt:
                save = checkpoint_dir is not None
                raise
            finally:
                if save and checkpoint_dir is not None:
                    _save(checkpoint_dir / CHECKPOINT, identity, parameters, optimizer, losses, tokens)

    patches = {
        name: replace(patch, a_RI=layers[name].a_RI.detach().cpu(), b_OR=layers[name].b_OR.detach().cpu())
        for name, patch in adapter.patches.items()
    }
    return Trained(replace(adapter, patches=patches), tuple(losses), tokens)


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


def _loss(model: Model, ids_BT: Tensor, asked_BT: Tensor, targets_N: Tensor) -> Tensor:
    logits = model(input_ids=ids_BT, logits_to_keep=asked_BT, use_cache=False).logits
    return F.cross_entropy(logits.reshape(len(targets_N), -1).float(), targets_N)


@torch.no_grad()
def _pull(parameters: Sequence[Tensor], began: Sequence[Tensor], weight: float) -> None:
    """The gradient of ½·weight·‖θ − θ_start‖²."""
    for parameter, start in zip(parameters, began, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start, alpha=weight)


def _trainable(row: Row) -> Row:
    if "choices" in row.value:
        raise row.refuse("rows with 'choices' are for suites; training needs one completion")
    return row


def _lines(batch: Sequence[Example]) -> str:
    return "rows " + ", ".join(f"{example.row.path}:{example.row.line}" for example in batch)


# ── checkpoints ──────────────────────────────────────────────────────────────


def _fingerprint(tensors: Sequence[Tensor]) -> str:
    """Tells one start from another, so that a checkpoint is only resumed by the run that left it."""
    return " ".join(f"{tensor.double().abs().sum().item():.17g}" for tensor in tensors[:2])


def _save(
    path: Path,
    identity: str,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
    tokens: int,
) -> None:
    """Factors, moments, and how far the run is: the batches and the chance of a step follow from its number."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors |= {f"{index}.theta": parameter, f"{index}.m": state["exp_avg"], f"{index}.v": state["exp_avg_sq"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"identity": identity, "losses": json.dumps(losses), "tokens": str(tokens)}
    write_tensors(path, tensors, metadata)


def _resume(
    path: Path, identity: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[list[float], int]:
    """Put the checkpoint's values where they were; its losses and tokens, or nothing when there is none of this run."""
    if not path.is_file() or (metadata := read_metadata(path)).get("identity") != identity:
        return [], 0
    tensors = read_tensors(path)
    losses = json.loads(metadata["losses"])
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{index}.theta"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"{index}.m"].to(parameter.device),
            "exp_avg_sq": tensors[f"{index}.v"].to(parameter.device),
        }
    return losses, int(metadata["tokens"])
