"""The wheel holds what an installed loractl needs, and nothing of the workshop."""

import os
import subprocess
import sys
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

HOUSE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = WheelBuilder(str(HOUSE)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(built)


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def about(wheel: Path, names: list[str]) -> Message:
    [name] = [name for name in names if name.endswith(".dist-info/METADATA")]
    with ZipFile(wheel) as archive:
        return HeaderParser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_module_and_the_migrations(names: list[str]) -> None:
    packages = ("registry", "workers", "cli", "migrations")
    files = {file.relative_to(HOUSE).as_posix() for package in packages for file in (HOUSE / package).rglob("*.py")}
    assert files <= set(names)
    assert {"migrations/env.py", "migrations/script.py.mako"} <= set(names)
    assert [name for name in names if name.startswith("migrations/versions/") and name.endswith(".py")]


def test_the_wheel_says_that_it_is_typed(names: list[str]) -> None:
    assert {"registry/py.typed", "workers/py.typed", "cli/py.typed"} <= set(names)


def test_nothing_of_the_workshop_is_in_the_wheel(names: list[str]) -> None:
    assert {name.split("/")[0] for name in names} == {
        "registry", "workers", "cli", "migrations", "loractl-0.1.0.dist-info",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name]


def test_the_licence_travels_with_the_wheel(names: list[str], about: Message) -> None:
    assert about["License-Expression"] == "Apache-2.0"
    assert "loractl-0.1.0.dist-info/licenses/LICENSE" in names


def test_heavy_libraries_are_behind_extras(about: Message) -> None:
    base = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in base if line.startswith(("torch", "numpy", "fastapi", "sql", "celery", "boto3"))]
    assert {"server", "worker", "dev", "demo"} <= set(about.get_all("Provides-Extra", []))


def test_every_extra_is_pinned_by_the_constraints(about: Message) -> None:
    lines = (HOUSE / "constraints.txt").read_text().lower().splitlines()
    pinned = {line.partition("==")[0].replace("_", "-") for line in lines if not line.startswith("#")}
    needed = {line.split(";")[0].split("[")[0] for line in about.get_all("Requires-Dist", [])}
    needed = {name.split(">")[0].split("=")[0].split("<")[0].strip().lower().replace("_", "-") for name in needed}
    assert needed - pinned == set()


def test_the_installed_command_answers(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    command, environment = [str(tmp_path / "bin" / "loractl"), "--help"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: loractl" in done.stdout


def test_the_source_archive_can_be_built(tmp_path: Path) -> None:
    [built] = SdistBuilder(str(HOUSE)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(built).name == "loractl-0.1.0.tar.gz"
