"""Base models from local folders: loaded once, frozen, in the precision that this machine is good at."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

from registry.core.errors import ForeignTokenizer, NotABase, NotRunnable, UnknownModel
from registry.core.recipes import Precision, Quantisation

from .quantised import form_of, hold, loading

_SHORT = 128
"""Rows of so many tokens attend by plain products on processors in bfloat16, see `attending`."""
Model = Any
"""A transformers causal language model; it ships no types."""
Tokenizer = Any


def device_here() -> torch.device:
    """The first GPU, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_for(precision: Precision) -> torch.dtype:
    """The type of the base's weights: ``auto`` takes bfloat16 where it is the faster one, else float32.

    On processors that is where they have matrix tiles (AMX): with the vector instructions alone (AVX512-BF16)
    a product was measured to take 1.7 times as long in bfloat16 as in float32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def load(
    folder: Path, precision: Precision = "auto", quantised: Quantisation | None = None
) -> tuple[Model, Tokenizer]:
    """The frozen model of ``folder`` in evaluation mode, and its tokenizer; no code of the folder is run.

    Its linear weights are held in the 8 or 4 bits that are asked for, or that they are stored in.
    """
    config = known(folder)
    dtype = dtype_for(precision)
    options = loading(config, quantised, dtype)
    in_bits = bool(quantised or form_of(config))
    if in_bits:  # where the weights are quantised is where they are to stay
        options["device_map"] = {"": device_here()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            reason = "there is no tokenizer beside its weights; push the base with the files of its tokenizer"
        raise NotRunnable(what=f"The base model in '{folder.name}'", reason=reason) from error
    if in_bits:
        hold(model, dtype)
    else:
        model.to(device_here())
    return model.requires_grad_(False).eval(), tokenizer


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a base; `NotABase` where there is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise NotABase(path=str(folder), reason="there is no config.json") from error
    except ValueError as error:
        raise NotABase(path=str(folder), reason=f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise NotABase(path=str(folder), reason="config.json is not a JSON object")
    return config


def known(folder: Path) -> dict[str, Any]:
    """The config.json of a base that transformers has a model for; `UnknownModel` says what works with one without."""
    config = config_of(folder)
    if (kind := config.get("model_type")) not in CONFIG_MAPPING:
        raise UnknownModel(path=folder.name, kind=kind, version=__version__)
    return config


def check_tokens(model: Model, ids: Iterable[int]) -> None:
    """`ForeignTokenizer` when a token has no row in the base's embedding: else the lookup would fail without a word."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(ids, default=0)
    if highest >= rows:
        raise ForeignTokenizer(token=highest, rows=rows)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks, which all have to ask for it; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def context_of(model: Model) -> int | None:
    """How many tokens the base was made for; None where its config does not say."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def attending(model: Model, length: int) -> AbstractContextManager[None]:
    """The attention that is fastest there and back over rows of ``length`` tokens, for the length of a block.

    In bfloat16 on processors the way back through torch's fused kernel was measured to take 1.3 to 2 times as long as
    through plain products, for 32 to 128 tokens; from 256 tokens on they are even, and the products take more memory.
    """
    dtype = model.get_input_embeddings().weight.dtype
    plain = model.device.type == "cpu" and dtype == torch.bfloat16 and length <= _SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def skeleton(folder: Path) -> Model:
    """The model of ``folder`` without its weights: which module is of which kind, and what is tied."""
    known(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise NotABase(path=str(folder), reason=str(error).splitlines()[0]) from error


@torch.no_grad()
def keeps_apart(model: Model) -> bool:
    """Whether sequences that are laid behind one another, each from position 0 on, do not look into another.

    Transformers tells them apart for models that make their mask in its way; others, such as recurrent ones, would
    run on. Asked of two short sequences, since no list of models would stay true.
    """
    size = min(4, model.config.get_text_config().vocab_size - 1)
    one_T = torch.arange(1, size + 1, device=model.device)
    ids_BT = torch.cat([one_T, one_T.flip(0)])[None]
    positions_BT = torch.arange(size, device=model.device).repeat(2)[None]
    packed = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[0, size:]
    alone = model(input_ids=ids_BT[:, size:], position_ids=positions_BT[:, :size], use_cache=False).logits[0]
    return torch.allclose(packed.float(), alone.float(), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def takes_padding(model: Model) -> bool:
    """Whether a sequence that is padded on its left, and masked there, gives what it gives alone.

    Recurrent models would read the padding. Asked of a short sequence, since no list of models would stay true.
    """
    size = min(4, model.config.get_text_config().vocab_size - 1)
    ids_BT = torch.arange(1, size + 1, device=model.device)[None]
    padded_BT = torch.cat([torch.zeros_like(ids_BT), ids_BT], dim=1)
    there_BT = torch.arange(2 * size, device=model.device)[None] >= size
    positions_BT = (there_BT.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": padded_BT, "attention_mask": there_BT.long(), "position_ids": positions_BT}
    try:
        padded = model(**inputs, use_cache=False).logits[:, size:]
    except TypeError:  # it takes no positions
        return False
    alone = model(input_ids=ids_BT, use_cache=False).logits
    return torch.allclose(padded.float(), alone.float(), rtol=1e-2, atol=1e-2)


def module_name(model: Model, name: str) -> str | None:
    """The model's own name of what an adapter calls ``name``: as it is, or with or without the base prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        with suppress(AttributeError):
            model.get_submodule(candidate)
            return candidate
    return None
