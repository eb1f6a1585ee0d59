"""The demo's story from beginning to end, on a tiny model: real processes, real commands, nothing stands in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.demo import tasks
from tests.factories import tiny_llama

HOUSE = Path(__file__).parent.parent
ADAPTERS = [f"team/{task.name}" for task in tasks.TASKS]
FINAL = "promoted|frozen|retired"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the story leaves, and what it printed."""
    room = tmp_path_factory.mktemp("story")
    base = tiny_llama(room / "tiny")
    line = [sys.executable, "-m", "docs.demo.run", "--quick", "--base", str(base), "--dir", str(room / "demo")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, cwd=HOUSE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            told, _ = run.communicate(timeout=900)
        finally:
            if run.poll() is None:
                run.terminate()
    assert run.returncode == 0, told
    return room / "demo", told


def test_it_comes_to_its_end_chapter_by_chapter(played: tuple[Path, str]) -> None:
    _, told = played
    assert re.findall(r"^(\d)\. took", told, re.MULTILINE) == list("1234567")


def test_every_adapter_has_an_outcome_with_its_reason(played: tuple[Path, str]) -> None:
    _, told = played
    outcomes = dict(re.findall(rf"^(team/\w+): (?:{FINAL})\. (.+)$", told, re.MULTILINE))
    assert sorted(outcomes) == sorted(ADAPTERS)


def test_wrong_pushes_are_refused_with_what_does_not_fit_and_with_what_would(played: tuple[Path, str]) -> None:
    _, told = played
    refusals = [line for line in told.splitlines() if line.startswith("Error:")]
    shapes, recorded, declared = refusals[:3]
    assert "does not fit" in shapes and "model.layers.0" in shapes
    assert "recorded in its file" in recorded
    assert "declared as 'demo/tiny'" in declared
    assert all("It fits demo@r1" in refusal for refusal in (shapes, recorded, declared))


def test_the_adapters_are_bound_as_strongly_as_their_files_allow(played: tuple[Path, str]) -> None:
    _, told = played
    assert re.search(r"pushed +team/board@v1\n.*\n.*\nevidence +resolved", told)
    assert told.count("declared\nwarning") == 1  # --trust-base, on record


def test_what_was_pulled_for_two_bases_are_two_adapters_that_peft_computes_as_we_do(played: tuple[Path, str]) -> None:
    folder, told = played
    old, new = (json.loads((folder / name / "adapter_config.json").read_text()) for name in ("pulled-v1", "pulled-v2"))
    assert old["peft_type"] == new["peft_type"] == "LORA"
    assert "PEFT's logits and ours differ by at most" in told


def test_the_registry_is_stopped_and_its_folder_is_kept(played: tuple[Path, str]) -> None:
    folder, _ = played
    assert (folder / "registry" / "registry.db").is_file()
    assert not (folder / "registry" / "up.json").exists()
