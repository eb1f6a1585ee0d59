"""What has been published for adapters between bases of other widths, from the formulae: peers of `widths`.

    Theseus    (Rinaldi et al. 2026, arXiv:2602.12952)    ΔW₂ = P_out·ΔW₁·P_inᵀ, P_in from activations X that go in,
                                                          P_out from those that come out
    BiCo       (Son et al. 2026, arXiv:2605.28444)        the same, with P_out from gradients G by what comes out
    LoRASuite  (Li et al. 2025, arXiv:2505.13515)         T = E₁⁺·E₂ on the embeddings of shared tokens, and by heads
                                                          a → b   ΔQ₂ = (Q₁·T·Q₂ᵀ)ᵀ·ΔQ₁·T, K and V likewise
                                                                  ΔO₂ = Tᵀ·ΔO₁·(O₁ᵀ·T·O₂)
                                                          up      A₂ = A₁·T, B₂ = U₂·T⁺·U₁⁺·B₁
                                                          down    A₂ = A₁·D₁⁺·T·D₂, B₂ = T⁺·B₁

P = argmin ‖X₁·Pᵀ − X₂‖ over orthonormal maps: X₂ᵀX₁ = UΣVᵀ, P = UVᵀ. LoRASuite pairs heads one to one by the cosine of
what they do to the stream, (Tᵀ·Q₁ᵀK₁·T, Tᵀ·V₁ᵀO₁ᵀ·T) beside (Q₂ᵀK₂, V₂ᵀO₂ᵀ), with keys and values repeated for their
heads, and cuts what comes out to the adapter's rank; a gate is treated as an up. Layers it pairs by CKA, in order: each
stays where it is between equal depths. Our additions, for all of them: a group of heads takes the mean of
what its heads were given, every module keeps the size of its update against its weight where the formula lets it go
(LoRASuite's does), and of three strengths the one counts that brings the new base nearest to the adapted old one, as in
`transport`.

Legend: H, J widths of old and new; h heads of d numbers.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from workers.compute.data import Row
from workers.compute.lora import Adapter, Patch, dense
from workers.compute.lowrank import LowRank
from workers.compute.model import Model, Tokenizer, load
from workers.compute.plain import plain
from workers.compute.rebase.activations import Shared, completed, shared, surprise, with_asked
from workers.compute.rebase.transport import STRENGTHS

Patches = Mapping[str, Patch]


def published(
    old: Path,
    model: Model,
    tokenizer: Tokenizer,
    adapter: Adapter,
    rows: Sequence[Row],
    same: Sequence[tuple[int, int]],
) -> dict[str, Adapter]:
    """What each way makes of ``adapter`` on ``model``; ``same``: tokens of the old and the new base that are one."""
    first, its = load(old, "fp32")
    read = shared(its, tokenizer, completed(first, its, adapter, rows), (256, 256))
    read = with_asked(first, adapter, read, same)
    sides = [_gathered(one, read, side, list(adapter.patches)) for side, one in enumerate((first, model))]
    ways: dict[str, Patches] = {"LoRASuite": lorasuite(first, model, adapter, same)}
    for way, output in (("Theseus", "out"), ("BiCo", "gradient")):
        ways[way] = {
            name: Patch(
                patch.a_RI @ _procrustes(sides[0][name, "in"], sides[1][name, "in"]).T,
                _procrustes(sides[0][name, output], sides[1][name, output]) @ patch.b_OR,
                patch.scale,
            )
            for name, patch in adapter.patches.items()
        }
    found = {}
    for way, patches in ways.items():
        tried = [
            plain({name: replace(patch, scale=patch.scale * strength) for name, patch in patches.items()}, {}, [])
            for strength in STRENGTHS
        ]
        told = surprise(model, read, tried)
        found[way] = tried[told.index(min(told))]
    return found


# ── by activations and gradients ─────────────────────────────────────────────


def _gathered(model: Model, read: Sequence[Shared], side: int, names: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """What goes into modules, what comes out, and the gradient of the texts' own loss by that."""
    found: dict[tuple[str, str], list[Tensor]] = {
        (name, kind): [] for name in names for kind in ("in", "out", "gradient")
    }
    places: list[int] = []

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], given: Tensor) -> None:
            found[name, "in"].append(inputs[0][0, places].detach())
            found[name, "out"].append(given[0, places].detach())
            given.register_hook(lambda g: found[name, "gradient"].append(g[0, places].clone()))

        return hook

    with ExitStack() as hooks:
        start = model.get_input_embeddings().register_forward_hook(lambda _m, _x, given: given.requires_grad_(True))
        hooks.callback(start.remove)
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        for text in read:
            places[:] = text.places[side]
            ids_T = torch.tensor(text.ids[side])
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
            F.cross_entropy(logits_TV, ids_T[1:], reduction="sum").backward()
    return {key: torch.cat(some) for key, some in found.items()}


def _procrustes(x1_NI: Tensor, x2_NJ: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x2_NJ.T @ x1_NI, full_matrices=False)
    turned: Tensor = u @ vt
    return turned


# ── by weights alone ─────────────────────────────────────────────────────────


@torch.no_grad()
def lorasuite(old: Model, new: Model, adapter: Adapter, same: Sequence[tuple[int, int]]) -> Patches:
    """LoRASuite without its fine-tuning, between bases of one depth and family (Llama's names)."""
    ours, theirs = (list(some) for some in zip(*same, strict=True))
    was_HV, is_JV = (_weight(model, "model.embed_tokens") for model in (old, new))
    t_HJ = torch.linalg.pinv(was_HV.T[ours]) @ is_JV.T[theirs]
    back_JH = torch.linalg.pinv(t_HJ)
    found: dict[str, Patch] = {}
    for layer in range(old.config.num_hidden_layers):
        at = f"model.layers.{layer}"
        found |= _attention(old, new, adapter, f"{at}.self_attn", t_HJ)
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"{at}.mlp.{part}"
            if (patch := adapter.patches.get(name)) is None:
                continue
            w1_OI, w2_OI, update = _weight(old, name), _weight(new, name), patch.update
            if part == "down_proj":
                a_RI, b_OR = update.a_RI @ torch.linalg.pinv(w1_OI) @ t_HJ @ w2_OI, back_JH @ update.b_OR
            else:
                a_RI, b_OR = update.a_RI @ t_HJ, w2_OI @ back_JH @ torch.linalg.pinv(w1_OI) @ update.b_OR
            found[name] = Patch(a_RI, b_OR, 1.0)
    return {name: _sized(patch, adapter.patches[name], old, new, name) for name, patch in found.items()}


def _attention(old: Model, new: Model, adapter: Adapter, at: str, t_HJ: Tensor) -> dict[str, Patch]:
    w1, w2 = ({part: _heads(model, f"{at}.{part}", _weight(model, f"{at}.{part}")) for part in _PARTS}
              for model in (old, new))  # fmt: skip
    was_hX, is_hX = _doing(w1, t_HJ), _doing(w2, None)
    alike_hh = F.normalize(was_hX, dim=1) @ F.normalize(is_hX, dim=1).T
    pairs = list(zip(*linear_sum_assignment(-alike_hh.numpy()), strict=True))
    found = {}
    for part in _PARTS:
        name = f"{at}.{part}"
        if (patch := adapter.patches.get(name)) is None:
            continue
        delta_hdI = _heads(old, name, patch.update.dense())
        moved_hdJ = torch.zeros_like(w2[part])
        for a, b in pairs:
            between_dd = w1[part][a] @ t_HJ @ w2[part][b].T
            moved_hdJ[b] = between_dd.T @ delta_hdI[a] @ t_HJ
        found[name] = _truncated(_whole(new, name, moved_hdJ), patch.a_RI.shape[0])
    return found


_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _heads(model: Model, name: str, matrix: Tensor) -> Tensor:
    """(h, d, H): rows of each head, of an output's its columns; keys and values once for each head that reads them."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    if name.endswith("o_proj"):
        return matrix.T.reshape(heads, -1, matrix.shape[0])
    if name.endswith("q_proj"):
        return matrix.reshape(heads, -1, matrix.shape[1])
    return matrix.reshape(groups, -1, matrix.shape[1]).repeat_interleave(heads // groups, 0)


def _whole(model: Model, name: str, given_hdH: Tensor) -> Tensor:
    """`_heads` undone; of a group the mean."""
    if name.endswith("o_proj"):
        return given_hdH.flatten(0, 1).T
    if not name.endswith("q_proj"):
        given_hdH = given_hdH.unflatten(0, (model.config.num_key_value_heads, -1)).mean(1)
    return given_hdH.flatten(0, 1)


def _doing(parts: Mapping[str, Tensor], t_HJ: Tensor | None) -> Tensor:
    """(h, 2·J²): what each head does to the stream, in the new one's coordinates."""
    q, k, v, o = (part if t_HJ is None else part @ t_HJ for part in parts.values())
    return torch.cat([(q.transpose(1, 2) @ k).flatten(1), (v.transpose(1, 2) @ o).flatten(1)], 1)


def _truncated(delta_OI: Tensor, rank: int) -> Patch:
    cut = LowRank.cut(torch.linalg.svd(delta_OI, full_matrices=False), rank, delta_OI.dtype)
    return Patch(cut.a_RI, cut.b_OR, 1.0)


def _sized(patch: Patch, was: Patch, old: Model, new: Model, name: str) -> Patch:
    """The update as large against its weight as it was."""
    share = float(was.update.norm()) / float(_weight(old, name).norm())
    norm = float(patch.update.norm())
    return replace(patch, scale=share * float(_weight(new, name).norm()) / norm if norm else 0.0)


def _weight(model: Model, name: str) -> Tensor:
    return dense(model.get_submodule(name))
