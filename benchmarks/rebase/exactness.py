"""`python -m benchmarks.rebase.exactness`: adapters on rewritten bases, carried as they are and aligned.

A small model of every family gets an adapter for every target set, trained on sums. Its base is rewritten so that the
function stays (see `rewrites`); then the aligned adapter's loss on the rows must be what it was before, whatever that
of the adapter carried as it is may be. Written between the marks in docs/rebase.md.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from registry.core.recipes import FineTune
from workers.compute.bank import attached
from workers.compute.data import Row, encoded
from workers.compute.finetune import Task, finetune_many
from workers.compute.lora import Adapter
from workers.compute.model import Model, Tokenizer
from workers.compute.rebase.align import align
from workers.compute.rebase.carry import carry

from .rewrites import EXACT, Rewrite, everything, renumbered, vocabulary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
LIMIT = 1e-5
"""Nats per token that the aligned adapter's loss may be away from what it was."""
SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LLAMA: dict[str, Any] = {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "Llama": ("llama", LLAMA | {"tie_word_embeddings": False}, {"attention": ("q_proj", "k_proj", "v_proj", "o_proj")}),
    "Llama, tied head": ("llama", LLAMA | {"tie_word_embeddings": True}, {"q and v": ("q_proj", "v_proj")}),
    "Qwen2 (biases of q, k, v)": ("qwen2", LLAMA, {"feed-forward": ("gate_proj", "up_proj", "down_proj")}),
    "GPT-2 (LayerNorm, biases, no rotary positions)": ("gpt2", {}, {"attention": ("c_attn",)}),
    "GPT-NeoX (LayerNorm, biases, half rotary)": ("gpt_neox", {"rotary_pct": 0.5}, {"attention": ("query_key_value",)}),
}  # fmt: skip
"""Name -> model type, changes of `SIZES`, and a target set beside all linear modules."""


@dataclass(frozen=True)
class Cell:
    """One family, target set and rewrite: losses in nats per token of the completion."""

    family: str
    targets: str
    rewrite: str
    bare: float
    before: float
    naive: float
    aligned: float


def cells(steps: int = 60, rows: int = 48) -> Iterator[Cell]:
    """Every cell, family by family."""
    data = [Row({"prompt": f"{i}+{i % 7}=", "completion": f" {i + i % 7}"}, "sums", i + 1) for i in range(rows)]
    tokenizer = _bytes()
    for family, (kind, changes, targets) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = _model(kind, changes)
            old = _saved(model, tokenizer, Path(scratch) / "old")
            sets = {**targets, "all linear": ("all-linear",)}
            tasks = [Task(_recipe(names, steps), data) for names in sets.values()]
            adapters = {
                name: run.adapter for name, run in zip(sets, finetune_many(model, tokenizer, tasks), strict=True)
            }
            before = {name: _loss(model, tokenizer, data, adapter) for name, adapter in adapters.items()}
            for number, (name, rewrite) in enumerate(_rewrites(model).items()):
                model = AutoModelForCausalLM.from_pretrained(old).eval().requires_grad_(False)
                new = Path(scratch) / str(number)
                theirs = rewrite(model, tokenizer)
                _saved(model, theirs, new)
                for target, adapter in adapters.items():
                    carried, aligned = carry(adapter, old, new), align(adapter, old, new).adapter
                    yield Cell(
                        family, target, name,
                        bare=_loss(model, theirs, data, None),
                        before=before[target],
                        naive=_loss(model, theirs, data, carried),
                        aligned=_loss(model, theirs, data, aligned),
                    )  # fmt: skip


def _rewrites(model: Model) -> dict[str, Callable[[Model, Tokenizer], Tokenizer]]:
    """What is done to the base; each gives the tokenizer that belongs to it then."""
    order = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(5)).tolist()

    def keeping(rewrite: Rewrite) -> Callable[[Model, Tokenizer], Tokenizer]:
        def apply(model: Model, tokenizer: Tokenizer) -> Tokenizer:
            rewrite(model, 7)
            return tokenizer

        return apply

    def renumber(model: Model, tokenizer: Tokenizer) -> Tokenizer:
        vocabulary(model, order, more=6, seed=7)
        return renumbered(tokenizer, order)

    def all_of_it(model: Model, tokenizer: Tokenizer) -> Tokenizer:
        everything(model, 7)
        return renumber(model, tokenizer)

    kept = {name: keeping(rewrite) for name, rewrite in EXACT.items()}
    return kept | {"vocabulary": renumber, "everything": all_of_it}


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
def _loss(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], adapter: Adapter | None) -> float:
    """Nats per token of the completions, summed in float64."""
    total, count = 0.0, 0
    with attached(model, adapter or Adapter({}, {})):
        for example in (encoded(tokenizer, row) for row in rows):
            ids_T = torch.tensor(example.ids)
            first = len(example.prompt)
            logits_TV = model(input_ids=ids_T[None]).logits[0, first - 1 : -1].double()
            # vocabularies may have grown: the new rows are noise that no old model knows
            known_TV = logits_TV[:, : len(tokenizer)]
            total += float(torch.nn.functional.cross_entropy(known_TV, ids_T[first:], reduction="sum"))
            count += len(ids_T) - first
    return total / count


def table(found: Sequence[Cell]) -> str:
    """Markdown: a row per family and target set; of all rewrites the worst, and what carrying as it is costs."""
    lines = [
        "| family | targets | no adapter | loss before | aligned: away by | rewrites | carried as it is | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.family, cell.targets), []).append(cell)
    for (family, targets), some in groups.items():
        away = max(abs(cell.aligned - cell.before) for cell in some)
        naive = [cell.naive for cell in some]
        lines.append(
            f"| {family} | {targets} | {some[0].bare:.3f} | {some[0].before:.4f} | {away:.1e}"
            f"{'' if away <= LIMIT else ' **missed**'} | {len(some)} | {min(naive):.3f} | {max(naive):.3f} |"
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
