"""Fine-tuning 16 adapters at once, and one alone, against a loop with PEFT's modules; evaluation against PEFT's ways.

The model is a Llama of 30 million parameters with random weights; adapters have rank 16 on all linear modules. The
training peer is a hand-written loop in its steady state: forward, cross entropy of the asked positions, backward,
clipping, AdamW, on one adapter; 16 adapters cost it 16 such steps. It holds its factors in the precision in which ours
computes. Rounds of both take turns, each with a few steps that do not count; the median of the rounds is compared.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from registry.core.recipes import FineTune
from tests.workers import factories
from workers.compute.bank import Bank
from workers.compute.course import laid_out, learning_rate
from workers.compute.data import Example, Row, encoded
from workers.compute.finetune import Task, finetune_many
from workers.compute.lora import Adapter, fresh
from workers.compute.model import Model
from workers.compute.weights import write_adapter

from .house import Memory, apart
from .table import Row as Line
from .table import at_least, at_most

MANY, RANK, LAYERS, ROUNDS, STEPS, WARM = 16, 16, 8, 5, 6, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WANTED = {("fp32", 32): 2.6, ("fp32", 128): 1.6, ("bf16", 32): 2.4, ("bf16", 128): 1.6}
ALONE = {"fp32": 1.3, "bf16": 1.1}
CURVE, FAR = 40, 10
"""Steps of a curve that is compared, and how many times as far as a peer it may be: rounding errors grow by chance."""
ANSWERED = {("bf16", 16): 2.5, ("bf16", 64): 1.7, ("fp32", 16): 1.5, ("fp32", 64): 1.2}


def run(scale: float = 1.0) -> list[Line]:
    rows = []
    rounds, layers = (ROUNDS, LAYERS) if scale >= 0.5 else (1, max(1, round(LAYERS * scale)))
    look = scale < 0.1  # a quick one: one length, one precision
    for precision in ("fp32",) if look else DTYPES:
        for tokens in (32,) if look else (32, 128):
            ours, peer, bare = apart(_train, precision, tokens, MANY, rounds, layers)
            rows.append(
                at_least(
                    f"train {MANY} adapters, {tokens} tokens a step each, {precision}", MANY * peer / ours,
                    WANTED[precision, tokens], peer=f"{MANY} steps of a PEFT loop, {MANY * peer:.2f} s",
                    note=f"{ours:.2f} s a step of all, {MANY * tokens / ours:,.0f} tokens/s; the base alone, there and "
                    f"back without adapters: {bare:.2f} s, {MANY * peer / bare:.2f} ×",
                )
            )  # fmt: skip
        ours, peer, bare = apart(_train, precision, 128, 1, rounds, layers)
        trainer = apart(_trainer, precision, 128, layers)
        rows.append(
            at_least(
                f"train 1 adapter, 128 tokens a step, {precision}", peer / ours, ALONE[precision],
                peer=f"a PEFT loop, {1000 * peer:.0f} ms",
                note=f"{1000 * ours:.0f} ms a step; the base alone {1000 * bare:.0f} ms, {peer / bare:.2f} ×; "
                f"the Trainer of transformers {1000 * trainer:.0f} ms",
            )
        )  # fmt: skip
        ours, peer = apart(_away, precision, layers)
        rows.append(
            at_most(
                f"losses of {CURVE} steps, {precision}: farthest from those in float64", ours / peer, FAR,
                unit="× as far", peer=f"a PEFT loop on the same rows, {peer:.2g} nats", note=f"{ours:.2g} nats",
            )
        )  # fmt: skip
    together, one = (apart(_memory, many, layers) for many in (MANY, 1))
    rows.append(
        at_most(
            f"memory of {MANY} adapters trained at once, base included, fp32", together / (MANY * one), 0.4,
            unit="× as much", peer=f"{MANY} trainings of one, {MANY * one:.0f} MB", note=f"{together:.0f} MB",
        )
    )  # fmt: skip
    for (precision, tokens), wanted in list(ANSWERED.items())[: 1 if look else None]:
        ours, mixed, switched, swapped = apart(_answer, precision, tokens, rounds, layers)
        rows.append(
            at_least(
                f"forward of {MANY} adapters, {tokens} tokens each, {precision}", mixed / ours, wanted,
                peer=f"PEFT's mixed batch, {1000 * mixed:.0f} ms",
                note=f"{1000 * ours:.0f} ms; PEFT one after another: {1000 * switched:.0f} ms by set_adapter, "
                f"{1000 * swapped:.0f} ms by hot swap from files",
            )
        )  # fmt: skip
    return rows


def model(precision: str, layers: int) -> Model:
    """About 30 million parameters in 8 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made: Model = LlamaForCausalLM(config)
    return made.to(DTYPES[precision]).eval().requires_grad_(False)


def recipe(tokens: int, seed: int) -> FineTune:
    return factories.recipe(
        steps=WARM + STEPS, rank=RANK, alpha=32.0, targets=tuple(TARGETS), batch_tokens=tokens, max_length=tokens,
        learning_rate=1e-4, seed=seed,
    )  # fmt: skip


def _trainer(precision: str, tokens: int, layers: int) -> float:
    """Seconds of a step of the Trainer of transformers on PEFT's modules: for information."""
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    ids = torch.randint(3, 259, (8, tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=WARM + 2 * STEPS, learning_rate=1e-4, report_to=[],
            disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            peft.get_peft_model(model(precision, layers), config, autocast_adapter_dtype=precision == "fp32"),
            options, train_dataset=[{"input_ids": row, "labels": row} for row in ids], callbacks=[Ends()],
        )  # fmt: skip
        trainer.train()
    return (ends[-1] - ends[WARM - 1]) / (2 * STEPS)


def _away(precision: str, layers: int) -> tuple[float, float]:
    """How far losses are from those in float64 at most, on the same rows and weights: ours, and PEFT's loop's."""
    rows = [Row({"prompt": f"{i}+{i % 7}=", "completion": f" {i + i % 7}"}, "sums", i + 1) for i in range(64)]
    made = recipe(128, 0).model_copy(update={"steps": CURVE, "learning_rate": 2e-3})
    base, tokenizer = model(precision, layers), factories.tokenizer()
    [ours] = finetune_many(base, tokenizer, [Task(made, rows)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(fresh(base, made), folder, base="b3:" + "0" * 64, recipe="sha256:" + "0" * 64)

        def theirs(base: Model, dtype: torch.dtype) -> list[float]:
            ahead, _, _ = laid_out(base, made, encoded(tokenizer, rows))
            wrapped = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
            return _curve(wrapped.to(dtype), made, [batch for _, batch in zip(range(CURVE), ahead, strict=False)])

        exact = theirs(model(precision, layers).double(), torch.float64)
        peer = theirs(model(precision, layers), DTYPES[precision])

    def farthest(losses: Sequence[float]) -> float:
        return max(abs(one - two) for one, two in zip(losses, exact, strict=True))

    return farthest(ours.losses), farthest(peer)


def _curve(wrapped: Any, made: FineTune, batches: Sequence[Sequence[Example]]) -> list[float]:
    """Losses of a loop with PEFT's modules."""
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, weight_decay=0.0), []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(made, step)
        asked = sum(len(example.ids) - len(example.prompt) for example in batch)
        total = 0.0
        optimizer.zero_grad()
        for example in batch:
            ids_T, first = torch.tensor(example.ids), len(example.prompt)
            logits_TV = wrapped(input_ids=ids_T[None]).logits[0, first - 1 : -1]
            wide_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
            loss = F.cross_entropy(wide_TV, ids_T[first:], reduction="sum") / asked
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, made.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses


def _memory(many: int, layers: int) -> float:
    """MB above imports, at most, of training so many adapters at once, 128 tokens a step each."""
    at_rest = Memory.of(os.getpid())
    rows = [Row({"prompt": "a", "completion": "b" * 120}, "rows.jsonl", i + 1) for i in range(8)]
    finetune_many(model("fp32", layers), factories.tokenizer(), [Task(recipe(128, seed), rows) for seed in range(many)])
    return at_rest.growth()


def _train(precision: str, tokens: int, many: int, rounds: int, layers: int) -> tuple[float, float, float]:
    """Seconds of a step of all adapters, of one step of the peer, and of the base's own products for all adapters."""
    text = "".join(chr(97 + i % 26) for i in range(tokens - 3))
    rows = [Row({"prompt": "a", "completion": text[i:] + text[:i]}, "rows.jsonl", i + 1) for i in range(8)]
    base, tokenizer = model(precision, layers), factories.tokenizer()
    tasks = [Task(recipe(tokens, seed), rows) for seed in range(many)]
    theirs = _PeftLoop(model(precision, layers), precision, tokens)
    found: list[tuple[float, float, float]] = []
    ids_KT = torch.randint(3, 259, (many, tokens))

    def bare() -> None:
        x_KTH = base.get_input_embeddings()(ids_KT).requires_grad_()
        logits = base(inputs_embeds=x_KTH, use_cache=False).logits[:, 1:-1].flatten(0, 1)
        F.cross_entropy(logits.float(), ids_KT[:, 2:].flatten()).backward()

    for _ in range(rounds):
        ends: list[float] = []

        def ended(now: dict[str, Any], ends: list[float] = ends) -> None:
            if now["task"] == many - 1:
                ends.append(time.perf_counter())

        finetune_many(base, tokenizer, tasks, report=ended)
        ours = (ends[-1] - ends[WARM - 1]) / STEPS
        found.append((ours, theirs.seconds_of_a_step(), _seconds(bare)))
    ours_s, peer_s, bare_s = (statistics.median(each) for each in zip(*found, strict=True))
    return ours_s, peer_s, bare_s


class _PeftLoop:
    """PEFT's modules, and the loop around them that one would write."""

    def __init__(self, base: Model, precision: str, tokens: int) -> None:
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, config, autocast_adapter_dtype=precision == "fp32")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.ids = torch.randint(3, 259, (8, 1, tokens))
        self.step = 0

    def seconds_of_a_step(self) -> float:
        for _ in range(WARM):
            self._once()
        began = time.perf_counter()
        for _ in range(2 * STEPS):
            self._once()
        return (time.perf_counter() - began) / (2 * STEPS)

    def _once(self) -> None:
        ids = self.ids[self.step % 8]
        self.step += 1
        logits = self.model(input_ids=ids, use_cache=False).logits[0, 1:-1]
        loss = F.cross_entropy(logits.float(), ids[0, 2:])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        loss.item()


def _answer(precision: str, tokens: int, rounds: int, layers: int) -> tuple[float, ...]:
    """Seconds of a forward pass for all adapters: a bank's, PEFT's mixed batch, and PEFT's one after another: switched
    to, and hot-swapped from a file.
    """
    base = model(precision, layers)
    adapters = [_random(base, seed) for seed in range(MANY)]
    ids = torch.randint(3, 259, (MANY, tokens))
    bank = Bank(base, adapters)
    bank.assign([(which, 1) for which in range(MANY)])
    config = peft.LoraConfig(
        r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    mixed = peft.get_peft_model(model(precision, layers), config, "0", autocast_adapter_dtype=precision == "fp32")
    for which in range(1, MANY):
        mixed.add_adapter(str(which), config, autocast_adapter_dtype=precision == "fp32")
    mixed.eval()
    names = [str(which) for which in range(MANY)]
    found = []

    def switched() -> None:
        for which, name in enumerate(names):
            mixed.set_adapter(name)
            mixed(input_ids=ids[which : which + 1], use_cache=False)

    def swapped(folders: list[Path]) -> None:
        mixed.set_adapter("0")
        for which, folder in enumerate(folders):
            hotswap_adapter(mixed, str(folder), adapter_name="0", torch_device="cpu")
            mixed(input_ids=ids[which : which + 1], use_cache=False)

    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in names]
        for folder, adapter in zip(folders, adapters, strict=True):
            write_adapter(adapter, folder, base="b3:" + "0" * 64, recipe="sha256:" + "0" * 64)
        for _ in range(rounds):
            with bank.attached():
                ours = _seconds(lambda: base(input_ids=ids, use_cache=False))
            theirs = _seconds(lambda: mixed(input_ids=ids, use_cache=False, adapter_names=names))
            found.append((ours, theirs, _seconds(switched, 1), _seconds(lambda: swapped(folders), 1)))
    return tuple(statistics.median(each) for each in zip(*found, strict=True))


def _random(base: Model, seed: int) -> Adapter:
    return fresh(base, recipe(32, seed))


def _seconds(work: Callable[[], object], steps: int = STEPS) -> float:
    for _ in range(min(WARM, steps)):
        work()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - began) / steps
