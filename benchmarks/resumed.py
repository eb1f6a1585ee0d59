"""A fine-tuning killed 20 times: it goes on from its last checkpoint, and ends in the bytes of one left alone.

Training is a process of its own, the signal is SIGKILL, and the moment is drawn: some steps after it went on, and some
milliseconds on, so that it falls into steps as into checkpoints. Steps of the curve count, and beside them those that
were made twice because the last checkpoint was older. A checkpoint is due every few steps.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from registry.core.manifest import canonical_json
from tests.workers import factories

from .table import Row, at_least, at_most

KILLS, EVERY, AHEAD = 20, 3, 8
"""Kills; steps between checkpoints; steps at most from where it went on to the kill."""


def run(scale: float = 1.0) -> list[Row]:
    kills = max(2, round(KILLS * scale))
    steps = kills * AHEAD
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factories.saved(factories.llama(), folder / "base")
        (folder / "rows").mkdir()
        lines = (json.dumps(row.value) for row in factories.rows(64))
        (folder / "rows" / "rows.jsonl").write_text("\n".join(lines) + "\n")
        recipe = factories.recipe(
            steps=steps, checkpoint_every=EVERY, dropout=0.1, held_out=0.1, look_every=EVERY, targets=("all-linear",)
        )
        (folder / "recipe.json").write_bytes(canonical_json(recipe.model_dump(mode="json")))
        _train(folder, "alone", None, draw)
        made = killed = 0
        while killed < kills:
            ahead, more = _train(folder, "killed", draw.randrange(1, AHEAD), draw)
            made, killed = made + ahead, killed + more
            if not more:
                break
        made += _train(folder, "killed", None, draw)[0]
        alone, resumed = (json.loads((folder / out / "result.json").read_text()) for out in ("alone", "killed"))
        differ = sum(_bytes(folder / "alone" / "adapter", file) != _bytes(folder / "killed" / "adapter", file)
                     for file in ("adapter_model.safetensors", "adapter_config.json"))  # fmt: skip
    return [
        at_least("fine-tunings killed", killed, kills, unit="kills", note=f"{steps} steps, a checkpoint every {EVERY}"),
        at_most(
            f"steps to the same loss, killed {killed} times", resumed["steps"] / alone["steps"], 1.0,
            unit="× the steps", peer=f"left alone, {alone['steps']} steps to a loss of {alone['loss'][-1][1]:.4f}",
            note=f"{made - resumed['steps']} steps were made twice, because no checkpoint had them",
        ),
        at_most(
            "files of the adapter and points of its loss curve that differ",
            differ + sum(one != other for one, other in zip(alone["loss"], resumed["loss"], strict=True)),
            0, unit="", note=f"bytes and floats compared, {torch.get_num_threads()} threads",
        ),
    ]  # fmt: skip


def _train(folder: Path, out: str, ahead: int | None, draw: random.Random) -> tuple[int, bool]:
    """Train on, to the end or until ``ahead`` steps and a moment have passed: steps made, and whether it was killed."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "workers.run", "recipe.json", "--in", "base=base", "--in", "dataset.0=rows",
               "--out", out, "--checkpoint", f"{out}.checkpoint", "--progress-fd", str(write)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        command, cwd=folder, pass_fds=[write], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    os.close(write)
    made = 0
    with os.fdopen(read) as progress:
        for _ in progress:
            made += 1
            if made == ahead:
                time.sleep(draw.random() * 0.05)
                child.send_signal(signal.SIGKILL)
                break
        made += sum(1 for line in progress if line.endswith("\n"))
    _, told = child.communicate()
    if child.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(told.decode())
    return made, child.returncode == -signal.SIGKILL


def _bytes(folder: Path, file: str) -> bytes:
    return (folder / file).read_bytes()
