"""Switching to another adapter on a loaded model: among those already loaded, and from a file; against PEFT's ways.

The model and the adapters are those of `train`, in float32. Among loaded ones a switch says whose the coming rows are,
PEFT's is set_adapter; from a file both read safetensors into the place of an adapter that is there, PEFT's is
hotswap_adapter. Rounds take turns, the median is compared. After 1,000 switches with answers in between, the base's
bits are what they were.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

from workers.compute.bank import Bank, parts_of
from workers.compute.lora import Adapter, fresh
from workers.compute.model import Model
from workers.compute.weights import read_adapter, write_adapter

from .house import apart
from .table import Row, at_least, at_most, seconds
from .train import LAYERS, RANK, TARGETS, model, recipe

MANY, SWITCHES, ROUNDS = 16, 1000, 7


def run(scale: float = 1.0) -> list[Row]:
    loaded, filed, changed = apart(_measured, max(1, round(LAYERS * scale)))
    return [
        _row(f"switch among {MANY} adapters already loaded", loaded, 1.0, "PEFT's set_adapter"),
        _row("switch to an adapter in a file", filed, 2.0, "PEFT's hotswap_adapter"),
        at_most(
            f"base tensors whose bits changed in {SWITCHES:,} switches", changed, 0, unit="tensors",
            note="an answer after every tenth",
        ),
    ]  # fmt: skip


def _measured(layers: int) -> tuple[tuple[float, float], tuple[float, float], int]:
    """Seconds of a switch, ours and the peer's, among loaded adapters and from files; base tensors that changed."""
    ours, theirs = model("fp32", layers), model("fp32", layers)
    adapters = [fresh(ours, recipe(32, seed)) for seed in range(MANY)]
    bank, peers = Bank(ours, adapters), _peft(theirs)
    with tempfile.TemporaryDirectory() as name, bank.attached(), torch.inference_mode():
        folders = [_written(adapter, Path(name) / str(i)) for i, adapter in enumerate(adapters[:2])]

        def read(times: int) -> None:
            adapter = read_adapter(folders[times % 2])
            bank.put(0, parts_of(adapter), bank.theta_KP)
            bank.refresh()

        def theirs_read(times: int) -> None:
            hotswap_adapter(peers, str(folders[times % 2]), adapter_name="0", torch_device="cpu")

        loaded = _compared(lambda i: bank.assign([(i % MANY, 1)]), lambda i: peers.set_adapter(str(i % MANY)), 32)
        peers.set_adapter("0")
        filed = _compared(read, theirs_read, 4)
        changed = _changed(ours, bank)
    return loaded, filed, changed


def _peft(base: Model) -> peft.PeftModel:
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    made = peft.get_peft_model(base, config, "0")
    for which in range(1, MANY):
        made.add_adapter(str(which), config)
    found: peft.PeftModel = made.eval()
    return found


def _written(adapter: Adapter, folder: Path) -> Path:
    write_adapter(adapter, folder, base="b3:" + "0" * 64, recipe="sha256:" + "0" * 64)
    return folder


def _compared(ours: Callable[[int], object], theirs: Callable[[int], object], times: int) -> tuple[float, float]:
    """Seconds of a switch: ours, and the peer's."""
    # The first round warms up.
    found = [[_seconds(switch, times) for switch in (ours, theirs)] for _ in range(ROUNDS + 1)]
    ours_s, theirs_s = (statistics.median(each) for each in zip(*found[1:], strict=True))
    return ours_s, theirs_s


def _seconds(switch: Callable[[int], object], times: int) -> float:
    return seconds(lambda: [switch(i) for i in range(times)]) / times


def _changed(base: Model, bank: Bank) -> int:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.arange(3, 11)[None]
    for switch in range(SWITCHES):
        bank.assign([(switch % MANY, 1)])
        if switch % 10 == 0:
            base(input_ids=ids, use_cache=False)
    after = base.state_dict()
    return sum(not torch.equal(value.view(torch.uint8), after[name].view(torch.uint8))
               for name, value in before.items())  # fmt: skip


def _row(claim: str, found: tuple[float, float], wanted: float, peer: str) -> Row:
    ours, theirs = found
    return at_least(claim, theirs / ours, wanted, peer=f"{peer}, {1e3 * theirs:.3g} ms",
                    note=f"{1e3 * ours:.3g} ms; rank {RANK} on all linears")  # fmt: skip
