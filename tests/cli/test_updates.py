"""Combine, compress and extract, from the command line through a real registry and a real worker, and back."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from cli.main import run
from cli.updates import COMMANDS
from registry.core.recipes import ENERGY
from registry.schemas import TokenRequest
from registry.settings import WorkerSettings
from tests import live
from tests.factories import base_of, tiny_adapter, tiny_llama, write_safetensors
from workers.jobs import Worker

Call = Callable[..., Any]
ADDED = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Live]:
    """With a worker that takes whatever comes."""
    folder = tmp_path_factory.mktemp("registry")
    with live.registry(folder) as found, found.client() as client:
        token = client.create_token(TokenRequest(name="w", kind="worker", queues=["cpu"])).token
        settings = WorkerSettings(found.url, token, "memory://", folder / "cache", 1 << 30, "w")
        ended = threading.Event()

        def working() -> None:
            with Worker(settings) as worker:
                while not ended.wait(0.1):
                    worker.work("cpu")

        thread = threading.Thread(target=working)
        thread.start()
        try:
            yield found
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def call(
    registry: live.Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Run a command with ``--json``; its document. ``code`` is the exit code that is expected."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORACTL_URL", registry.url)
    monkeypatch.setenv("LORACTL_TOKEN", registry.token)

    def called(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return json.loads(said.out)

    return called


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pushed(call: Call, base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of ranks 4 and 3 on the base, in the registry."""
    folders = [tiny_adapter(tmp_path / str(rank), base, rank, seed=rank) for rank in (4, 3)]
    for folder, name in zip(folders, ("team/one", "team/two"), strict=True):
        call("push", folder, name, "--base", base)
    return folders


def deltas(folder: Path) -> dict[str, Any]:
    """ΔW by module, by the file and the configuration alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {*config.get("alpha_pattern", {}).items()} == {*config.get("rank_pattern", {}).items()}
    return {
        key.removesuffix(".lora_A.weight"): tensors[key.replace("lora_A", "lora_B")] @ a
        * (1.0 if config["lora_alpha"] == config["r"] else config["lora_alpha"] / config["r"])
        for key, a in tensors.items() if "lora_A" in key
    }  # fmt: skip


def parents(call: Call, registry: live.Live, name: str) -> set[str | None]:
    with registry.client() as client:
        lineage = client.lineage(name, "v1")
    refs = {node.digest: node.ref for node in lineage.nodes}
    return {refs[parent] for child, parent, _ in lineage.edges if child == lineage.root}


def test_combine_makes_one_version_of_several_with_all_as_its_parents(
    call: Call, registry: live.Live, pushed: list[Path], tmp_path: Path
) -> None:
    job = call("combine", "team/one", "team/two@v1", "--weight", 1, "--weight", -0.5, "--into", "team/both")
    assert (job["state"], job["result"]["made"][0]["ref"]) == ("succeeded", "team/both@v1")
    assert {module["after"] for module in job["result"]["modules"].values()} == {7}
    assert parents(call, registry, "team/both") == {"team/one@v1", "team/two@v1"}
    call("pull", "team/both@v1", "--out", tmp_path / "out")
    one, two, both = (deltas(folder) for folder in (*pushed, tmp_path / "out"))
    assert both.keys() == one.keys()
    for name, found in both.items():
        np.testing.assert_allclose(found, one[name] - 0.5 * two[name], atol=1e-6)


def test_compress_makes_a_smaller_version_and_shows_what_it_kept(
    call: Call, registry: live.Live, pushed: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = call("compress", "team/one", "--into", "team/small", "--rank", 2, "--alias", "tiny", "-m", "smaller")
    assert job["result"]["made"][0]["aliases"] == ["tiny"]
    call("pull", "team/small:tiny", "--out", tmp_path / "out")
    before, after = deltas(pushed[0]), deltas(tmp_path / "out")
    for name, whole in before.items():
        u, s, v = np.linalg.svd(whole)
        np.testing.assert_allclose(after[name], u[:, :2] * s[:2] @ v[:2], atol=1e-6)
    assert job["result"]["bytes"]["after"] * 2 == job["result"]["bytes"]["before"]
    assert parents(call, registry, "team/small") == {"team/one@v1"}
    capsys.readouterr()
    assert run(["jobs", "show", job["id"]]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if "_proj" in line] == [
        ["q_proj", "2", "4", "2"], ["v_proj", "2", "4", "2"]
    ]  # fmt: skip


def test_extract_makes_an_adapter_of_a_full_fine_tune(
    call: Call, registry: live.Live, base: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for path in base.iterdir():
        (tuned / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    random = np.random.default_rng(1)
    added = random.standard_normal((32, 2)) @ random.standard_normal((2, 32))
    tensors[f"{ADDED}.weight"] = (tensors[f"{ADDED}.weight"] + added).astype(np.float32)
    write_safetensors(tuned / "model.safetensors", tensors, {"format": "pt"})
    call("base", "push", base, "--line", "plain")
    call("base", "push", tuned, "--line", "tuned")
    job = call("extract", "--base", "plain@r1", "--tuned", tuned, "--into", "team/tuned", "--energy", 0.9999)
    assert job["result"]["modules"][ADDED]["after"] == 2
    assert parents(call, registry, "team/tuned") == {"tuned@r1"}
    with registry.client() as client:
        version = client.version("team/tuned", "v1")
    assert (version.base, version.evidence, version.rank) == (str(base_of(base).digest), "recorded", 2)
    call("pull", "team/tuned", "--for", base, "--out", tmp_path / "out")
    np.testing.assert_allclose(deltas(tmp_path / "out")[f"base_model.model.{ADDED}"], added, atol=1e-4)
    refused = call("extract", "--base", "plain", "--tuned", "plain@r1", "--into", "team/tuned", code=2)["error"]
    assert refused["code"] == "bad-request"


USAGE: list[tuple[list[object], str]] = [
    (["combine", "team/one", "--into", "team/both"], "two adapters"),
    (["combine", "a/b", "a/c", "--weight", 1, "--into", "team/both"], "1 times --weight"),
    (["combine", "a/b", "a/c", "--method", "ties", "--into", "team/both"], "--density"),
    (["combine", "a/b", "a/c", "--density", 0.5, "--into", "team/both"], "--density"),
    (["combine", "a/b", "a/c", "--rank", 4, "--into", "team/both"], "concat takes neither"),
    (["combine", "a/b", "a/c", "--method", "svd", "--rank", 4, "--energy", 0.5, "--into", "a/d"], "exclude"),
    (["compress", "a/b", "--rank", 4, "--energy", 0.5, "--into", "a/d"], "exclude"),
    (["compress", "a/b", "--energy", 1.5, "--into", "a/d"], "1.5"),
    (["compress", "a/b", "--bytes", "many", "--into", "a/d"], "'many' is not a size"),
    (["compress", "a/b"], "--into"),
    (["extract", "--base", "x", "--tuned", "y", "--rank", 4, "--energy", 0.5, "--into", "a/d"], "exclude"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGE)
def test_what_makes_no_sense_is_wrong_usage(call: Call, arguments: list[object], says: str) -> None:
    assert says in call(*arguments, code=2)["error"]["detail"]


@pytest.mark.parametrize("name", ["compress", "extract"])
def test_the_help_tells_the_energy_that_is_kept_where_nobody_says_how_much(name: str) -> None:
    [energy] = [option for option in COMMANDS[name].params if option.name == "energy"]
    assert isinstance(energy, click.Option)
    assert str(energy.help).endswith(f"default: {ENERGY}.")
