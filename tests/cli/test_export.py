"""GGUF files from the command line: out of folders, and out of a real registry."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from cli.main import run
from registry.transfer import digested
from tests import live
from tests.workers import factories
from workers.compute.weights import write_adapter

Call = Callable[..., Any]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command with ``--json``; its document, or with ``code`` what was said and not done."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def called(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        status = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        assert status == code, said.err
        return said.err if code else json.loads(said.out)

    return called


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = factories.saved(factories.llama(vocab_size=272), tmp_path / "base")
    factories.merging_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    made = factories.random_adapter(factories.llama(vocab_size=272), targets=("q_proj", "v_proj"))
    write_adapter(made, tmp_path / "bot", base=str(digested(base).digest), recipe="sha256:" + "0" * 64)
    return tmp_path / "bot"


def fact(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def data(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_a_base_becomes_a_model(call: Call, base: Path, tmp_path: Path) -> None:
    said = call("export", base, "--out", tmp_path / "base.gguf", "--dtype", "q8_0")
    assert (said["architecture"], said["loractl.base"]) == ("llama", str(digested(base).digest))
    assert said["size"] == (tmp_path / "base.gguf").stat().st_size
    assert fact(tmp_path / "base.gguf", "general.type") == "model"
    assert fact(tmp_path / "base.gguf", "loractl.base") == said["loractl.base"]
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["base.gguf"]
    assert list(tmp_path.glob(".base.gguf*")) == []


def test_an_adapter_of_the_registry_is_the_one_in_the_folder(
    call: Call, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live.registry(tmp_path / "registry") as registry:
        monkeypatch.setenv("LORACTL_URL", registry.url)
        monkeypatch.setenv("LORACTL_TOKEN", registry.token)
        call("push", adapter, "team/bot", "--base", base)
        pulled = call("export", "team/bot", "--for", base, "--out", tmp_path / "pulled.gguf")
    local = call("export", adapter, "--for", base, "--out", tmp_path / "local.gguf")
    assert pulled["tensors"] == local["tensors"] == 8
    assert data(tmp_path / "pulled.gguf") == data(tmp_path / "local.gguf")
    assert fact(tmp_path / "pulled.gguf", "loractl.adapter") == pulled["loractl.adapter"]


def test_both_become_one_model(call: Call, base: Path, adapter: Path, tmp_path: Path) -> None:
    said = call("export", adapter, "--for", base, "--merge", "--out", tmp_path / "both.gguf")
    assert fact(tmp_path / "both.gguf", "general.type") == "model"
    assert {"loractl.base", "loractl.adapter"} <= set(said)


def test_what_does_not_go_together_is_said_before_work_starts(
    call: Call, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    assert "An adapter is written for its base" in call("export", adapter, "--out", out, code=2)
    assert "belong to adapters" in call("export", base, "--merge", "--out", out, code=2)
    assert "its folder is not there" in call("export", base, "--out", tmp_path / "no" / "x.gguf", code=1)
    other = tmp_path / "other"
    factories.merging_tokenizer().save_pretrained(factories.saved(factories.llama(seed=1, vocab_size=272), other))
    assert "as it records itself" in call("export", adapter, "--for", other, "--out", out, code=1)
    out.write_bytes(b"mine")
    assert "it is there already" in call("export", base, "--out", out, code=1)
    assert out.read_bytes() == b"mine"


def test_a_refusal_of_the_child_is_the_command_s(call: Call, base: Path, adapter: Path, tmp_path: Path) -> None:
    said = call("export", adapter, "--for", base, "--dtype", "q8_0", "--out", tmp_path / "x.gguf", code=1)
    assert "llama.cpp reads factors in fp32, bf16 or fp16" in said
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".x.gguf*")) == []


def test_a_missing_extra_is_named(call: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    said = call("export", base, "--out", tmp_path / "x.gguf", code=1)
    assert "needs the extra 'gguf'" in said
    assert "loractl[gguf]" in said
