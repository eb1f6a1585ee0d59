"""Bases held in 8 or 4 bits: frozen linear weights, made numbers again for a product and then forgotten.

    h = Ŵx + b,  ∂x = Ŵᵀ∂h        int8:  Ŵ = s_o·q ⁄ 127 by row            (Dettmers et al. 2022, arXiv:2208.07339)
                                  nf4:   Ŵ = s_k·c[q] by blocks of 64      (Dettmers et al. 2023, arXiv:2305.14314)

Only weights are quantised: activations, adapters and gradients are what they are on the base of weights Ŵ, on every
device (docs/adr/0009). Embeddings, output head and norms stay as they are. How weights are quantised, and the form of
checkpoints that already are, is bitsandbytes'; transformers quantises tensor by tensor while it loads.
Legend: O outputs, I inputs.
"""

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from registry.core.errors import NotRunnable, ToolMissing
from registry.core.recipes import Quantisation

Config = dict[str, Any]
FORMS = ("nf4", "fp4", "int8")
"""Those of checkpoints that are read."""


class Held(nn.Module):
    """A frozen linear module whose weight is held in 8 or 4 bits."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, module: Any) -> None:
        """What bitsandbytes' ``module`` holds, not copied."""
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self.was_transposed: bool = getattr(module, "source_cls", nn.Linear) is Conv1D
        """Whether the base's files keep it as inputs × outputs."""
        self.bias = module.bias
        self.form = "int8"
        self._state: Any = None
        if (state := getattr(module.weight, "quant_state", None)) is not None:
            parts = {"packed": module.weight.data, "absmax": state.absmax, "code": state.code}
            if state.nested:
                parts |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
            self.form, self._state = state.quant_type, state
        else:
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            parts = {"packed": module.weight.data, "absmax": scales.float()}
        for name, value in parts.items():
            self.register_buffer(name, value, persistent=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Ŵ."""
        packed, absmax = self.get_buffer("packed"), self.get_buffer("absmax")
        if self._state is None:
            return by_rows(packed, absmax, dtype)
        return by_blocks(packed, self._state, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Ŵx + b."""
        h: Tensor = _Product.apply(x, self)
        return h


class _Product(torch.autograd.Function):
    """Keeps nothing for its backward: Ŵ is made again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Held) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dense(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        dh = gradients[0]
        return dh @ ctx.module.dense(dh.dtype), None


def by_rows(packed_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ out of 8 bits, rounded once."""
    return (packed_OI.float() * (absmax_O.float() / 127)[:, None]).to(dtype)


def by_blocks(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Ŵ out of 4 bits, as bitsandbytes' ``state`` says."""
    from bitsandbytes import functional

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # As one row: its kernel for processors loses blocks that begin in one row and end in the next (0.50.2).
    row = torch.Size([1, state.shape.numel()])
    plain = functional.QuantState(absmax.float(), row, state.code, state.blocksize, state.quant_type, dtype)
    weight: Tensor = functional.dequantize_4bit(packed.view(-1, 1), plain)
    return weight.view(state.shape)


# ── what a checkpoint is, and what is asked for ──────────────────────────────


def form_of(config: Config) -> str | None:
    """The form that a checkpoint's weights are stored in, by its config.json: nf4, fp4, int8 or another; None: full."""
    said = config.get("quantization_config")
    if not said:
        return None
    if said.get("load_in_4bit"):
        return str(said.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if said.get("load_in_8bit") else str(said.get("quant_method", "an unnamed form"))


def loading(config: Config, quantised: Quantisation | None, dtype: torch.dtype) -> Config:
    """What transformers is to be told so that it loads a base of this config in that form, or as it is stored.

    `ToolMissing` names the extra, `NotRunnable` what is asked for and cannot be.
    """
    stored = form_of(config)
    if stored is None and quantised is None:
        return {}
    if stored is not None and stored not in FORMS:
        reason = f"its weights are stored as {stored}; read are full weights, and bitsandbytes' nf4, fp4 and int8"
        raise NotRunnable(what="The base", reason=reason)
    if stored is not None and quantised not in (None, stored):
        reason = f"its weights are stored in {stored} already; leave 'quantised' out"
        raise NotRunnable(what=f"This base in {quantised}", reason=reason)
    if any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")):
        raise ToolMissing(what="A base in 8 or 4 bits", extra="quantised")
    # It would advise to install a product of its own; ours is the one that has a backward.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if stored is not None:
        return {}
    from transformers import BitsAndBytesConfig

    if quantised == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantised, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }  # fmt: skip


def hold(model: Any, dtype: torch.dtype) -> None:
    """Put `Held` in the place of bitsandbytes' modules of a model just loaded; an output head is full again."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            held = Held(module)
            model.set_submodule(name, _full(held, dtype) if module is head else held)


def _full(held: Held, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(held.in_features, held.out_features, bias=held.bias is not None, device="meta")
    linear.weight = nn.Parameter(held.dense(dtype), requires_grad=False)
    if held.bias is not None:
        linear.bias = held.bias
    return linear


# ── what was loaded ──────────────────────────────────────────────────────────


def bytes_of(module: nn.Module) -> int:
    """What the parameters and buffers of a module take in this process's memory, shared storage once."""
    tensors = (*module.parameters(), *module.buffers())
    storages = [(each.to_local() if isinstance(each, DTensor) else each).untyped_storage() for each in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def loaded(model: Any) -> dict[str, Any]:
    """In which form a model's linear weights are held (None: in full), and what it takes in memory."""
    form = next((module.form for module in model.modules() if isinstance(module, Held)), None)
    return {"quantised": form, "bytes": bytes_of(model)}
