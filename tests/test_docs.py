"""The generated pages are as new as the code, links lead somewhere, and commands in the guides are understood."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cli.main import cli
from docs.generate import PAGES
from registry.core.recipes import FineTune, FullFineTune, Training

HOUSE = Path(__file__).parent.parent
WRITTEN = [
    HOUSE / "README.md",
    HOUSE / "CONTRIBUTING.md",
    HOUSE / "CHANGELOG.md",
    *sorted((HOUSE / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_make_docs_writes(name: str) -> None:
    assert (HOUSE / "docs" / name).read_text() == PAGES[name]()


def test_requirements_are_as_new_as_the_dependencies_and_the_constraints() -> None:
    """What is quickly seen of it; the rest is in tests/test_requirements.py."""
    text = "".join((HOUSE / "requirements" / name).read_text() for name in ("dev.txt", "torch.txt"))
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {canonicalize_name(Requirement(line).name) for group in groups for line in group}
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", (HOUSE / "constraints.txt").read_text(), re.MULTILINE)
    others = {name: pin for name, pin in pinned if locked.get(canonicalize_name(name), pin) != pin}
    assert (wanted - locked.keys(), others) == (set(), {}), "run: make lock (or make BIN=another/venv/bin lock)"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_test_that_a_promise_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (HOUSE / "docs" / "guarantees.md").read_text())
    assert named
    assert [f"{file}::{test}" for file, test in named if not _has(HOUSE / file, test)] == []


def _has(file: Path, test: str) -> bool:
    return file.exists() and (not test or f"def {test}(" in file.read_text())


def command_lines() -> list[str]:
    found = [line for page in WRITTEN for line in re.findall(r"^\$? ?(loractl .*)$", page.read_text(), re.MULTILINE)]
    return sorted({re.split(r"\s+#", line)[0] for line in found if "…" not in line})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_in_the_guides_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("adapter", "base", "base-v2"):
        (tmp_path / folder).mkdir()
    keys = ("signing-key.pem", "signing-key.pem.pub", "release.pub")
    for file in ("train.jsonl", "suite.jsonl", "inputs.jsonl", "differ.jsonl", "recipe.toml", *keys):
        (tmp_path / file).touch()
    command: click.Command = cli
    context = click.Context(cli, info_name="loractl")
    words = shlex.split(re.sub(r'"\$\(.*\)"', "TOKEN", line))[1:]
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"no command {words[0]}"
        command, words = found, words[1:]
    command.make_context("loractl", words, parent=context)


def test_the_recipe_in_the_guide_has_every_key_with_its_default() -> None:
    written, full = (
        tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
        for text in re.findall(r"```toml\n(.*?)```", (HOUSE / "docs" / "recipes.md").read_text(), re.DOTALL)
    )
    output = written.pop("output")
    assert FineTune.model_fields.keys() - {"kind"} == written.keys()
    unsaid = {"start": None, "learning_rate": None, "quantised": None}
    digests = {"base": "b3:" + "1" * 64, "datasets": ("sha256:" + "2" * 64,)}
    usual = FineTune.model_validate(digests).model_dump(exclude={"kind", "base", "datasets", *unsaid})
    assert FineTune.model_validate(written | digests | unsaid).model_dump(include=set(usual)) == usual
    assert output.keys() == {"adapter", "aliases", "message"}
    assert full.pop("output").keys() == {"line"}
    assert FullFineTune.model_fields.keys() - Training.model_fields.keys() | {"learning_rate"} == full.keys()
    tuned = FullFineTune.model_validate(full | digests)
    assert (tuned.learning_rate, tuned.parameters) == (FullFineTune.model_validate(digests).learning_rate, ())
