"""`python -m benchmarks.rebase.streaming [--scale 0.125] [--in DIR]`: tiers N to 1 and routing on an 8-billion shape.

Two checkpoints of Llama-3-8B's shape in bfloat16, the second a drifted first, and an adapter of rank 16 on all linear
matrices: the adapter is read, carried, and its signals are measured (drift of every tensor, and within what the adapter
reads and writes); then it is aligned, which finds that all stayed where it was. At last the second is the first with
channels of the residual stream, neurons, and groups of heads in another order, channels with other signs as well: every
layer is aligned, and the factors are held against those that the rewriting asks for. Each in a process of its own whose
memory is watched. The peer reads both checkpoints, block by block on every core, and does nothing with them. All begin
with nothing of the files in memory. `--scale` takes fewer layers.
"""

import argparse
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from registry.core.route import Signals, route
from registry.files import cores
from tests.factories import adapter_config, write_json
from workers.compute.finetune import silent
from workers.compute.rebase.align import Aligned, align
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
LIMIT, MEMORY, MINUTES = 2.0, 4.0, 20.0
"""Times of reading both checkpoints, GB, and of aligning every layer."""
_TILE = (1 << 25) - 3001
"""Random values that are written again and again: drawing 16 billion of them would take longer than all the rest. No
multiple of a row, so that rows differ."""
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


@dataclass(frozen=True)
class Aligning:
    """Tier 1: its seconds, what the process held at its peak in GB, and what it found."""

    seconds: float
    held: float
    moved: int
    """Spaces of layers, and the residual stream, that were mapped."""
    spaces: int
    away: float
    """The largest difference of the factors from those that are right, as a share of the largest of these."""


Change = Callable[[str, Tensor], Tensor]
"""A tensor of the old base, by name, and what it is in the new one."""


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


def write_base(folder: Path, layers: int, values: Tensor, change: Change = lambda _, value: value) -> Path:
    """A checkpoint of this shape, in files of 5 GB; ``values`` again and again, gains around 1."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    at = 0
    for number, some in enumerate(_files(shapes(layers))):
        header: dict[str, Any] = {}
        end = 0
        for name, shape in some.items():
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(framed(header))
            for name, shape in some.items():
                value = _repeated(values, at, torch.Size(shape).numel()).view(shape)
                at = (at + value.numel()) % len(values)
                value = change(name, 1 + 8 * value if len(shape) == 1 else value)
                file.write(value.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    return folder


def _repeated(values: Tensor, at: int, many: int) -> Tensor:
    return values.repeat(-(-(at + many) // len(values)))[at : at + many]


class Rewriting:
    """Another order of channels, which change signs, of neurons, and of groups of heads: the function stays."""

    def __init__(self, layers: int) -> None:
        chance = torch.Generator().manual_seed(3)
        self.channels_D = torch.randperm(HIDDEN, generator=chance)
        self.signs_D = (2 * torch.randint(2, (HIDDEN,), generator=chance) - 1).bfloat16()
        self.neurons_LF = [torch.randperm(NEURONS, generator=chance) for _ in range(layers)]
        self.groups_LG = [torch.randperm(GROUPS, generator=chance) for _ in range(layers)]

    def weight(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the rewritten base."""
        if value.ndim == 1:
            return value[self.channels_D]
        if ".layers." not in name:
            return self._stream(value)
        return self.reads(name, self.writes(name, value))

    def reads(self, name: str, x_NI: Tensor) -> Tensor:
        """Columns of what a matrix reads, in their new places; of the adapter, A."""
        layer, role = _place(name)
        if role == "down_proj":
            return x_NI[:, self.neurons_LF[layer]]
        return x_NI[:, self._grouped(layer, x_NI.shape[1])] if role == "o_proj" else self._stream(x_NI)

    def writes(self, name: str, x_ON: Tensor) -> Tensor:
        """Rows of what a matrix writes; of the adapter, B."""
        layer, role = _place(name)
        if role in ("gate_proj", "up_proj"):
            return x_ON[self.neurons_LF[layer]]
        return self._stream(x_ON.T).T if role in ("o_proj", "down_proj") else x_ON[self._grouped(layer, len(x_ON))]

    def _stream(self, x_ND: Tensor) -> Tensor:
        return x_ND[:, self.channels_D] * self.signs_D.to(x_ND.dtype)

    def _grouped(self, layer: int, many: int) -> Tensor:
        order_G = self.groups_LG[layer]
        return torch.arange(many).view(len(order_G), -1)[order_G].flatten()


def _place(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]), next(part for part in parts if part.endswith("_proj"))


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


def measure_aligning(old: Path, base: Path, adapter: Path, rewriting: Rewriting | None) -> Aligning:
    """In this process; nothing of the files is in memory."""
    forget(old, base)
    given = normalised(adapter, old)
    made: list[Aligned] = []
    took = seconds(lambda: made.append(align(given, old, base)))
    held, away = peak(), 0.0
    for name, patch in given.patches.items():
        found = made[0].adapter.patches[name]
        for right, one in zip(
            (rewriting.reads(name, patch.a_RI), rewriting.writes(name, patch.b_OR)) if rewriting else
            (patch.a_RI, patch.b_OR), (found.a_RI, found.b_OR), strict=True,
        ):  # fmt: skip
            away = max(away, float((one - right).abs().max() / right.abs().max()))
    moved = [match.moved for match in made[0].matches.values()]
    return Aligning(took, held / 1e9, sum(moved), len(moved), away)


def run(folder: Path, scale: float) -> tuple[Measured, Aligning, Aligning]:
    """Make the checkpoints in ``folder``, and measure apart: comparing, aligning what stayed, and what moved."""
    layers = max(1, round(LAYERS * scale))
    values = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    moved = torch.randn(_TILE, generator=torch.Generator().manual_seed(1)) * DRIFT / HIDDEN**0.5
    old = write_base(folder / "old", layers, values.bfloat16())
    base = write_base(folder / "base", layers, (values + moved).bfloat16())
    adapter = write_adapter(folder / "adapter", layers)
    found = apart(measure, old, base, adapter), apart(measure_aligning, old, base, adapter, None)
    shutil.rmtree(base)
    rewriting = Rewriting(layers)
    base = write_base(folder / "base", layers, values.bfloat16(), rewriting.weight)
    return *found, apart(measure_aligning, old, base, adapter, rewriting)


def table(found: Measured, stayed: Aligning, moved: Aligning, scale: float) -> str:
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
        ("tier 1 where all stayed", f"{stayed.seconds:.1f} s, {stayed.held:.2f} GB; {_mapped(stayed)}", ""),
        ("times of reading both", f"{stayed.seconds / found.reading:.2f} ×",
         f"≤ {LIMIT:g} {_met(stayed.seconds <= LIMIT * found.reading)}"),
        ("tier 1 where every layer moved", f"{moved.seconds / 60:.1f} min; {_mapped(moved)}",
         f"≤ {MINUTES:g} min {_met(moved.seconds <= 60 * MINUTES)}"),
        ("memory of the process at its peak", f"{moved.held:.2f} GB", f"≤ {MEMORY:g} GB {_met(moved.held <= MEMORY)}"),
    ]  # fmt: skip
    lines = [f"{parameters / 1e9:.1f} billion parameters in bfloat16, {machine()}:", "", "| | measured | target |"]
    return "\n".join([*lines, "|---|---|---|", *(f"| {what} | {value} | {target} |" for what, value, target in rows)])


def _mapped(found: Aligning) -> str:
    return f"{found.moved} of {found.spaces} spaces mapped; factors away from the right ones by {found.away:.1e}"


def _met(passed: bool) -> str:
    return "met" if passed else "**missed**"


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--in", dest="folder", type=Path, help="where the checkpoints are made; 33 GB at full size")
    parser.add_argument("--show", action="store_true", help="print the table, and leave the page as it is")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        made = table(*run(Path(folder), given.scale), given.scale)
    print(made)
    if given.show:
        return
    before, _, rest = PAGE.read_text().partition("<!-- streaming -->\n")
    _, _, after = rest.partition("<!-- /streaming -->")
    PAGE.write_text(f"{before}<!-- streaming -->\n{made}\n<!-- /streaming -->{after}")


if __name__ == "__main__":
    main()
