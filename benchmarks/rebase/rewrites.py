"""Rewrites of a model that keep its function: other coordinates, the same logits.

Each changes the model in place and draws what it does from a seed; `workers.compute.rebase.anatomy` says which of them
are exact for which family. They are written on whole modules, apart from the code that undoes them.
"""

import cmath
import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from workers.compute.lora import is_transposed
from workers.compute.model import Model, Tokenizer
from workers.compute.rebase.anatomy import READERS, Anatomy, Role, anatomy

Rewrite = Callable[[Model, int], None]


def neurons(model: Model, seed: int) -> None:
    """Neurons in another order; where they are gated, up against down in another scale and sign."""
    parts = anatomy(model)
    for layer in range(parts.layers):
        chance = torch.Generator().manual_seed(seed + layer)
        order_FF = _permutation(parts.neurons, chance)
        scaled_FF = order_FF
        if "up" in parts.family.modules:
            signs_F = torch.randint(2, (parts.neurons,), generator=chance) * 2 - 1
            scaled_FF = torch.diag(signs_F * _around_one(parts.neurons, chance)) @ order_FF
            _write(model, parts, layer, "up", scaled_FF)
        _write(model, parts, layer, "gate", order_FF)
        _read(model, parts, layer, "down", scaled_FF)


def heads(model: Model, seed: int) -> None:
    """Groups in another order, and heads within their group."""
    parts = anatomy(model)
    one_KK = torch.eye(parts.width, dtype=torch.float64)
    for layer in range(parts.layers):
        chance = torch.Generator().manual_seed(seed + layer)
        groups = _permutation(parts.groups, chance)
        within = torch.block_diag(*(_permutation(parts.heads, chance) for _ in range(parts.groups)))
        order = within @ torch.kron(groups, torch.eye(parts.heads, dtype=torch.float64))
        _write(model, parts, layer, "q", torch.kron(order, one_KK))
        _write(model, parts, layer, "k", torch.kron(groups, one_KK))
        _write(model, parts, layer, "v", torch.kron(groups, one_KK))
        _read(model, parts, layer, "o", torch.kron(order, one_KK))


def bases_of_heads(model: Model, seed: int) -> None:
    """v and o in another basis of every group; q and k turned and scaled on every rotary plane, or in another basis."""
    parts = anatomy(model)
    for layer in range(parts.layers):
        chance = torch.Generator().manual_seed(seed + layer)
        vo = [_basis(parts.width, chance) for _ in range(parts.groups)]
        _write(model, parts, layer, "v", torch.block_diag(*vo))
        _read(model, parts, layer, "o", torch.block_diag(*(m for m in vo for _ in range(parts.heads))))
        if not parts.family.qk_norms:
            qk = [_turn(parts, chance) for _ in range(parts.groups)]
            _write(model, parts, layer, "q", torch.block_diag(*(m for m in qk for _ in range(parts.heads))))
            _write(model, parts, layer, "k", torch.block_diag(*(m.inverse().T for m in qk)))


def gains(model: Model, seed: int) -> None:
    """Other gains of the norms of layers, and where they have biases other ones."""
    parts = anatomy(model)
    for layer in range(parts.layers):
        chance = torch.Generator().manual_seed(seed + layer)
        for where in parts.family.norms:
            gain_D, bias_D = (_around_one(parts.residual, chance) for _ in range(2))
            _regain(model, parts, layer, where, gain_D, bias_D)


def residual(model: Model, seed: int) -> None:
    """The residual stream turned; gains are folded into what reads it first. A tied head is untied by a final gain."""
    parts = anatomy(model)
    chance = torch.Generator().manual_seed(seed)
    d = parts.residual
    q_DD = torch.linalg.qr(torch.randn(d, d, generator=chance, dtype=torch.float64)).Q
    if parts.family.centred:
        ones_D = torch.full((d, 1), d**-0.5, dtype=torch.float64)
        frame = torch.linalg.qr(torch.cat([ones_D, torch.eye(d, dtype=torch.float64)[:, 1:]], 1)).Q
        inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(q_DD[1:, 1:]).Q)
        q_DD = frame @ inner @ frame.T
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    tables = [embedding] + ([model.get_submodule(parts.family.positions)] if parts.family.positions else [])
    final = model.get_submodule(parts.family.final_norm)
    for layer in range(parts.layers):
        for where in parts.family.norms:
            _regain(model, parts, layer, where, torch.ones(d).double(), torch.zeros(d).double())
        names = {parts.part(layer, role).module for role in READERS if role in parts.family.modules}
        for name in sorted(names):
            _set(model.get_submodule(name), _get(model.get_submodule(name)) @ q_DD.T)
        for name in (parts.part(layer, "o").module, parts.part(layer, "down").module):
            module = model.get_submodule(name)
            _set(module, q_DD @ _get(module))
            if getattr(module, "bias", None) is not None:
                module.bias.data = (q_DD @ module.bias.double()).to(module.bias.dtype)
    turned = head.weight.double() * final.weight.double() @ q_DD.T
    if tied and not torch.equal(final.weight, torch.ones_like(final.weight)):
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        tied = False
    if getattr(final, "bias", None) is not None and final.bias.any():
        raise ValueError("a head without a bias cannot take up the final norm's bias")
    for table in tables:
        table.weight.data = (table.weight.double() @ q_DD.T).to(table.weight.dtype)
    if not tied:
        head.weight.data = turned.to(head.weight.dtype)
        final.weight.data = torch.ones_like(final.weight)


EXACT: dict[str, Rewrite] = {
    "neurons": neurons, "heads": heads, "bases of heads": bases_of_heads, "gains": gains, "residual": residual,
}  # fmt: skip


def everything(model: Model, seed: int) -> None:
    """All of them, one after another."""
    for number, rewrite in enumerate(EXACT.values()):
        rewrite(model, seed + 100 * number)


def vocabulary(model: Model, order: Sequence[int], more: int, seed: int) -> None:
    """Token ``order[i]`` becomes token i; after them ``more`` new ones that the old model has no row for."""
    chance = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for table in (embedding,) if tied else (embedding, head):
        new = torch.randn(more, table.weight.shape[1], generator=chance) * table.weight.std()
        table.weight = nn.Parameter(torch.cat([table.weight[list(order)], new]), requires_grad=False)
    if tied:
        head.weight = embedding.weight
    model.config.vocab_size = embedding.num_embeddings = head.out_features = len(order) + more


def renumbered(tokenizer: Tokenizer, order: Sequence[int]) -> Tokenizer:
    """The tokenizer of `vocabulary`: a token's id is its place in ``order``."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    place = {old: new for new, old in enumerate(order)}
    told["model"]["vocab"] = {token: place[old] for token, old in told["model"]["vocab"].items()}
    for special in told["added_tokens"]:
        special["id"] = place[special["id"]]
    for special in (told.get("post_processor") or {}).get("special_tokens", {}).values():
        special["ids"] = [place[old] for old in special["ids"]]
    made = copy.deepcopy(tokenizer)
    made._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(told))
    return made


# ── modules ──────────────────────────────────────────────────────────────────


def _get(module: Any) -> Tensor:
    """The weight, outputs × inputs."""
    weight: Tensor = module.weight.double()
    return weight.T if is_transposed(module) else weight


def _set(module: Any, weight_OI: Tensor) -> None:
    value = weight_OI.T if is_transposed(module) else weight_OI
    module.weight.data = value.to(module.weight.dtype).contiguous()


def _write(model: Model, parts: Anatomy, layer: int, role: Role, m_OO: Tensor) -> None:
    """What a part writes becomes M·x: its weight and its bias."""
    part = parts.part(layer, role)
    module = model.get_submodule(part.module)
    weight = _get(module).clone()
    weight[part.rows] = m_OO @ weight[part.rows]
    _set(module, weight)
    if getattr(module, "bias", None) is not None:
        bias = module.bias.double()
        bias[part.rows] = m_OO @ bias[part.rows]
        module.bias.data = bias.to(module.bias.dtype)


def _read(model: Model, parts: Anatomy, layer: int, role: Role, m_II: Tensor) -> None:
    """A part reads M·x where it read x."""
    module = model.get_submodule(parts.part(layer, role).module)
    _set(module, _get(module) @ m_II.inverse())


def _regain(model: Model, parts: Anatomy, layer: int, where: str, gain_D: Tensor, bias_D: Tensor) -> None:
    """A norm with another gain, and another bias where it has one, made up for by what reads it."""
    name = f"{parts.family.layers}.{layer}.{where}"
    norm = model.get_submodule(name)
    biased = getattr(norm, "bias", None) is not None
    ratio_D = norm.weight.double() / gain_D
    through = (parts.part(layer, role) for role in parts.family.modules)
    for reader in sorted({part.module for part in through if part.norm == name}):
        module = model.get_submodule(reader)
        weight = _get(module)
        if biased:
            constant_O = weight @ (norm.bias.double() - ratio_D * bias_D)
            module.bias.data = (module.bias.double() + constant_O).to(module.bias.dtype)
        _set(module, weight * ratio_D)
    norm.weight.data = gain_D.to(norm.weight.dtype)
    if biased:
        norm.bias.data = bias_D.to(norm.bias.dtype)


def _permutation(size: int, chance: torch.Generator) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=chance)]


def _around_one(size: int, chance: torch.Generator) -> Tensor:
    """Between a half and two."""
    return torch.exp2(torch.rand(size, generator=chance, dtype=torch.float64) * 2 - 1)


def _basis(size: int, chance: torch.Generator) -> Tensor:
    """A basis of condition 4."""
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=chance, dtype=torch.float64)).Q for _ in range(2))
    basis: Tensor = u @ torch.diag(torch.linspace(0.5, 2, size, dtype=torch.float64)) @ v
    return basis


def _turn(parts: Anatomy, chance: torch.Generator) -> Tensor:
    """An angle and a scale on every rotary plane; any basis of what does not turn."""
    m_KK = torch.zeros(parts.width, parts.width, dtype=torch.float64)
    for one, two in parts.planes_P2.tolist():
        scale, angle = float(_around_one(1, chance)), float(torch.rand(1, generator=chance)) * 2 * math.pi
        z = cmath.rect(scale, angle)
        m_KK[one, one] = m_KK[two, two] = z.real
        m_KK[two, one], m_KK[one, two] = z.imag, -z.imag
    free = parts.free_N
    if len(free):
        m_KK[free[:, None], free] = _basis(len(free), chance)
    return m_KK
