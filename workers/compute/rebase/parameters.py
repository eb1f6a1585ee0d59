"""A base folder by the names that adapters give to its modules; nothing but headers is read until it is asked for."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from registry.core.errors import NotRunnable

from ..lora import is_transposed
from ..model import Model, module_name, skeleton
from ..shards import FLOATS, Stored, stored_names, stored_tensors


@dataclass(frozen=True)
class Parameters:
    """The parameters of one base, as its files hold them."""

    model: Model
    stored: Mapping[str, Stored]

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Those of the base in ``folder``."""
        return cls(skeleton(folder), stored_tensors(folder))

    def find(self, name: str) -> Stored | None:
        """Where a parameter lies, that of a tied head with its embedding; None where there is none."""
        owner, _, last = name.rpartition(".")
        found: list[str] = []
        if (own := module_name(self.model, owner)) is not None:
            with suppress(AttributeError):
                found = stored_names(self.model, f"{own}.{last}", self.stored)
        return self.stored[found[0]] if found else None

    def matrix(self, module: str) -> tuple[Stored, bool]:
        """A module's weight, and whether it is stored as inputs × outputs; `NotRunnable` where it holds no numbers."""
        here = self.find(f"{module}.weight")
        if here is None:
            raise NotRunnable(what="The adapter", reason=f"this base stores no weight of '{module}'")
        if here.dtype not in FLOATS:
            raise NotRunnable(what="The adapter", reason=f"'{module}' is stored as {here.dtype}: dequantise the base")
        return here, is_transposed(self.model.get_submodule(str(module_name(self.model, module))))

    def weight(self, module: str) -> Tensor:
        """A module's weight in float32, outputs × inputs."""
        here, transposed = self.matrix(module)
        weight = here.read().float()
        return weight.T if transposed else weight

    def is_tied(self, module: str) -> bool:
        """Whether its weight is another module's as well."""
        weight = self.model.get_submodule(str(module_name(self.model, module))).weight
        return sum(value is weight for _, value in self.model.named_parameters(remove_duplicate=False)) > 1
