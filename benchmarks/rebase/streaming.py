"""`python -m benchmarks.rebase.streaming [--scale 0.125] [--in DIR]`: tiers N and 0 and routing on an 8-billion shape.

Two checkpoints of Llama-3-8B's shape in bfloat16, the second a drifted first, and an adapter of rank 16 on all linear
matrices: the adapter is read, carried, and its signals are measured (drift of every tensor, and within what the adapter
reads and writes), in a process of its own whose memory is watched. The peer reads both checkpoints, block by block on
every core, and does nothing with them. Both begin with nothing of the files in memory. `--scale` takes fewer layers.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from registry.core.route import Signals, route
from registry.files import cores
from tests.factories import adapter_config, write_json
from workers.compute.finetune import silent
from workers.compute.rebase.carry import carry
from workers.compute.rebase.normalise import normalised
from workers.compute.rebase.signals import compare
from workers.compute.shards import Stored, stored_tensors
from workers.compute.weights import framed, write_tensors

from ..house import apart, peak, resident
from ..run import machine
from ..table import seconds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
HIDDEN, NEURONS, HEADS, GROUPS, LAYERS, VOCABULARY, RANK = 4096, 14336, 32, 8, 32, 128256, 16
DRIFT = 0.05
LIMIT, MEMORY = 2.0, 4.0
"""Times of reading both checkpoints, and GB."""
_TILE = 1 << 25
"""Random values that are written again and again: drawing 16 billion of them would take longer than all the rest."""
_FILE = 5_000_000_000


@dataclass(frozen=True)
class Measured:
    """Seconds of a part, and what the process held at its peak beyond what it held at rest, and altogether, in GB."""

    reading: float
    carrying: float
    comparing: float
    grown: float
    held: float
    drift: float
    first: str


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Llama-3-8B's tensors."""
    narrow = HIDDEN // HEADS * GROUPS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        one = f"model.layers.{layer}"
        found |= {
            f"{one}.self_attn.q_proj.weight": (HIDDEN, HIDDEN), f"{one}.self_attn.k_proj.weight": (narrow, HIDDEN),
            f"{one}.self_attn.v_proj.weight": (narrow, HIDDEN), f"{one}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{one}.mlp.gate_proj.weight": (NEURONS, HIDDEN), f"{one}.mlp.up_proj.weight": (NEURONS, HIDDEN),
            f"{one}.mlp.down_proj.weight": (HIDDEN, NEURONS), f"{one}.input_layernorm.weight": (HIDDEN,),
            f"{one}.post_attention_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_base(folder: Path, layers: int, values: torch.Tensor) -> Path:
    """A checkpoint of this shape, in files of 5 GB."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tile = values.view(torch.uint8).numpy()
    for number, some in enumerate(_files(shapes(layers))):
        header: dict[str, Any] = {}
        end = 0
        for name, shape in some.items():
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(framed(header))
            for at in range(0, end, len(tile)):
                file.write(tile[: end - at].data)
            file.flush()
            os.fsync(file.fileno())
    return folder


def _files(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    some: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        size += 2 * torch.Size(shape).numel()
        if some and size > _FILE:
            yield some
            some, size = {}, 2 * torch.Size(shape).numel()
        some[name] = shape
    yield some


def write_adapter(folder: Path, layers: int) -> Path:
    """Rank 16 on all linear matrices of the layers, as PEFT would have written it."""
    tensors = {}
    chance = torch.Generator().manual_seed(2)
    for name, shape in shapes(layers).items():
        if "_proj." in name:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=chance) / shape[1] ** 0.5
            tensors[f"{place}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=chance) * 0.01
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    write_json(folder / "adapter_config.json", adapter_config("org/model", RANK, targets))
    return folder


def forget(*folders: Path) -> None:
    """Nothing of the files is left in memory."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(*folders: Path) -> None:
    """All bytes of the checkpoints, once, a tensor a thread."""

    def one(tensor: Stored) -> None:
        data, at = memoryview(bytearray(1 << 20)), 0
        with tensor.path.open("rb") as file:
            while at < tensor.size:
                some = data[: tensor.size - at]
                tensor.read_into(file.fileno(), at, some)
                at += len(some)

    tensors = [tensor for folder in folders for tensor in stored_tensors(folder).values()]
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(one, sorted(tensors, key=lambda tensor: -tensor.size)))


def measure(old: Path, base: Path, adapter: Path) -> Measured:
    """In this process: read both, then do the work; neither finds anything of the files in memory."""
    forget(old, base)
    reading = seconds(lambda: read(old, base))
    gc.collect()
    at_rest = resident()
    (Path("/proc/self") / "clear_refs").write_text("5")
    forget(old, base)
    made: list[Any] = []
    carrying = seconds(lambda: made.append(carry(normalised(adapter, old), old, base)))
    comparing = seconds(lambda: made.append(compare(old, base, silent, made[:1])))
    held = peak()
    [found] = made[1].adapters
    signals = Signals(lineage="continued", drift=found.drift, most=found.most, inside=found.inside)
    first = route(signals, ("carry", "align", "warm-start", "retrain")).start
    return Measured(reading, carrying, comparing, (held - at_rest) / 1e9, held / 1e9, found.drift or 0.0, str(first))


def run(folder: Path, scale: float) -> Measured:
    """Make the checkpoints in ``folder``, and measure apart."""
    layers = max(1, round(LAYERS * scale))
    values = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    moved = torch.randn(_TILE, generator=torch.Generator().manual_seed(1)) * DRIFT / HIDDEN**0.5
    old = write_base(folder / "old", layers, values.bfloat16())
    base = write_base(folder / "base", layers, (values + moved).bfloat16())
    return apart(measure, old, base, write_adapter(folder / "adapter", layers))


def table(found: Measured, scale: float) -> str:
    """Markdown: what was measured beside its target."""
    ratio = (found.carrying + found.comparing) / found.reading
    parameters = sum(torch.Size(shape).numel() for shape in shapes(max(1, round(LAYERS * scale))).values())
    rows = [
        ("reading both checkpoints, and nothing else", f"{found.reading:.1f} s", ""),
        ("tiers N and 0, drift, signals and route", f"{found.carrying:.1f} + {found.comparing:.1f} s", ""),
        ("times of reading both", f"{ratio:.2f} ×", f"≤ {LIMIT:g} {_met(ratio <= LIMIT)}"),
        ("memory of the process at its peak", f"{found.held:.2f} GB ({found.grown:.2f} GB beyond what it held at rest)",
         f"≤ {MEMORY:g} GB {_met(found.held <= MEMORY)}"),
        ("median drift that was found, and where the route begins", f"{found.drift:.4f}, `{found.first}`", ""),
    ]  # fmt: skip
    lines = [f"{parameters / 1e9:.1f} billion parameters in bfloat16, {machine()}:", "", "| | measured | target |"]
    return "\n".join([*lines, "|---|---|---|", *(f"| {what} | {value} | {target} |" for what, value, target in rows)])


def _met(passed: bool) -> str:
    return "met" if passed else "**missed**"


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--in", dest="folder", type=Path, help="where the checkpoints are made; 33 GB at full size")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        made = table(run(Path(folder), given.scale), given.scale)
    print(made)
    before, _, rest = PAGE.read_text().partition("<!-- streaming -->\n")
    _, _, after = rest.partition("<!-- /streaming -->")
    PAGE.write_text(f"{before}<!-- streaming -->\n{made}\n<!-- /streaming -->{after}")


if __name__ == "__main__":
    main()
