"""One training on several devices: every process keeps a part of each weight, and takes a part of every step's rows.

    gradient = Σ_ranks ∂loss(rows of the rank)⁄∂θ        each loss divided by the tokens that all of them are asked

Torch's own engine shards the base (FSDP2, Zhao et al. 2023, arXiv:2304.11277): a decoder layer is put together from all
ranks just before it computes, and let go after it; what stands outside of the layers (embedding, head) stays put
together. Factors of adapters are the same everywhere, and only their gradients are added up. Weights are read from the
files by the rows that a rank keeps, so that no process ever holds the base. Losses and gradients are added up before
anything is decided by them: all ranks end, stop and fail at the same step. Rank 0 alone writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from registry.core.errors import NotABase, NotRunnable
from registry.core.recipes import Precision

from .model import Model, Tokenizer, device_here, dtype_for
from .recompute import decoder_layers
from .shards import Stored, stored_names, stored_tensors

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory on one of several processes: activation_checkpointing or fewer batch_tokens would help"
_PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, seen from one of them; alone it is all of them."""

    rank: int = 0
    many: int = 1
    mesh: DeviceMesh | None = None
    """What the base is sharded over; None: it is not."""

    @property
    def first(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def share(self, batch: Sequence[T], part: int = 0, parts: int = 1) -> Sequence[T]:
        """This rank's rows of a batch, in pass ``part`` of ``parts``."""
        return batch[part * self.many + self.rank :: parts * self.many]

    def passes(self, rows: int, parts: int) -> int:
        """How many of ``parts`` passes find a row in a batch of so many, on one rank at least."""
        return min(parts, -(-rows // self.many))

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each by its sum over all ranks, the same bits everywhere."""
        if self.many > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.many == 1:
            return flag
        found = torch.tensor([flag], dtype=torch.int32, device=device_here())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def wait(self) -> None:
        """Go on when all are here."""
        if self.many > 1:
            self.any(True)


ALONE = Ranks()


def is_started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of those that torchrun starts."""
    return "TORCHELASTIC_RUN_ID" in environment


@contextmanager
def ranks_of(environment: Mapping[str, str]) -> Iterator[Ranks]:
    """The processes that torchrun started, by what it says in the environment; `ALONE` where it did not."""
    if not is_started_by_torchrun(environment):
        yield ALONE
        return
    here = device_here()
    if here.type == "cuda":
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    dist.init_process_group(timeout=_PATIENCE)
    many = dist.get_world_size()
    yield Ranks(dist.get_rank(), many, init_device_mesh(here.type, (many,)))
    dist.destroy_process_group()  # not after a failure: others may be gone, and this process goes as well


# ── a base in parts ──────────────────────────────────────────────────────────


def load_sharded(
    folder: Path, precision: Precision, mesh: DeviceMesh, *, computes_in: torch.dtype | None = None
) -> tuple[Model, Tokenizer]:
    """What `model.load` gives, with this rank's part of every weight; ``computes_in``: the type that layers are put
    together in, where it is not that of the weights.
    """
    dtype = dtype_for(precision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _without_values():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise NotABase(path=str(folder), reason=str(error).splitlines()[0]) from error
    if getattr(config, "quantization_config", None):
        raise NotRunnable(what="Sharding", reason="the base is quantised; train its unquantised weights")
    layers = decoder_layers(model)
    if not layers:
        raise NotRunnable(what="Sharding", reason=f"a {type(model).__name__} does not say which its layers are")
    options: dict[str, Any] = {"mesh": mesh}
    if computes_in not in (None, dtype):
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=computes_in, reduce_dtype=torch.float32)
    for part in (*layers, model):
        sharded = fully_shard(part, **options)
        sharded.set_gradient_divide_factor(1.0)  # losses are weighed by the tokens of all ranks: gradients add up
        sharded.set_force_sum_reduction_for_comms(True)  # the only kind that gloo knows
    _fill(model, stored_tensors(folder), dtype, mesh)
    return model.to(device_here()), tokenizer


@contextmanager
def _without_values() -> Iterator[None]:
    """Modules that are made inside have parameters with a shape and no memory; buffers, which files lack, are real."""
    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(model: Model, stored: Mapping[str, Stored], dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """Give every parameter its rows of this rank, and tied ones the same."""
    found: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in found:
            kept = next(iter(stored_names(model, name, stored)), None)
            if kept is None or stored[kept].shape != tuple(parameter.shape):
                raise NotRunnable(what="Sharding", reason=f"the base stores no tensor '{name}' of this shape")
            rows_OI = _rows(stored[kept], mesh).to(device_here(), dtype)
            whole = {"shape": parameter.shape, "stride": parameter.stride()}
            shard = DTensor.from_local(rows_OI, mesh, (Shard(0),), run_check=False, **whole)
            found[id(parameter)] = nn.Parameter(shard, requires_grad=False)
        state[name] = found[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)


def _rows(stored: Stored, mesh: DeviceMesh) -> Tensor:
    """Rows of a tensor that this rank keeps: equally many, but for the last ranks."""
    every = -(-stored.shape[0] // mesh.size())
    first, last = (min((mesh.get_local_rank() + more) * every, stored.shape[0]) for more in (0, 1))
    with stored.path.open("rb") as file:
        blocks = [block for _, block in stored.blocks(file.fileno(), slice(first, last))]
    return torch.cat(blocks) if blocks else torch.empty(0, *stored.shape[1:])


def part_of(tensor: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return whole.to(tensor.device)
    rows = tensor.to_local().shape[0]
    every = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(tensor.device_mesh.get_local_rank() * every, tensor.shape[0])
    part = whole[first : first + rows].to(tensor.device)
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
