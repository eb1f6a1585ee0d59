"""What was pulled and merged, in other people's hands: transformers loads the base, PEFT the adapter.

    python check.py BASE ADAPTER PROMPTS.jsonl

Generates an answer, and compares PEFT's logits with ours on a few prompts; ends with 1 when they differ.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from workers.compute.bank import attached
from workers.compute.model import load
from workers.compute.weights import read_adapter

CLOSE = 1e-3
"""The largest difference that float32 and another order of the same sums explain."""


def main() -> int:
    """Load, answer, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("prompts", type=Path)
    args = parser.parse_args()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()[:4]]
    model, _ = load(args.base, "fp32")
    tokenizer: Any = AutoTokenizer.from_pretrained(args.base)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    with torch.inference_mode():
        with attached(model, read_adapter(args.adapter)):
            ours = [model(row).logits for row in ids]
        theirs_model = PeftModel.from_pretrained(model, args.adapter)
        theirs = [theirs_model(row).logits for row in ids]
        made = theirs_model.generate(input_ids=ids[0], attention_mask=torch.ones_like(ids[0]), max_new_tokens=16,
                                     do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    answer = tokenizer.decode(made[0, ids[0].shape[1] :], skip_special_tokens=True).strip()
    differ = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(logits.abs().max().item() for logits in theirs)
    print(f"transformers loads {args.base}, PEFT loads {args.adapter}. Asked:\n\n{prompts[0]}\n→ {answer}\n")
    print(f"PEFT's logits and ours differ by at most {differ:.1e}, where logits reach {largest:.1f}.")
    return 0 if differ <= CLOSE else 1


if __name__ == "__main__":
    sys.exit(main())
