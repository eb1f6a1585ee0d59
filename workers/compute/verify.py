"""Does a merged model answer as the adapted one? Both are run on the same random tokens, one after the other."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from registry.core.recipes import Precision

from .bank import attached
from .lora import Adapter
from .model import Model, load


@dataclass(frozen=True)
class Deviation:
    """Logits of the merged model against those of base and adapter."""

    largest: float
    """The largest difference of two logits."""
    relative: float
    """‖difference‖ ⁄ ‖logits of the adapted model, less their mean by position‖."""
    kl: float
    """Mean Kullback–Leibler divergence of the merged model's next token from the adapted one's, in nats."""
    agreement: float
    """Share of positions where the most likely token is the same."""
    positions: int


def deviation(
    base: Path, merged: Path, adapter: Adapter, *, rows: int = 4, length: int = 32, precision: Precision = "fp32"
) -> Deviation:
    """How far rounding once moved the answers, on ``rows`` × ``length`` tokens from a seed.

    In float32, the stored weights' rounding is all that differs. The models are in memory one at a time.
    """
    expected_PV, found_PV = _adapted(base, adapter, rows, length, precision), _bare(merged, rows, length, precision)
    difference_PV = found_PV - expected_PV
    centred_PV = expected_PV - expected_PV.mean(dim=1, keepdim=True)
    log_p_PV, log_q_PV = expected_PV.log_softmax(dim=1), found_PV.log_softmax(dim=1)
    return Deviation(
        largest=float(difference_PV.abs().max()),
        relative=float(difference_PV.norm() / centred_PV.norm().clamp_min(torch.finfo(torch.float64).tiny)),
        kl=float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(dim=1).mean().clamp_min(0)),
        agreement=float((expected_PV.argmax(dim=1) == found_PV.argmax(dim=1)).double().mean()),
        positions=len(expected_PV),
    )


def _adapted(base: Path, adapter: Adapter, rows: int, length: int, precision: Precision) -> Tensor:
    model, _ = load(base, precision)
    with attached(model, adapter):
        return _logits(model, rows, length)


def _bare(folder: Path, rows: int, length: int, precision: Precision) -> Tensor:
    model, _ = load(folder, precision)
    return _logits(model, rows, length)


@torch.no_grad()
def _logits(model: Model, rows: int, length: int) -> Tensor:
    """Logits by position and token of the vocabulary, in float64."""
    many = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(many, (rows, length), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits.reshape(rows * length, -1).double().cpu()
