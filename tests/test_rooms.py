"""The house stands as it is drawn: import rules, what the base install may need, names that clash with nobody."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from grimp import ImportGraph
from importlinter import fields
from packaging.utils import canonicalize_name

from tests.rooms import Rooms, arrows, room_of

HOUSE = Path(__file__).parent.parent
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
PACKAGES = ["registry", "workers", "cli", "migrations"]

# Imports every module it is told to, and refuses each top-level package it is told to.
WITH_NOTHING_ELSE = """
import importlib, importlib.abc, sys

refused, modules = (set(argument.split(",")) for argument in sys.argv[1:])

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"not in the base install: {name}", name=name)

sys.meta_path.insert(0, Refuse())
for module in sorted(modules):
    importlib.import_module(module)
"""


def modules_of(room: str) -> set[str]:
    folder = HOUSE / Path(*room.split("."))
    found = {room} if folder.with_suffix(".py").exists() or folder.is_dir() else set()
    for file in folder.rglob("*.py"):
        parts = file.relative_to(HOUSE).with_suffix("").parts
        found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def base_install() -> set[str]:
    """Distributions that `pip install loractl` brings."""
    waiting: list[str] = list(PROJECT["project"]["dependencies"])
    brought: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
        if name in brought or "extra ==" in requirement:
            continue
        brought.add(name)
        try:
            waiting += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # needed on another platform or Python only
    return brought


def test_every_import_follows_an_arrow() -> None:
    lint = "import sys, importlinter.cli; sys.exit(importlinter.cli.lint_imports(no_cache=True, no_logo=True))"
    command = [sys.executable, "-c", lint]  # apart, for it silences the loggers that are there
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_client_and_the_command_line_run_on_the_base_install_alone() -> None:
    brought, names = base_install(), metadata.packages_distributions()
    refused = {top for top, owners in names.items() if not brought & {canonicalize_name(owner) for owner in owners}}
    refused -= set(PACKAGES)
    rooms = ["cli", "registry.client", "registry.transfer", "registry.files", "registry.schemas", "registry.core"]
    needs_numpy = {"registry.core.gate"}
    modules = {module for room in rooms for module in modules_of(room)} - needs_numpy
    assert {"torch", "numpy", "fastapi", "sqlalchemy", "celery", "boto3", "transformers"} <= refused
    command = [sys.executable, "-c", WITH_NOTHING_ELSE, ",".join(refused), ",".join(modules)]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_our_top_level_names_belong_to_no_other_distribution() -> None:
    names = metadata.packages_distributions()
    assert {package: owners for package in PACKAGES if (owners := set(names.get(package, ())) - {"loractl"})} == {}


def test_importing_a_room_does_not_import_the_house() -> None:
    assert [name for name in ("registry", "workers", "cli") if (HOUSE / name / "__init__.py").read_text()] == []


def graph(*imports: tuple[str, str]) -> ImportGraph:
    made = ImportGraph()
    for pair in imports:
        for module in pair:
            if module not in made.modules:
                made.add_module(module, is_squashed=not module.startswith("house"))
    for number, (importer, imported) in enumerate(imports, start=1):
        made.add_import(importer=importer, imported=imported, line_number=number, line_contents="")
    return made


def findings(*imports: tuple[str, str]) -> list[str]:
    tables = {"rooms": ["house.hall -> house.cellar", "house.cellar ->"], "libraries": ["wine -> house.cellar"]}
    check = Rooms("rooms", {}, tables).check(graph(*imports), verbose=False)
    found: list[str] = check.metadata["findings"]
    assert check.kept == (not found)
    return found


def test_an_import_along_an_arrow_is_allowed() -> None:
    assert findings(("house.hall.door", "house.cellar.shelf"), ("house.hall.door", "house.hall")) == []


def test_an_import_against_an_arrow_is_found_with_its_line() -> None:
    assert findings(("house.cellar.shelf", "house.hall")) == ["house.cellar.shelf -> house.hall (l. 1)"]


def test_a_library_is_imported_by_its_owners_only() -> None:
    assert findings(("house.cellar.shelf", "wine"), ("house.hall", "bread")) == []
    assert findings(("house.hall", "wine")) == ["house.hall -> wine (l. 1)"]


def test_a_module_outside_every_room_is_found() -> None:
    [finding] = findings(("house.attic", "house.cellar"))
    assert finding.startswith("house.attic stands in no room")


def test_the_innermost_room_holds_a_module() -> None:
    assert room_of("a.b.c", ["a", "a.b", "a.bc"]) == "a.b"
    assert room_of("a.bcd", ["a.bc"]) is None


@pytest.mark.parametrize("line", ["a", "-> b", ""])
def test_a_line_without_a_name_and_an_arrow_is_refused(line: str) -> None:
    with pytest.raises(fields.ValidationError):
        arrows([line])


def test_every_room_that_is_drawn_stands() -> None:
    [drawing] = [drawn for drawn in PROJECT["tool"]["importlinter"]["contracts"] if drawn["type"] == "rooms"]
    assert [room for room in arrows(drawing["rooms"]) if not modules_of(room)] == []
