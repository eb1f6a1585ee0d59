"""What the layers of a model family are made of: which module reads and writes which space.

    residual ─norm→ q, k, v ─attention→ o ─→ residual ─norm→ gate, up ─product→ down ─→ residual

Attention has H heads of width K in G groups, a group sharing k and v; a feed-forward part has F neurons. A module that
holds several parts (fused q, k and v; fused gate and up) is read by rows.

What may be done to these spaces without changing the function (✗: not a symmetry here, left alone):

    rewrite                                      RMSNorm   LayerNorm                     why not
    rotation of the residual stream              any       keeps the all-ones direction  the mean is taken out
    gains and biases of a norm into its readers  ✓         ✓                             —
    final gain into the head                     ✓ untied  ✓ untied                      a tied one embeds, too
    rotary planes: angle and reciprocal scale    ✓         ✓                             ✗ with norms of q and k
    q and k without rotary positions: any basis  ✓         ✓                             ✗ with norms of q and k
    v and o: any basis of a head                 ✓         ✓                             —
    heads within a group, groups                 ✓         ✓                             —
    neurons: order                               ✓         ✓                             —
    neurons: scale of up against down            ✓ gated   ✓ gated                       ✗ without a gate
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from registry.core.errors import NotRunnable

from ..lora import is_transposed
from ..model import Model, skeleton
from ..shards import Stored, stored_name, stored_tensors

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
READERS: tuple[Role, ...] = ("q", "k", "v", "gate", "up")
"""Parts that read the residual stream through a norm."""
ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")
Fused = Literal["blocks", "heads"]
"""q, k and v in one module: one behind the other, or head by head."""


@dataclass(frozen=True)
class Family:
    """Names of the modules of one architecture, below a layer unless said otherwise."""

    layers: str
    """The list of layers, in the model."""
    final_norm: str
    """In the model."""
    norms: tuple[str, str]
    """Before attention and before the feed-forward part."""
    modules: Mapping[Role, str]
    fused: Fused = "blocks"
    positions: str | None = None
    """A table of positions that is added to the embedding, in the model."""
    rotary: bool = True
    centred: bool = False
    """LayerNorm: the mean of the residual stream does not count."""
    qk_norms: bool = False


_LLAMA_NAMES: dict[Role, str] = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_LLAMA = Family("model.layers", "model.norm", ("input_layernorm", "post_attention_layernorm"), _LLAMA_NAMES)
_QWEN3 = Family(_LLAMA.layers, _LLAMA.final_norm, _LLAMA.norms, _LLAMA_NAMES, qk_norms=True)
_PHI3 = Family(
    _LLAMA.layers, _LLAMA.final_norm, _LLAMA.norms,
    {
        "q": "self_attn.qkv_proj", "k": "self_attn.qkv_proj", "v": "self_attn.qkv_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj",
    },
)  # fmt: skip
_GPT2 = Family(
    "transformer.h", "transformer.ln_f", ("ln_1", "ln_2"),
    {
        "q": "attn.c_attn", "k": "attn.c_attn", "v": "attn.c_attn", "o": "attn.c_proj",
        "gate": "mlp.c_fc", "down": "mlp.c_proj",
    },
    positions="transformer.wpe", rotary=False, centred=True,
)  # fmt: skip
_NEOX = Family(
    "gpt_neox.layers", "gpt_neox.final_layer_norm", ("input_layernorm", "post_attention_layernorm"),
    {
        "q": "attention.query_key_value", "k": "attention.query_key_value", "v": "attention.query_key_value",
        "o": "attention.dense", "gate": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    },
    fused="heads", centred=True,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3, "phi3": _PHI3, "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A role's module, and which of its output rows are the part's."""

    module: str
    rows: Tensor | slice
    norm: str | None
    """The norm that a reader reads through."""


@dataclass(frozen=True)
class Anatomy:
    """One model's sizes and parts."""

    family: Family
    residual: int
    layers: int
    groups: int
    heads: int
    """Of a group."""
    width: int
    """Of a head."""
    neurons: int
    planes_P2: Tensor
    """Dimensions of a head that turn together with the position; empty without rotary positions."""
    free_N: Tensor
    """Dimensions of a head that do not turn."""

    @property
    def sizes(self) -> dict[str, int]:
        """What two bases must share to be aligned."""
        return {
            "width": self.residual, "layers": self.layers, "groups": self.groups, "heads of a group": self.heads,
            "width of a head": self.width, "rotary planes": len(self.planes_P2), "neurons": self.neurons,
        }  # fmt: skip

    @property
    def outputs(self) -> dict[Role, int]:
        """How many every part has."""
        shared, every = self.groups * self.width, self.groups * self.heads * self.width
        return {"q": every, "k": shared, "v": shared, "o": self.residual, "gate": self.neurons, "up": self.neurons,
                "down": self.residual}  # fmt: skip

    def layer_of(self, module: str) -> int | None:
        """The layer that a module lies in; None for the embedding, the head and the like."""
        inside, _, rest = module.partition(f"{self.family.layers}.")
        return int(rest.partition(".")[0]) if not inside and rest else None

    def roles_of(self, layer: int, module: str) -> list[Role]:
        """The parts that a module of a layer holds."""
        return [role for role in self.family.modules if self.part(layer, role).module == module]

    def part(self, layer: int, role: Role) -> Part:
        """Where ``role`` lies in a layer."""
        module = self.family.modules[role]
        together = [other for other, name in self.family.modules.items() if name == module]
        norm = f"{self.family.layers}.{layer}.{self.family.norms[role in ('gate', 'up')]}" if role in READERS else None
        rows = self._rows(role, together) if len(together) > 1 else slice(None)
        return Part(f"{self.family.layers}.{layer}.{module}", rows, norm)

    def _rows(self, role: Role, together: list[Role]) -> Tensor:
        if self.family.fused == "heads":
            all_HXK = torch.arange(3 * self.outputs["q"]).view(-1, 3, self.width)
            return all_HXK[:, together.index(role)].reshape(-1)
        before = sum(self.outputs[other] for other in together[: together.index(role)])
        return torch.arange(before, before + self.outputs[role])


def anatomy(model: Model) -> Anatomy:
    """Of a model without its weights; `NotRunnable` names a family that is not known here."""
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise NotRunnable(
            what="Aligning", reason=f"the symmetries of '{config.model_type}' are not known ({known} are)"
        )
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    turning = _turning(config, width) if family.rotary else 0
    layers = model.get_submodule(family.layers)
    down = model.get_submodule(f"{family.layers}.0.{family.modules['down']}")
    return Anatomy(
        family=family,
        residual=config.hidden_size,
        layers=len(layers),
        groups=groups,
        heads=heads // groups,
        width=width,
        neurons=down.weight.shape[0 if is_transposed(down) else 1],
        planes_P2=torch.stack([torch.arange(turning // 2), torch.arange(turning // 2, turning)], dim=1),
        free_N=torch.arange(turning, width),
    )


def _turning(config: object, width: int) -> int:
    """Dimensions of a head that rotary positions turn: transformers turns a half of them against the other."""
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    return int(width * share)


_ROWS = 1024
"""Of a matrix, that are held in float64 at once."""


@dataclass(frozen=True)
class Base:
    """A base folder, read tensor by tensor in float64."""

    model: Model
    stored: Mapping[str, Stored]
    parts: Anatomy

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Nothing is read yet but headers."""
        model = skeleton(folder)
        return cls(model, stored_tensors(folder), anatomy(model))

    def parameter(self, name: str) -> Tensor | None:
        """One parameter as outputs × inputs; None where there is none."""
        value = self._as_stored(name)
        return None if value is None else value.double()

    def _as_stored(
        self, name: str, outputs: Tensor | None = None, inputs: Tensor | None = None
    ) -> Tensor | None:
        """`parameter` in the type that it is stored in; some ``outputs`` alone, or some ``inputs``."""
        here = stored_name(self.model, name, self.stored)
        if here is None:
            return None
        stored, owner = self.stored[here], self.model.get_submodule(name.rpartition(".")[0])
        turned = len(stored.shape) == 2 and is_transposed(owner) and not isinstance(owner, nn.Embedding)
        rows, columns = (inputs, outputs) if turned else (outputs, inputs)
        if rows is not None:
            value = stored.rows(rows.tolist())
        else:
            value = stored.read() if columns is None else stored.columns(columns)
        return value.T if turned else value

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Gain and bias of a norm."""
        gain_D = self.parameter(f"{name}.weight")
        if gain_D is None:
            raise NotRunnable(what="Aligning", reason=f"the base has no '{name}.weight'")
        bias_D = self.parameter(f"{name}.bias")
        return gain_D, torch.zeros_like(gain_D) if bias_D is None else bias_D

    def embeddings(self, tokens: Sequence[int]) -> Tensor:
        """What enters the residual stream: rows of the embedding, and the table of positions where there is one."""
        table_ND = self.rows(self.model.get_input_embeddings(), tokens)
        if self.parts.family.positions:
            positions_TD = self.parameter(f"{self.parts.family.positions}.weight")
            table_ND = table_ND if positions_TD is None else torch.cat([table_ND, positions_TD])
        return self.centred(table_ND)

    def rows(self, module: nn.Module, tokens: Sequence[int]) -> Tensor:
        """Rows of the embedding or of the head; those of a tied head are the embedding's."""
        return self.table(module).rows(tokens).double()

    def table(self, module: nn.Module) -> Stored:
        """What is stored of the embedding or of the head."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, own in self.model.named_modules() if own is module)
        here = stored_name(self.model, f"{name}.weight", self.stored)
        if here is None and module is not embedding:
            return self.table(embedding)
        if here is None:
            raise NotRunnable(what="Aligning", reason=f"the base does not store '{name}.weight'")
        return self.stored[here]

    def centred(self, x_ND: Tensor) -> Tensor:
        """Without what a LayerNorm takes out of every row."""
        return x_ND - x_ND.mean(1, keepdim=True) if self.parts.family.centred else x_ND

    def weight(self, layer: int, role: Role, outputs: Tensor | None = None) -> Tensor:
        """A part of a layer as it is, outputs × inputs; some ``outputs`` alone."""
        return self._part(layer, role, outputs).double()

    def _part(self, layer: int, role: Role, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """`weight` in the type that it is stored in; or some ``inputs`` alone."""
        part = self.parts.part(layer, role)
        wanted = outputs if outputs is None or isinstance(part.rows, slice) else part.rows[outputs]
        found_OI = self._as_stored(f"{part.module}.weight", wanted, inputs)
        if found_OI is None:
            raise NotRunnable(what="Aligning", reason=f"the base has no '{part.module}.weight'")
        return found_OI[part.rows] if outputs is None else found_OI

    def layer(self, layer: int) -> list[Stored]:
        """What is stored of a layer's parts."""
        names = {f"{self.parts.part(layer, role).module}.weight" for role in self.parts.family.modules}
        found = (stored_name(self.model, name, self.stored) for name in sorted(names))
        return [self.stored[name] for name in found if name is not None]

    def normal(
        self, layer: int, role: Role, channels: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """A part of a layer in normal form: readers with their norm folded in and their bias as a last column.

        ``channels``: of the residual stream, which it reads or writes, these alone. ``dtype``: of what is given.
        """
        part = self.parts.part(layer, role)
        if part.norm is None and channels is not None and not self.parts.family.centred:
            return self._part(layer, role, channels).to(dtype)
        if part.norm is None:
            whole_DI = self.centred(self.weight(layer, role).T).T.to(dtype)
            return whole_DI if channels is None else whole_DI[channels]
        gain_D, shift_D = self.norm(part.norm)
        bias_O = self.parameter(f"{part.module}.bias")
        if channels is not None and not self.parts.family.centred and not shift_D.any():
            found_ON = _with_a_column(self._part(layer, role, inputs=channels), dtype)
            found_ON[:, :-1] *= gain_D[channels].to(dtype)
        else:
            weight_OD = self.weight(layer, role)
            folded_OD = self.centred(weight_OD * gain_D)
            found_ON = _with_a_column(folded_OD if channels is None else folded_OD[:, channels], dtype)
            found_ON[:, -1] = weight_OD @ shift_D
        if bias_O is not None:
            found_ON[:, -1] += bias_O[part.rows]
        return found_ON

    def turned(self, layer: int, role: Role, to_ND: Tensor) -> Tensor:
        """`normal` in channels that ``to_ND`` makes of its own; a block of rows at a time is in float64."""
        part, blocks = self.parts.part(layer, role), self._part(layer, role).split(_ROWS)
        to_ND = self.centred(to_ND)
        if part.norm is None:
            found_NI = torch.zeros(len(to_ND), blocks[0].shape[1], dtype=to_ND.dtype)
            for to_NB, block_BI in zip(to_ND.split(_ROWS, dim=1), blocks, strict=True):
                found_NI.addmm_(to_NB, block_BI.double())
            return found_NI
        gain_D, shift_D = self.norm(part.norm)
        read_DN = torch.cat([(to_ND * gain_D).T, shift_D[:, None]], dim=1)
        found_ON = torch.cat([block_OD.double() @ read_DN for block_OD in blocks])
        bias_O = self.parameter(f"{part.module}.bias")
        if bias_O is not None:
            found_ON[:, -1] += bias_O[part.rows]
        return found_ON


def _with_a_column(x_ON: Tensor, dtype: torch.dtype) -> Tensor:
    """With a column of zeros behind it."""
    found_ON = torch.empty(len(x_ON), x_ON.shape[1] + 1, dtype=dtype)
    found_ON[:, :-1], found_ON[:, -1] = x_ON, 0.0
    return found_ON
