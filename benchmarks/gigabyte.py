"""An adapter of one gigabyte for a base that is only a table, and a client that pushes and pulls it, timed."""

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from registry import transfer
from registry.client import RegistryClient
from registry.core.base_model import BaseModel, Tensor
from registry.core.digest import Digest
from registry.schemas import BaseRegistration
from tests.factories import adapter_config, llama_config, write_json

from .house import peak

WIDTH, LAYERS, RANK = 4096, 32, 256
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS = "adapter_model.safetensors"


def base_model() -> BaseModel:
    """A Llama of 32 layers, as its table."""
    names = [f"model.layers.{layer}.self_attn.{module}.weight" for layer in range(LAYERS) for module in MODULES]
    tensors = [Tensor(name, "BF16", (WIDTH, WIDTH), Digest("b3", f"{i:064x}")) for i, name in enumerate(names)]
    return BaseModel.of(tensors, llama_config(width=WIDTH, layers=LAYERS))


def make_adapter(folder: Path, scale: float) -> Path:
    """An adapter for `base_model`: 1.07 GB at scale 1, by fewer layers below."""
    layers, rank = max(1, round(LAYERS * scale)), RANK if scale >= 1 / LAYERS else 8
    random = np.random.default_rng(0)
    a_RI = (random.standard_normal((rank, WIDTH)) * 0.05).astype(np.float32)
    b_OR = (random.standard_normal((WIDTH, rank)) * 0.05).astype(np.float32)
    places = [f"base_model.model.model.layers.{i}.self_attn.{module}" for i in range(layers) for module in MODULES]
    tensors = {f"{place}.lora_A.weight": a_RI for place in places}
    tensors |= {f"{place}.lora_B.weight": b_OR for place in places}
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config("org/model", rank, MODULES))
    return folder


def renew(adapter: Path) -> None:
    """Other bytes of the same size, so that nothing of the file is known to the registry."""
    with (adapter / WEIGHTS).open("r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + header)
        file.write(np.random.default_rng().standard_normal(1024, np.float32).tobytes())
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class Trip:
    """Seconds of one push and pull, from their starts, and the client's memory at its peak."""

    hashed: float
    accepted: float
    """From the first byte on, until the registry saw that all of them are in the store."""
    committed: float
    """From the start of hashing."""
    received: float
    """From the start of the pull until its last byte was here."""
    pulled: float
    """Until every file was verified, synced and had its name."""
    peak: float
    """MB"""


def trip(url: str, token: str, adapter: Path, name: str, out: Path) -> Trip:
    """Push ``adapter`` and pull it again, in this process."""
    base = base_model()
    with RegistryClient(url, token) as client:
        client.register_base(BaseRegistration(table=transfer.table_of(base)))
        began = time.perf_counter()
        scan = transfer.scanned("adapter", adapter, base=base.digest)
        hashed = time.perf_counter() - began
        info = client.open_push("adapter", name, transfer.request_of(scan))
        paths = {entry.digest: scan.files[entry.path] for entry in scan.manifest.files}
        first_byte = time.perf_counter()
        transfer.upload(client, info, paths)
        client.commit(info.id)
        accepted = time.perf_counter() - first_byte
        done = transfer.settle(client, info.id)
        committed = time.perf_counter() - began
        began = last = time.perf_counter()

        def arrived(what: str, sofar: int, total: int) -> None:
            nonlocal last
            if what == "receiving" and sofar == total:
                last = time.perf_counter()

        transfer.pull(client, done.version_digest, out, progress=arrived)
        return Trip(hashed, accepted, committed, last - began, time.perf_counter() - began, peak() / 1e6)
