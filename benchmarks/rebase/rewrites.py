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
    _turn_stream(model, parts, q_DD)


def some_channels(model: Model, seed: int) -> None:
    """Of the residual stream a third of the channels in another order, the others where they were."""
    parts = anatomy(model)
    some = torch.randperm(parts.residual, generator=torch.Generator().manual_seed(seed))[: parts.residual // 3]
    order_D = torch.arange(parts.residual)
    order_D[some] = some.roll(1)
    _turn_stream(model, parts, torch.eye(parts.residual, dtype=torch.float64)[order_D])


def _turn_stream(model: Model, parts: Anatomy, q_DD: Tensor) -> None:
    d = parts.residual
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


# ── other shapes ─────────────────────────────────────────────────────────────


def identity_blocks(model: Model, _: int) -> Model:
    """A block that adds nothing behind every second one, a copy of it otherwise (Wu et al. 2024, LLaMA Pro,
    arXiv:2401.02415)."""
    parts = anatomy(model)
    of = [place for layer in range(parts.layers) for place in ([layer] if layer % 2 else [layer, layer])]
    made = _grown(model, num_hidden_layers=len(of))
    layers = made.get_submodule(parts.family.layers)
    whole = {name: value for name, value in model.state_dict().items() if not name.startswith(parts.family.layers)}
    made.load_state_dict(whole, strict=False)
    for place, old in enumerate(of):
        layers[place].load_state_dict(model.get_submodule(parts.family.layers)[old].state_dict())
        if place and of[place - 1] == old:
            for role in ("o", "down"):
                for value in made.get_submodule(anatomy(made).part(place, role).module).parameters():
                    value.data.zero_()
    return made


def zero_padded(model: Model, seed: int) -> Model:
    """Half as many residual dimensions, groups of heads and neurons more: the stream has zeros there, which are read
    by noise, and nobody reads the new heads and neurons. A tied head of LayerNorm is untied."""
    return _widened(model, seed, clone=False)


def cloned(model: Model, seed: int) -> Model:
    """Every residual dimension, group of heads and neuron twice (Chen et al. 2015, Net2Net, arXiv:1511.05641); what
    reads the stream takes halves with noise that cancels."""
    return _widened(model, seed, clone=True)


def groups_split(model: Model, _: int) -> Model:
    """Every head has a k and a v of its own, copies of those that it shared (the way back of Ainslie et al. 2023, GQA,
    arXiv:2305.13245)."""
    parts = anatomy(model)
    made = _grown(model, num_key_value_heads=parts.groups * parts.heads)
    new, state = anatomy(made), made.state_dict()
    made.load_state_dict({k: v for k, v in model.state_dict().items() if v.shape == state[k].shape}, strict=False)
    for layer in range(parts.layers):
        for role in READERS[:3]:
            ours, theirs = parts.part(layer, role), new.part(layer, role)
            old, module = model.get_submodule(ours.module), made.get_submodule(theirs.module)
            times = 1 if role == "q" else parts.heads
            for name in ("weight", "bias"):
                value, its = getattr(old, name, None), getattr(module, name, None)
                if value is not None and its is not None:
                    of_GKN = value.data[ours.rows].reshape(-1, parts.width, *value.shape[1:])
                    its.data[theirs.rows] = of_GKN.repeat_interleave(times, 0).reshape(-1, *value.shape[1:])
    return made


SHAPES: dict[str, Callable[[Model, int], Model]] = {
    "identity blocks": identity_blocks, "width, zeros": zero_padded, "width, clones": cloned, "groups": groups_split,
}  # fmt: skip
"""The last one of families that have groups."""


def _grown(model: Model, **sizes: int) -> Model:
    """A fresh model of the same family in other sizes."""
    told = model.config.to_dict() | {"layer_types": None}
    if "head_dim" in told:
        told["head_dim"] = anatomy(model).width
    config = type(model.config)(**{key: value for key, value in told.items() if value is not None})
    for name, size in sizes.items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    made = type(model)(config)
    return made.eval().requires_grad_(False)


def _widened(model: Model, seed: int, *, clone: bool) -> Model:
    parts, config = anatomy(model), model.config
    d, groups, neurons = parts.residual, parts.groups, parts.neurons
    chance = torch.Generator().manual_seed(seed)
    more = 1.0 if clone else 0.5
    e, g2, f2 = d + int(more * d), groups + int(more * groups), neurons + int(more * neurons)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    sizes = {"hidden_size": e, "num_attention_heads": g2 * parts.heads, "intermediate_size": f2}
    if getattr(config, "num_key_value_heads", None):
        sizes["num_key_value_heads"] = g2
    if hasattr(config, "n_inner"):
        sizes["n_inner"] = sizes.pop("intermediate_size")
    eps = next(name for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") if hasattr(config, name))
    made = _grown(model, **sizes)
    if not clone:
        setattr(made.config, eps, getattr(config, eps) * d / e)
        made.config.tie_word_embeddings = tied = tied and not parts.family.centred
        made = type(model)(made.config).eval().requires_grad_(False)
    new = anatomy(made)
    sizes_of = {name: value.shape for name, value in made.state_dict().items()}
    same = {name: value for name, value in model.state_dict().items() if value.shape == sizes_of.get(name)}
    made.load_state_dict(same, strict=False)  # norms within a head, which nothing below knows of
    # which old group and neuron every new one is, and what is read of it: nothing of those that are nobody's
    of_G = list(range(groups)) + (list(range(groups)) if clone else [-1] * (g2 - groups))
    of_F = list(range(neurons)) + (list(range(neurons)) if clone else [-1] * (f2 - neurons))
    share = 0.5 if clone else 1.0

    def stands(of: Sequence[int], size: int) -> Tensor:
        """New × old: a one where they are one."""
        m = torch.zeros(len(of), max(of) + 1, dtype=torch.float64)
        for b, a in enumerate(of):
            m[b, a] = 1.0 if a >= 0 else 0.0
        return torch.kron(m, torch.eye(size, dtype=torch.float64))

    per_role = {
        "q": stands(of_G, parts.heads * parts.width), "k": stands(of_G, parts.width), "v": stands(of_G, parts.width),
        "gate": stands(of_F, 1), "up": stands(of_F, 1),
    }  # fmt: skip
    into = {"o": share * per_role["q"].T, "down": share * per_role["gate"].T}
    write_ED = torch.eye(d, dtype=torch.float64)
    write_ED = torch.cat([write_ED, write_ED if clone else torch.zeros(e - d, d, dtype=torch.float64)])

    def centre(x_DN: Tensor) -> Tensor:
        return x_DN - x_DN.mean(0) if parts.family.centred and not clone else x_DN

    def reading(weight_OD: Tensor) -> Tensor:
        noise = torch.randn(len(weight_OD), e - d, generator=chance, dtype=torch.float64) * weight_OD.std()
        if clone:
            return torch.cat([weight_OD / 2 + noise, weight_OD / 2 - noise], 1)
        return torch.cat([weight_OD, noise], 1)

    gain = 1.0 if clone else math.sqrt(d / e)
    for layer in range(parts.layers):
        for role in parts.family.modules:
            ours, theirs = parts.part(layer, role), new.part(layer, role)
            old, module = model.get_submodule(ours.module), made.get_submodule(theirs.module)
            weight, bias = _get(old)[ours.rows], getattr(old, "bias", None)
            whole, whole_bias = _get(module).clone(), getattr(module, "bias", None)
            if role in READERS:
                m = per_role[role]
                fresh = torch.randn(len(m), d, generator=chance, dtype=torch.float64) * weight.std()
                nobody = (m.sum(1) == 0).double()[:, None]
                whole[theirs.rows] = reading(m @ weight + nobody * fresh)
                given = None if bias is None else m @ bias.double()[ours.rows]
            else:
                whole[theirs.rows] = write_ED @ centre(weight @ into[role])
                given = None if bias is None else write_ED @ centre(bias.double()[:, None])[:, 0]
            _set(module, whole)
            if whole_bias is not None and given is not None:
                whole_bias.data[theirs.rows] = given.to(whole_bias.dtype)
        for where in parts.family.norms:
            names = f"{parts.family.layers}.{layer}.{where}"
            _norm(model.get_submodule(names), made.get_submodule(names), write_ED, gain)
    final = gain * (0.5 if clone and tied else 1.0)
    _norm(model.get_submodule(parts.family.final_norm), made.get_submodule(parts.family.final_norm), write_ED, final)
    tables = [(embedding, made.get_input_embeddings())]
    if parts.family.positions:
        tables.append((model.get_submodule(parts.family.positions), made.get_submodule(parts.family.positions)))
    for table, its in tables:
        its.weight.data = (write_ED @ centre(table.weight.double().T)).T.to(table.weight.dtype).contiguous()
    if not tied:
        made.get_output_embeddings().weight.data = reading(head.weight.double()).to(head.weight.dtype)
    return made


def _norm(old: Any, new: Any, write_ED: Tensor, gain: float) -> None:
    new.weight.data = (gain * (write_ED @ old.weight.double())).to(old.weight.dtype)
    if getattr(old, "bias", None) is not None:
        share = gain if gain == 0.5 else 1.0  # a final norm before a tied head that doubles
        new.bias.data = (share * (write_ED @ old.bias.double())).to(old.bias.dtype)


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
