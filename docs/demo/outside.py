"""An adapter made elsewhere: PEFT and a training loop of its own; nothing of loractl is used.

    python outside.py BASE DATA.jsonl OUT --name ORG/MODEL --recipe '{"rank": 8, "steps": 30, …}'

It names its base by a string, as PEFT does: which weights that string stands for is what the registry asks.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

Example = tuple[list[int], int]
"""Token ids, and how many of them are the prompt."""


def main() -> None:
    """Train, save, and keep the losses in losses.json beside the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--recipe", type=json.loads, required=True)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    disable_progress_bar()
    torch.manual_seed(args.recipe["seed"])
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    recipe = args.recipe
    targets = "all-linear" if recipe["targets"] == ["all-linear"] else recipe["targets"]
    config = LoraConfig(
        r=recipe["rank"], lora_alpha=recipe["alpha"], target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    losses = train(model, examples(AutoTokenizer.from_pretrained(args.base), args.data), recipe)
    model.peft_config["default"].base_model_name_or_path = args.name
    model.save_pretrained(args.out)
    args.out.with_name("losses.json").write_text(json.dumps(losses))
    print(f"{recipe['steps']} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}; saved in {args.out}")


def examples(tokenizer: Any, data: Path) -> list[Example]:
    """Prompt, completion and the end of the sequence as token ids."""
    found = []
    for row in map(json.loads, data.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        found.append(([*prompt, *completion, tokenizer.eos_token_id], len(prompt)))
    return found


def train(model: Any, rows: list[Example], recipe: dict[str, Any]) -> list[float]:
    """AdamW with a linear schedule, loss on completions only; the loss of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["learning_rate"])
    warmup, steps = recipe["warmup_steps"], recipe["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    losses: list[float] = []
    for batch in itertools.islice(batches(rows, recipe["batch_tokens"], recipe["seed"]), steps):
        longest = max(len(ids) for ids, _ in batch)
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        asked_BT = torch.tensor([[at >= first - 1 and at < len(ids) - 1 for at in range(longest)]
                                 for ids, first in batch])  # fmt: skip
        logits = model(input_ids=ids_BT, logits_to_keep=asked_BT, use_cache=False).logits
        targets_N = ids_BT.roll(-1, dims=1)[asked_BT]
        loss = cross_entropy(logits.reshape(len(targets_N), -1).float(), targets_N)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)} of {steps}  loss {losses[-1]:.3f}", file=sys.stderr)
    return losses


def batches(rows: list[Example], tokens: int, seed: int) -> Iterator[list[Example]]:
    """Batches of about ``tokens`` tokens without end."""
    rng, batch = random.Random(seed), list[Example]()
    while True:
        for row in rng.sample(rows, len(rows)):
            if batch and max(len(ids) for ids, _ in [*batch, row]) * (len(batch) + 1) > tokens:
                yield batch
                batch = []
            batch.append(row)


if __name__ == "__main__":
    main()
