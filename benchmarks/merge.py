"""Merging files to files: against `cp` of the same shards, as many at a time as merge threads, and against PEFT.

A 1.1 B-parameter Llama in bfloat16 with random weights, an adapter of rank 16 on all linear modules. Input lies in the
page cache, output files are new each time. Where the merge is on the disk when it returns, so is what `cp` wrote
(`sync`). PEFT's merge_and_unload and save_pretrained run once, for information. Memory is that of fresh processes,
beyond their imports.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from registry.files import cores
from workers.compute.lora import Adapter, Patch
from workers.compute.merge import Form, merge
from workers.compute.model import skeleton
from workers.compute.shards import Stored, stored_tensors
from workers.compute.stream import BLOCK_ELEMENTS
from workers.compute.weights import DTYPES, framed, read_adapter, write_adapter, write_tensors

from .house import Memory, apart
from .table import Row, at_most, seconds

LAYERS, HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
RANK = 16
ROUNDS = 5
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip


def make_base(folder: Path, layers: int) -> None:
    """A base of ``layers`` layers by two shards of equal size, written tensor by tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
    parameters = [(name, tuple(value.shape)) for name, value in skeleton(folder).named_parameters()]
    total = sum(torch.Size(shape).numel() for _, shape in parameters)
    chance, places, before = torch.Generator().manual_seed(0), dict[str, str](), 0
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[], []]
    for name, shape in parameters:
        shards[before * 2 >= total].append((name, shape))
        before += torch.Size(shape).numel()
    for index, shard in enumerate(shards, start=1):
        path, header, end = folder / f"model-{index:05}-of-00002.safetensors", dict[str, object](), 0
        for name, shape in shard:
            size = torch.Size(shape).numel() * 2
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end, places[name] = end + size, path.name
        with path.open("wb") as file:
            file.write(framed({"__metadata__": {"format": "pt"}} | header))
            for _, shape in shard:
                value = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=chance)
                file.write(value.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total * 2}, "weight_map": places}))


def make_adapter(folder: Path, base: Path) -> None:
    """Rank 16 on all linear modules but the head, in float32."""
    chance, patches = torch.Generator().manual_seed(1), {}
    for name, tensor in stored_tensors(base).items():
        if name.endswith("_proj.weight"):
            outputs, inputs = tensor.shape
            a_RI = torch.empty(RANK, inputs).normal_(0, inputs**-0.5, generator=chance)
            b_OR = torch.empty(outputs, RANK).normal_(0, 2e-3, generator=chance)
            patches[name.removesuffix(".weight")] = Patch(a_RI, b_OR, 2.0)
    targets = sorted({name.rpartition(".")[2] for name in patches})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
              "target_modules": targets, "bias": "none"}  # fmt: skip
    write_adapter(Adapter(patches, config), folder, base="b3:" + "0" * 64, recipe="sha256:" + "0" * 64)


def ours_apart(base: Path, adapter: Path, out: Path) -> float:
    """MB that reading the adapter and merging take beyond imports; a small merge first loads what they load."""
    with tempfile.TemporaryDirectory() as small:
        make_small(Path(small))
        merge(Path(small) / "base", read_adapter(Path(small) / "adapter"), Path(small) / "out")
    memory = Memory.of(os.getpid())
    merge(base, read_adapter(adapter), out)
    return memory.growth()


def make_small(folder: Path) -> None:
    """A base of one small layer, and an adapter."""
    (folder / "base").mkdir()
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64,
             "num_attention_heads": 4}  # fmt: skip
    (folder / "base" / "config.json").write_text(json.dumps(_CONFIG | sizes))
    tensors = {name: torch.zeros(value.shape, dtype=torch.bfloat16)
               for name, value in skeleton(folder / "base").named_parameters()}  # fmt: skip
    write_tensors(folder / "base" / "model.safetensors", tensors, {})
    make_adapter(folder / "adapter", folder / "base")


def peft_apart(base: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """Seconds and MB of PEFT's merge, beyond imports."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    memory = Memory.of(os.getpid())

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)

    return seconds(work), memory.growth()


def products(adapter: Adapter, threads: int) -> float:
    """Seconds of nothing but the products and their rounding, in blocks that stay in the cache, a thread a core."""

    def work(patches: Sequence[Patch]) -> None:
        torch.set_num_threads(1)
        for patch in patches:
            (outputs, _), (_, inputs) = patch.b_OR.shape, patch.a_RI.shape
            rows = BLOCK_ELEMENTS // inputs
            stored = torch.zeros(rows, inputs, dtype=torch.bfloat16)
            wide = torch.empty(rows, inputs)
            for first in range(0, outputs, rows):
                left_nR = patch.b_OR[first : first + rows]
                wide[: len(left_nR)].copy_(stored[: len(left_nR)]).addmm_(left_nR, patch.a_RI)
                stored[: len(left_nR)].copy_(wide[: len(left_nR)])

    patches = list(adapter.patches.values())
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        taken = seconds(lambda: list(pool.map(work, [patches[at::threads] for at in range(threads)])))
    torch.set_num_threads(before)
    return taken


def off_by(base: Path, adapter: Adapter, out: Path) -> tuple[float, int]:
    """Share of the first layer's elements that are not the float64 sum rounded, and by how many units at most."""
    before, after = stored_tensors(base), stored_tensors(out)
    wrong = total = worst = 0
    for name, patch in adapter.patches.items():
        if ".layers.0." not in f".{name}":
            continue
        w, found = (_values(stored[f"{name}.weight"]) for stored in (before, after))
        update = patch.b_OR.double() @ patch.a_RI.double() * patch.scale
        exact = (w.double() + update).bfloat16()
        apart_by = (found.view(torch.int16).int() - exact.view(torch.int16).int()).abs()
        wrong, total, worst = wrong + int((apart_by > 0).sum()), total + w.numel(), max(worst, int(apart_by.max()))
    return wrong / total, worst


def _values(tensor: Stored) -> torch.Tensor:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        data = bytearray(file.read(tensor.size))
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def run(scale: float = 1.0) -> list[Row]:
    threads = cores()
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORACTL_BENCH_DIR")) as name:
        base, folder, out = Path(name) / "base", Path(name) / "adapter", Path(name) / "out"
        make_base(base, max(1, round(LAYERS * scale)))
        make_adapter(folder, base)
        adapter = read_adapter(folder)
        shards = sorted(base.glob("*.safetensors"))
        size = sum(shard.stat().st_size for shard in shards)

        def copy(durable: bool) -> Callable[[], None]:
            def work() -> None:
                out.mkdir()
                commands = [["cp", "--reflink=never", str(shard), str(out)] for shard in shards]
                for first in range(0, len(commands), threads):
                    running = [subprocess.Popen(command) for command in commands[first : first + threads]]
                    if any(process.wait() for process in running):
                        raise OSError("cp failed")
                if durable:
                    subprocess.run(["sync", *(str(out / shard.name) for shard in shards)], check=True)

            return work

        def ours(digests: bool, durable: bool) -> Callable[[], None]:
            def work() -> None:
                merge(base, adapter, out, form=Form(digests=digests, durable=durable, threads=threads))

            return work

        works = {
            "cp": copy(False), "merge": ours(False, False), "hashed": ours(True, False),
            "cp, on the disk": copy(True), "merge, on the disk": ours(False, True),
            "hashed, on the disk": ours(True, True),
        }  # fmt: skip
        times: dict[str, list[float]] = {label: [] for label in works}
        for _ in range(ROUNDS + 1):  # the first round warms up
            for label, work in works.items():
                times[label].append(seconds(work))
                shutil.rmtree(out)
                os.sync()
        median = {label: statistics.median(found[1:]) for label, found in times.items()}
        growth = apart(ours_apart, base, folder, out)
        share, units = off_by(base, adapter, out)
        shutil.rmtree(out)
        theirs, memory = apart(peft_apart, base, folder, out)
    alone = statistics.median(products(adapter, threads) for _ in range(3))
    factors = sum(p.a_RI.nbytes + p.b_OR.nbytes for p in adapter.patches.values())
    gigabytes, model = size / 1e9, f"{size / 1e9:.1f} GB of bf16, rank {RANK} on all linears, {threads} threads"

    def row(claim: str, label: str, peer: str, limit: float, note: str = model) -> Row:
        ratio = median[label] / median[peer]
        return at_most(claim, ratio, limit, unit="× the time", peer=f"{peer}, {gigabytes / median[peer]:.2f} GB/s",
                       note=f"{gigabytes / median[label]:.2f} GB/s; {note}")  # fmt: skip

    return [
        row("merge, files to files, not hashed", "merge", "cp", 1.15,
            f"the float32 products alone take {alone / median['cp']:.2f} × the time of cp; {model}"),
        row("merge, files to files, tensor digests on the way", "hashed", "cp", 1.5),
        row("merge, on the disk when it returns", "merge, on the disk", "cp, on the disk", 1.15),
        row("merge with digests, on the disk when it returns", "hashed, on the disk", "cp, on the disk", 1.5),
        at_most("merge, time against PEFT's merge_and_unload and save_pretrained", median["hashed"] / theirs, 1,
                unit="× the time", peer=f"PEFT, {theirs:.1f} s and {memory:,.0f} MB, once", note=model),
        at_most("merge, memory above imports", growth, 100, unit="MB", peer=f"PEFT, {memory:,.0f} MB",
                note=f"{factors / 1e6:.0f} MB of it are the adapter"),
        at_most("merged elements that are not the rounded float64 sum", share, 1e-3, unit="of all",
                note=f"first layer; off by {units} unit in the last place at most"),
    ]  # fmt: skip
