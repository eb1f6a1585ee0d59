"""requirements/ locks what pyproject.toml and constraints.txt say, every file by its SHA-256; pip refuses any other."""

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hatchling import build
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOUSE = Path(__file__).parent.parent
FOLDER = HOUSE / "requirements"
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
ROLES = {"server": ["server"], "worker": ["worker"], "demo": ["server", "worker", "demo"]}
ROLES["dev"] = sorted(PROJECT["project"]["optional-dependencies"])


PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)( ; .*?)?(?P<digests>( +--hash=sha256:[0-9a-f]{64})+)")


@dataclass(frozen=True)
class Locked:
    version: str
    digests: tuple[str, ...]


def read(file: str) -> dict[str, Locked]:
    """What a file of requirements/ locks; any line that is no comment, pin or digest is an error."""
    locked: dict[str, Locked] = {}
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / file).read_text(), flags=re.MULTILINE)
    for line in text.replace(" \\\n", " ").splitlines():
        match = PIN.fullmatch(line)
        assert match is not None, line
        digests = tuple(re.findall(r"[0-9a-f]{64}", match["digests"]))
        assert match["name"] not in locked and len(set(digests)) == len(digests)
        locked[canonicalize_name(match["name"])] = Locked(match["version"], digests)
    return locked


def constraints() -> dict[str, str]:
    lines = [line for line in (HOUSE / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


FILES = sorted(path.name for path in FOLDER.glob("*.txt"))
LOCKED = {file: read(file) for file in FILES}


def test_there_is_a_file_a_role_and_one_a_build_of_torch() -> None:
    assert set(FILES) == {"build.txt", "torch.txt", "torch-cpu.txt", "cuda.txt", *(f"{role}.txt" for role in ROLES)}


@pytest.mark.parametrize("file", FILES)
def test_every_version_is_the_one_that_was_tested(file: str) -> None:
    pins = constraints()
    free = {name for name in LOCKED[file] if is_cuda(name) or name == "httpx2-jsfetch"}  # by torch's pins; in browsers
    assert {name: pins.get(name) for name in LOCKED[file].keys() - free} == {
        name: locked.version.removesuffix("+cpu") for name, locked in LOCKED[file].items() if name not in free
    }


def test_the_same_version_has_the_same_files_everywhere() -> None:
    for file in FILES:
        for name, locked in LOCKED[file].items():
            if name != "torch":
                assert all(other.get(name, locked) == locked for other in LOCKED.values()), f"{name}: make lock"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_complete(role: str) -> None:
    """Nothing is resolved at installation (--no-deps), so what a package needs must stand there too."""
    there = LOCKED[f"{role}.txt"] | LOCKED["torch.txt"] | ({} if _cpu_build() else LOCKED["cuda.txt"])
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in ROLES[role] for line in extras[extra])]
    missing, seen = [], set()
    while wanted:
        needed = Requirement(wanted.pop())
        name = canonicalize_name(needed.name)
        if name not in there or not needed.specifier.contains(there[name].version, prereleases=True):
            missing.append(f"{needed}: make lock")
        for extra in needed.extras | {""}:
            if (name, extra) not in seen and name not in {"pip", "torch"}:
                seen.add((name, extra))
                wanted += _needs(name, extra)
    assert missing == []


def _cpu_build() -> bool:
    return "+" in metadata.version("torch")


def _needs(name: str, extra: str) -> Iterable[str]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # not installed here, so what it needs is told where it is
        return []
    found = [Requirement(line) for line in lines if not re.match(r"pip\b(?!-)", line)]
    return [str(one) for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]


def test_what_turns_this_folder_into_a_wheel_or_an_editable_installation_is_locked() -> None:
    asked = build.get_requires_for_build_wheel() + build.get_requires_for_build_editable()
    wanted = [Requirement(line) for line in [*PROJECT["build-system"]["requires"], *asked]]
    assert "editables" in {one.name for one in wanted}
    assert [one for one in wanted if one.name not in LOCKED["build.txt"]] == []
    assert [one for one in wanted if not one.specifier.contains(LOCKED["build.txt"][one.name].version)] == []


def test_cuda_comes_with_the_gpu_build_of_torch_only() -> None:
    assert [file for file in FILES if any(map(is_cuda, LOCKED[file]))] == ["cuda.txt"]
    assert [file for file in FILES if "torch" in LOCKED[file]] == ["torch-cpu.txt", "torch.txt"]


def test_torch_is_one_version_and_its_files_are_named_for_every_python_and_machine() -> None:
    [torch], [cpu] = LOCKED["torch.txt"].values(), LOCKED["torch-cpu.txt"].values()
    wheels = []
    for file, locked in (("torch.txt", torch), ("torch-cpu.txt", cpu)):
        named = re.findall(r"^#   (torch-\S+\.whl)$", (FOLDER / file).read_text(), re.MULTILINE)
        assert len(named) == len(locked.digests)
        wheels += named
    assert cpu.version == f"{torch.version}+cpu"
    pythons = [
        f"cp{found[1]}" for line in PROJECT["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    ]  # fmt: skip
    for python in (name.replace(".", "") for name in pythons):
        for machine in ("x86_64", "aarch64"):
            for face in ("", "+cpu"):
                assert f"torch-{torch.version}{face}-{python}-{python}-manylinux_2_28_{machine}.whl" in wheels
    assert f"torch=={torch.version}" in PROJECT["project"]["optional-dependencies"]["worker"]
    [declared] = [one for one in PROJECT["tool"]["uv"]["dependency-metadata"] if one["name"] == "torch"]
    assert declared["version"] == torch.version
    needs = {canonicalize_name(Requirement(line).name) for line in _needs("torch", "")}
    assert set(declared["requires-dist"]) == {name for name in needs if not is_cuda(name)}


# ── who installs ─────────────────────────────────────────────────────────────


def test_the_makefile_installs_locked_files_and_this_folder_and_nothing_else() -> None:
    asked = ["make", "--always-make", "--dry-run", "setup", "demo"]
    shown = subprocess.run(asked, cwd=HOUSE, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    steps = [step for line in shown.splitlines() for step in line.replace("2>/dev/null", "").split("||")]
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) >= 7
    for line in installs:
        assert "--no-deps" in line and "--no-build-isolation" in line
        assert "--require-hashes" in line or line.split()[-2:] == ["--editable", "."]


OURS = {"pip install --no-index /wheels/loractl-*.whl", "pip wheel --no-build-isolation --wheel-dir /wheels ."}


def test_an_image_is_built_of_locked_files_and_our_wheel_and_nothing_else() -> None:
    lines = (HOUSE / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    runs = [line.removeprefix("RUN ").split("&&") for line in lines if line.startswith("RUN ")]
    steps = [step.strip() for run in runs for step in run]
    installs = [step for step in steps if step.startswith("pip ") and step != "pip check"]
    assert any("PIP_NO_DEPS=1" in line for line in lines)
    assert len(installs) >= 8
    for step in installs:
        files = re.findall(r"--requirement requirements/(\S+)", step)
        if step not in OURS:
            assert "--require-hashes" in step and files and set(files) <= set(FILES), step


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = WheelBuilder(str(HOUSE)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(built)


def installed(wheel: Path, digest: str, target: Path) -> "subprocess.CompletedProcess[str]":
    """Install ``wheel`` as the Makefile does, from a file that pins it to ``digest``."""
    target.mkdir()
    (target / "pins.txt").write_text(f"loractl==0.1.0{digest and f' --hash=sha256:{digest}'}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-index", "--find-links", str(wheel.parent), "--target", str(target / "site")]
    command += ["--requirement", str(target / "pins.txt")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pip_takes_the_named_file_and_refuses_an_altered_one(wheel: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    done = installed(wheel, digest, tmp_path / "right")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "right" / "site" / "registry").is_dir()
    assert "Hashes are required" in installed(wheel, "", tmp_path / "unnamed").stderr
    other = tmp_path / "other" / wheel.name
    other.parent.mkdir()
    other.write_bytes(wheel.read_bytes() + b"\n")
    for source, pinned, name in ((other, digest, "bytes"), (wheel, "0" * 64, "digest")):
        refused = installed(source, pinned, tmp_path / name)
        assert refused.returncode != 0
        assert "DO NOT MATCH THE HASHES" in refused.stderr, refused.stderr
        assert not (tmp_path / name / "site").exists()


# ── the list of what is in it ────────────────────────────────────────────────


def test_the_list_of_what_an_image_holds_is_cyclonedx_and_names_every_package(tmp_path: Path) -> None:
    out = tmp_path / "server.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--pyproject", "pyproject.toml"]
    command += ["--output-reproducible", "--no-validate", "--output-file", str(out), "requirements/server.txt"]
    subprocess.run(command, cwd=HOUSE, check=True, capture_output=True)
    text = out.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"version":', '"verison":')) is not None
    listed = dict(re.findall(r'"purl": "pkg:pypi/([\w.-]+)@([^"?]+)', text))
    assert listed == {name: locked.version for name, locked in LOCKED["server.txt"].items()}
