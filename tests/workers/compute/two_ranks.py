"""What two processes do in `test_distributed`, started by torchrun: trainings that go through, stop, and go on.

    torchrun --nproc-per-node 2 -m tests.workers.compute.two_ranks FOLDER

Recipes are FOLDER/*.recipe.json, inputs FOLDER/base and FOLDER/data; outputs go to FOLDER/NAME.whole and NAME.resumed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry.core.recipes import parse_recipe
from tests.workers import factories
from workers.compute.distributed import Ranks, load_sharded, ranks_of
from workers.run import run

STOPS_AFTER = 3


def main(folder: Path) -> None:
    """Every recipe twice: in one go, and stopped by one rank alone and resumed."""
    with ranks_of(os.environ) as ranks:
        for path in sorted(folder.glob("*.recipe.json")):
            name, recipe = path.name.removesuffix(".recipe.json"), parse_recipe(path.read_bytes())
            inputs = {"base": folder / "base", "dataset.0": folder / "data"}
            run(recipe, inputs, folder / f"{name}.whole", lambda _: None, None, ranks)
            checkpoint = folder / f"{name}.checkpoint"
            try:
                run(recipe, inputs, folder / f"{name}.resumed", stopping(ranks), checkpoint, ranks)
            except KeyboardInterrupt:
                left = json.loads((checkpoint / "checkpoint.json").read_text())
                assert all(files[0].endswith(f"-{STOPS_AFTER}.safetensors") for files in left.values())
            else:
                raise AssertionError("nobody stopped it")
            ranks.wait()
            run(recipe, inputs, folder / f"{name}.resumed", lambda _: None, checkpoint, ranks)
        assert ranks.mesh is not None
        model, _ = load_sharded(folder / "base", "bf16", ranks.mesh)
        kept = [parameter.to_local().untyped_storage().nbytes() for parameter in model.parameters()]
        facts = {"bytes": sum(kept), "logits": factories.logits(model).tolist()}
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(facts))


def stopping(ranks: Ranks) -> Callable[[dict[str, Any]], None]:
    """A report that the last rank alone is stopped by."""

    def report(now: dict[str, Any]) -> None:
        if now["step"] == STOPS_AFTER and ranks.rank == ranks.many - 1:
            raise KeyboardInterrupt

    return report


if __name__ == "__main__":
    main(Path(sys.argv[1]))
