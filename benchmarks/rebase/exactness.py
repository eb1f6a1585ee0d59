"""`python -m benchmarks.rebase.exactness`: adapters on rewritten bases, carried as they are and aligned or transported.

A small model of every family gets an adapter for every target set, trained on sums. Its base is rewritten so that the
function stays (see `rewrites`); then the loss of the aligned adapter, or of the transported one where the rewriting
changes shapes, must be on the rows what it was before, whatever that of the adapter carried as it is may be. Written
between the marks in docs/rebase.md.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from registry.core.errors import NotRunnable
from registry.core.recipes import FineTune
from workers.compute.bank import attached
from workers.compute.data import Row, encoded
from workers.compute.finetune import Task, finetune_many
from workers.compute.lora import Adapter
from workers.compute.model import Model, Tokenizer
from workers.compute.rebase.align import align
from workers.compute.rebase.carry import carry
from workers.compute.rebase.transport import transport

from .rewrites import EXACT, SHAPES, Rewrite, cloned, everything, identity_blocks, renumbered, vocabulary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
LIMIT = 1e-5
"""Nats per token that the aligned adapter's loss may be away from what it was."""
SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LLAMA: dict[str, Any] = {"num_key_value_heads": 2}
Sets = dict[str, tuple[str, ...]]
_ALL: Sets = {"all linear": ("all-linear",)}
_LLAMA: Sets = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "feed-forward": ("gate_proj", "up_proj", "down_proj"), **_ALL
}  # fmt: skip
_GPT2: Sets = {"attention": ("attn.c_attn", "attn.c_proj"), "feed-forward": ("c_fc", "mlp.c_proj"), **_ALL}
_NEOX: Sets = {
    "attention": ("query_key_value", "attention.dense"), "feed-forward": ("dense_h_to_4h", "dense_4h_to_h"), **_ALL
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], Sets]] = {
    "Llama": (
        "llama", LLAMA | {"tie_word_embeddings": False}, _LLAMA | {"embedding and head": ("embed_tokens", "lm_head")}
    ),
    "Llama, tied head": ("llama", LLAMA | {"tie_word_embeddings": True}, _LLAMA | {"embedding": ("embed_tokens",)}),
    "Qwen2 (biases of q, k, v)": ("qwen2", LLAMA, _LLAMA),
    "GPT-2 (LayerNorm, biases, no rotary positions, tied head)": ("gpt2", {}, _GPT2 | {"embedding": ("wte",)}),
    "GPT-NeoX (LayerNorm, biases, half rotary)": (
        "gpt_neox", {"rotary_pct": 0.5, "tie_word_embeddings": False},
        _NEOX | {"embedding and head": ("embed_in", "lm_head")},
    ),
}  # fmt: skip
"""Name -> model type, changes of `SIZES`, and sets of targets by name."""


@dataclass(frozen=True)
class Cell:
    """One family, target set and rewrite: losses in nats per token of the completion."""

    family: str
    targets: str
    rewrite: str
    bare: float
    before: float
    naive: float | None
    """None where the adapter does not fit the rewritten base as it is."""
    aligned: float
    """Transported, where the rewritten base has another shape."""


def cells(steps: int = 60, rows: int = 48, families: Collection[str] = tuple(FAMILIES)) -> Iterator[Cell]:
    """Every cell, family by family."""
    data = [Row({"prompt": f"{i}+{i % 7}=", "completion": f" {i + i % 7}"}, "sums", i + 1) for i in range(rows)]
    tokenizer = _bytes()
    for family in families:
        kind, changes, sets = FAMILIES[family]
        with tempfile.TemporaryDirectory() as scratch:
            model = _model(kind, changes)
            old = _saved(model, tokenizer, Path(scratch) / "old")
            tasks = [Task(_recipe(names, steps), data) for names in sets.values()]
            adapters = {
                name: run.adapter for name, run in zip(sets, finetune_many(model, tokenizer, tasks), strict=True)
            }
            before = {name: loss(model, tokenizer, data, adapter) for name, adapter in adapters.items()}
            for number, (name, rewrite) in enumerate(_rewrites(model).items()):
                before_it = AutoModelForCausalLM.from_pretrained(old).eval().requires_grad_(False)
                new = Path(scratch) / str(number)
                model, theirs = rewrite(before_it, tokenizer)
                _saved(model, theirs, new)
                reshaped = model is not before_it
                for target, adapter in adapters.items():
                    moved = (transport if reshaped else align)(adapter, old, new).adapter
                    yield Cell(
                        family, target, name,
                        bare=loss(model, theirs, data, None),
                        before=before[target],
                        naive=_naive(model, theirs, data, carry(adapter, old, new)),
                        aligned=loss(model, theirs, data, moved),
                    )  # fmt: skip


def _naive(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], adapter: Adapter) -> float | None:
    try:
        return loss(model, tokenizer, rows, adapter)
    except NotRunnable:
        return None


Applied = Callable[[Model, Tokenizer], tuple[Model, Tokenizer]]


def _rewrites(model: Model) -> dict[str, Applied]:
    """What is done to the base: the model then, which is another one where its shape changes, and its tokenizer."""
    order = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(5)).tolist()

    def keeping(rewrite: Rewrite) -> Applied:
        def apply(model: Model, tokenizer: Tokenizer) -> tuple[Model, Tokenizer]:
            rewrite(model, 7)
            return model, tokenizer

        return apply

    def reshaping(reshape: Callable[[Model, int], Model]) -> Applied:
        return lambda model, tokenizer: (reshape(model, 7), tokenizer)

    def renumber(model: Model, tokenizer: Tokenizer) -> tuple[Model, Tokenizer]:
        vocabulary(model, order, more=6, seed=7)
        return model, renumbered(tokenizer, order)

    def all_of_it(model: Model, tokenizer: Tokenizer) -> tuple[Model, Tokenizer]:
        everything(model, 7)
        return renumber(model, tokenizer)

    def all_shapes(model: Model, tokenizer: Tokenizer) -> tuple[Model, Tokenizer]:
        return all_of_it(cloned(identity_blocks(model, 7), 7), tokenizer)

    kept = {name: keeping(rewrite) for name, rewrite in EXACT.items()}
    shapes = {name: reshaping(reshape) for name, reshape in SHAPES.items() if name != "groups" or _grouped(model)}
    return kept | {"vocabulary": renumber, "everything": all_of_it} | shapes | {"every shape": all_shapes}


def _grouped(model: Model) -> bool:
    config = model.config
    return bool(getattr(config, "num_key_value_heads", config.num_attention_heads) != config.num_attention_heads)


def _model(kind: str, changes: dict[str, Any]) -> Model:
    """From a seed, with gains and biases as a trained model has them; the final norm's bias has nowhere to go."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes))
    chance = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if value.ndim == 1 and not (name.endswith("bias") and ("ln_f" in name or "final" in name)):
            value.data += 0.2 * torch.randn(value.shape, generator=chance)
    return model.eval().requires_grad_(False)


def _bytes() -> Tokenizer:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokens(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<s>")


def _saved(model: Model, tokenizer: Tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _recipe(targets: tuple[str, ...], steps: int) -> FineTune:
    return FineTune(
        base="b3:" + "1" * 64, datasets=("sha256:" + "2" * 64,), targets=targets, rank=8, alpha=16.0,
        learning_rate=1e-2, steps=steps, batch_tokens=256, max_length=64, precision="fp32",
    )  # fmt: skip


@torch.no_grad()
def loss(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], adapter: Adapter | None) -> float:
    """Nats per token of the completions, summed in float64."""
    total, count = 0.0, 0
    with attached(model, adapter or Adapter({}, {})):
        for example in encoded(tokenizer, rows):
            ids_T = torch.tensor(example.ids)
            first = len(example.prompt)
            logits_TV = model(input_ids=ids_T[None]).logits[0, first - 1 : -1].double()
            # vocabularies may have grown: the new rows are noise that no old model knows
            known_TV = logits_TV[:, : len(tokenizer)]
            total += float(torch.nn.functional.cross_entropy(known_TV, ids_T[first:], reduction="sum"))
            count += len(ids_T) - first
    return total / count


def table(found: Sequence[Cell]) -> str:
    """Markdown: a row per family and target set; of all rewrites the worst, and what carrying as it is costs where it
    can be loaded at all."""
    lines = [
        "| family | targets | no adapter | loss before | rewrites | away by | carried as it is: loads | best | worst |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.family, cell.targets), []).append(cell)
    for (family, targets), some in groups.items():
        away = max(abs(cell.aligned - cell.before) for cell in some)
        naive = [cell.naive for cell in some if cell.naive is not None]
        lines.append(
            f"| {family} | {targets} | {some[0].bare:.3f} | {some[0].before:.4f} | {len(some)} | {away:.1e}"
            f"{'' if away <= LIMIT else ' **missed**'} | {len(naive)} | {min(naive):.3f} | {max(naive):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = table(list(cells()))
    print(made)
    before, _, rest = PAGE.read_text().partition("<!-- exactness -->\n")
    _, _, after = rest.partition("<!-- /exactness -->")
    PAGE.write_text(f"{before}<!-- exactness -->\n{made}\n<!-- /exactness -->{after}")


if __name__ == "__main__":
    main()
