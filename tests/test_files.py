import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import files
from registry.core.adapter import RECORDED_BASE
from registry.core.base_model import BaseModel
from registry.core.digest import Digest
from registry.core.errors import (
    BadConfig,
    BadHeader,
    BadPath,
    DiskFull,
    DuplicateTensor,
    LfsPointer,
    LocalFailure,
    NonFinite,
    NotABase,
    NotAnAdapter,
    PathUnusable,
    PickleRefused,
    ZeroUpdate,
)
from registry.files import (
    HashCache,
    Scan,
    atomic_write,
    base_shards,
    check_adapter_tensors,
    digest_base,
    file_reader,
    header_from,
    read_adapter,
    read_header,
    read_spec,
    read_tokenizer,
    scan_folder,
    sha256_file,
    sketch_base,
)
from tests.factories import (
    adapter_config,
    llama_tensors,
    tiny_adapter,
    tiny_base,
    tiny_llama,
    write_json,
    write_safetensors,
    write_shards,
)

BASE = Digest("b3", "1" * 64)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter", base)


def age(folder: Path) -> None:
    """Make the files old enough to be remembered by a cache."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


# ── the digest of a base ─────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_digest_does_not_depend_on_shards_or_threads(tmp_path: Path, base: Path, shards: int, threads: int) -> None:
    other = tiny_base(tmp_path / "other", shards=shards)
    assert digest_base(other, threads=threads) == digest_base(base)


@given(st.integers(0, 19), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_byte_of_every_tensor_counts(base: Path, which: int, random: Any) -> None:
    before = digest_base(base, threads=1)
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    tensor = read_header(path).tensors[which]
    place = random.randrange(tensor.start, tensor.end)
    content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    after = digest_base(base, threads=1)
    write_shards(base, llama_tensors(), 1)  # as it was, for the next example
    changed = [a.name for a, b in zip(before.tensors, after.tensors, strict=True) if a != b]
    assert changed == [tensor.name]
    assert after.digest != before.digest


def test_a_model_that_transformers_saved_again_in_shards_is_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert len(base_shards(tmp_path / "b")) > 2
    again, before = digest_base(tmp_path / "b"), digest_base(folder)
    assert again == before
    assert again.tokenizer.vocabulary is not None
    assert again.tokenizer.chat_template is not None


def test_progress_adds_up_to_all_tensor_bytes(base: Path) -> None:
    seen: list[int] = []
    found = digest_base(base, progress=seen.append)
    assert sum(seen) == found.size


def test_large_tensors_are_hashed_in_bounded_memory(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(300 << 20, np.uint8), "b": np.ones(7, np.uint8)})
    command = [sys.executable, "-c", PEAK_GROWTH, str(tmp_path)]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert growth < 100 << 20


PEAK_GROWTH = """
import sys
from pathlib import Path
from registry.files import digest_base

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

before = peak()
digest_base(Path(sys.argv[1]), threads=2)
print(peak() - before)
"""


def test_a_cached_digest_is_read_and_a_changed_file_is_hashed_again(tmp_path: Path, base: Path) -> None:
    cache = HashCache(tmp_path / "cache")
    age(base)
    first = digest_base(base, cache=cache)
    path = base / "model.safetensors"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size, time and inode: trusted
    assert digest_base(base, cache=cache).digest == first.digest
    os.utime(path, (1e9, 1e9 + 1))
    assert digest_base(base, cache=cache).digest != first.digest


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, base: Path) -> None:
    cache, path = HashCache(tmp_path / "cache"), base / "model.safetensors"
    age(base)

    def change(_: int) -> None:
        os.utime(path, (1e9, 1e9 + 1))

    sha256_file(path, change, cache=cache)
    assert cache.get(path, "sha256") is None
    assert cache.get(path, "sha256") != str(sha256_file(path, cache=cache)) == cache.get(path, "sha256")


def test_a_fresh_file_is_not_remembered(tmp_path: Path, base: Path) -> None:
    digest_base(base, cache=HashCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_broken_or_unwritable_cache_only_costs_time(tmp_path: Path, base: Path) -> None:
    cache = HashCache(tmp_path / "cache")
    age(base)
    path = base / "config.json"
    expected = sha256_file(path, cache=cache)
    for entry in (tmp_path / "cache").iterdir():
        entry.write_bytes(b"\0broken")
    assert sha256_file(path, cache=cache) == expected
    (tmp_path / "file").write_text("")
    assert sha256_file(path, cache=HashCache(tmp_path / "file" / "no")) == expected


def test_one_entry_keeps_both_hashes(tmp_path: Path, base: Path) -> None:
    cache = HashCache(tmp_path / "cache")
    age(base)
    digest_base(base, cache=cache)
    sha256_file(base / "model.safetensors", cache=cache)
    assert cache.get(base / "model.safetensors", "tensors")
    assert cache.get(base / "model.safetensors", "sha256")


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathUnusable, match="No such file"):
        digest_base(tmp_path / "nowhere")
    with pytest.raises(NotABase, match=r"no \.safetensors"):
        digest_base(tmp_path)


def test_a_base_of_pickles_is_refused_with_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(PickleRefused) as refusal:
        digest_base(tmp_path)
    assert "s.save_file(torch.load(" in refusal.value.hint


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, llama_tensors(), 2)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name, file = next(iter(table["weight_map"].items()))
    for change, error in (
        ({name: "gone.safetensors"}, NotABase),
        ({name: "../x.safetensors"}, NotABase),
        ({name: 3}, BadConfig),
        ({"not.there": file}, NotABase),
    ):
        write_json(index, table | {"weight_map": table["weight_map"] | change})
        with pytest.raises(error):
            digest_base(tmp_path)


def test_only_what_the_index_lists_is_the_base(tmp_path: Path, base: Path) -> None:
    write_shards(tmp_path, llama_tensors(), 2)
    write_safetensors(tmp_path / "consolidated.safetensors", llama_tensors(1))
    assert digest_base(tmp_path).weights == BaseModel.of(digest_base(base).tensors).weights


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name, {"x": np.zeros(3)})
    with pytest.raises(DuplicateTensor, match=r"'x' is in 'a.safetensors' and again in 'b.safetensors'"):
        digest_base(tmp_path)


def test_a_git_lfs_pointer_is_refused_before_anything_is_hashed(base: Path) -> None:
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LfsPointer):
        digest_base(base)


def test_a_truncated_shard_is_refused(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadHeader, match="truncated"):
        digest_base(base)


# ── what belongs to a version ────────────────────────────────────────────────


def test_scanning_an_adapter_twice_gives_one_version(adapter: Path) -> None:
    first, again = (scan_folder("adapter", adapter, base=BASE) for _ in range(2))
    assert first.manifest.digest == again.manifest.digest
    assert first.manifest.config == json.loads((adapter / "adapter_config.json").read_text())
    for entry in first.manifest.files:
        content = first.files[entry.path].read_bytes()
        assert (entry.size, entry.digest) == (len(content), str(Digest.sha256(content)))


def test_what_a_trainer_leaves_behind_stays_behind(adapter: Path) -> None:
    before = scan_folder("adapter", adapter, base=BASE).manifest
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", ".gitattributes"):
        (adapter / name).write_bytes(b"x")
    (adapter / "checkpoint-10").mkdir()
    (adapter / "checkpoint-10" / "adapter_model.bin").write_bytes(b"x")
    assert scan_folder("adapter", adapter, base=BASE).manifest == before
    for name in ("README.md", "LICENSE", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes(b"x")
    kept = {entry.path for entry in scan_folder("adapter", adapter, base=BASE).manifest.files}
    assert kept == {
        "README.md", "LICENSE", "tokenizer_config.json", "chat_template.jinja", "adapter_config.json", WEIGHTS,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pt", "weights.ckpt", "x.pkl", "pytorch_model.bin"])
def test_pickled_weights_are_refused(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(pickle.dumps(1))
    for read in (read_adapter, lambda folder: scan_folder("adapter", folder, base=BASE)):
        with pytest.raises(PickleRefused, match=name):
            read(adapter)


def test_a_pickle_that_calls_itself_safetensors_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(pickle.dumps(list(range(1000))))
    with pytest.raises(PickleRefused):
        read_adapter(adapter)


def test_links_may_not_lead_out_of_the_folder(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(BadPath, match="lead out"):
        scan_folder("adapter", adapter, base=BASE)


def test_links_inside_the_folder_and_in_the_hub_cache_are_followed(tmp_path: Path, base: Path) -> None:
    model = tmp_path / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        blob = model / "blobs" / path.name.replace(".", "")
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert digest_base(snapshot) == digest_base(base)


@pytest.mark.parametrize("missing", ["adapter_config.json", WEIGHTS])
def test_half_an_adapter_is_refused(adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(NotAnAdapter, match=missing.partition(".")[0]):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["[]", "{", "", '{"a": NaN}'])
def test_a_config_that_is_no_json_object_is_refused(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(BadConfig):
        scan_folder("adapter", adapter, base=BASE)


def test_a_sharded_adapter_is_read_as_one(tmp_path: Path, adapter: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(adapter / WEIGHTS)
    whole = read_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    for index, name in enumerate(tensors):
        file = f"adapter_model-{index + 1:05d}-of-{len(tensors):05d}.safetensors"
        write_safetensors(adapter / file, {name: tensors[name]})
    assert [m.name for m in read_adapter(adapter).modules] == [m.name for m in whole.modules]


def test_a_base_is_its_config_tokenizer_and_shards(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path, shards=2)
    for name in ("tokenizer.json", "README.md", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    names = {entry.path for entry in scan_folder("base", folder, base=BASE).manifest.files}
    assert names == {
        "config.json", "tokenizer.json", "README.md", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_a_dataset_is_one_file_whatever_its_name(tmp_path: Path) -> None:
    scans: list[Scan] = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
        scans.append(scan_folder("dataset", tmp_path / name, config={"x": 1}))
    assert scans[0].manifest.digest == scans[1].manifest.digest
    with pytest.raises(PathUnusable, match="one JSONL file"):
        scan_folder("dataset", tmp_path)


def test_a_suite_may_be_a_folder_and_its_jsonl_is_what_belongs_to_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "suite.json", "task.yaml", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    assert list(scan_folder("suite", tmp_path).files) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PathUnusable, match=r"no \.jsonl file in it"):
        scan_folder("suite", tmp_path / "empty")


def test_a_spec_has_the_words_of_the_tasks_it_names(tmp_path: Path) -> None:
    assert read_spec(tmp_path) == {}
    (tmp_path / "a.yaml").write_text("task: a\nnum_fewshot: 2\n")
    (tmp_path / "suite.json").write_text('{"form": "json", "lm_eval": {"tasks": ["a.yaml", {"task": "b"}]}}')
    said = [{"task": "a", "num_fewshot": 2}, {"task": "b"}]
    assert read_spec(tmp_path) == {"form": "json", "lm_eval": {"tasks": said}}


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("process_docs: !function utils.run\n", "!function names code, and a suite is data"),
        ("a: [", "expected the node content"),
        ('a: !!int ""', "index out of range"),
        ("a: !!bool x", "'x'"),
        ("a: !!timestamp x", "NoneType"),
        ("a: &a [*a]", "nested over"),
        ("\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]" for n in range(1, 12))]), "values"),
        (None, "'a.yaml' is no YAML file beside it; there are: other.yaml"),
    ],
)
def test_a_task_that_is_no_plain_yaml_is_refused(yaml: str | None, reason: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("")
    (tmp_path / "suite.json").write_text('{"lm_eval": {"tasks": ["a.yaml"]}}')
    if yaml is not None:
        (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(BadConfig, match=re.escape(reason)):
        read_spec(tmp_path)


def test_a_tokenizer_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path).vocabulary is None


def test_a_header_is_the_same_through_a_store(adapter: Path) -> None:
    path = adapter / WEIGHTS
    assert header_from(file_reader(path), path.stat().st_size, path.name) == read_header(path)


def test_what_our_training_records_is_read(tmp_path: Path, base: Path) -> None:
    folder = tiny_adapter(tmp_path / "recorded", base, record_base=True)
    assert read_adapter(folder).recorded_base == digest_base(base).digest
    assert RECORDED_BASE in read_header(folder / WEIGHTS).metadata


# ── values ───────────────────────────────────────────────────────────────────


def checked(folder: Path, allow_zero: bool = False) -> None:
    headers = {path.name: read_header(path) for path in folder.glob("*.safetensors")}
    check_adapter_tensors(
        read_adapter(folder), headers, {name: file_reader(folder / name) for name in headers}, allow_zero=allow_zero
    )


def test_a_sound_adapter_passes(adapter: Path) -> None:
    checked(adapter)


def factors(folder: Path, dtype: Any, a: Any, b: Any) -> Path:
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{place}.lora_A.weight": a.astype(dtype), f"{place}.lora_B.weight": b.astype(dtype)}
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / "adapter_config.json", adapter_config("x", a.shape[0], ["q_proj"]))
    return folder


def test_adalora_without_any_value_is_an_update_of_nothing(tmp_path: Path) -> None:
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (2, 4), "lora_B": (3, 2), "lora_E": (2, 1)}
    write_json(tmp_path / "adapter_config.json", {"peft_type": "ADALORA", "init_r": 2, "target_modules": ["q_proj"]})
    tensors = {f"{place}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_safetensors(tmp_path / WEIGHTS, tensors)
    checked(tmp_path)
    write_safetensors(tmp_path / WEIGHTS, tensors | {f"{place}.lora_E": np.zeros((2, 1), np.float32)})
    with pytest.raises(ZeroUpdate):
        checked(tmp_path)


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -2.5, 6e-8, 60000.0, math.nan, -math.nan, math.inf, -math.inf])


@given(st.lists(SPECIAL, min_size=2, max_size=40), st.sampled_from([np.float16, np.float32, np.float64]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nan_inf_and_zero_are_found_as_numpy_finds_them(tmp_path: Path, values: list[float], dtype: Any) -> None:
    a = np.array([values])
    folder = factors(tmp_path / "a", dtype, a, np.ones((3, 1)))
    bad = ~np.isfinite(a.astype(dtype))
    if bad.any():
        with pytest.raises(NonFinite) as refusal:
            checked(folder)
        found = refusal.value
        assert (found.nans, found.infs) == (int(np.isnan(a).sum()), int(np.isinf(a.astype(dtype)).sum()))
        assert found.index == int(np.argmax(bad))
    elif not a.astype(dtype).any():
        with pytest.raises(ZeroUpdate):
            checked(folder)
        checked(folder, allow_zero=True)
    else:
        checked(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.0])
def test_bfloat16_is_read_too(tmp_path: Path, value: float) -> None:
    import torch
    from safetensors.torch import save_file

    a = torch.ones(4, 300_000, dtype=torch.bfloat16)
    a[3, 7] = value
    place = "base_model.model.q_proj"
    save_file({f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": torch.ones(2, 4).bfloat16()}, tmp_path / WEIGHTS)
    write_json(tmp_path / "adapter_config.json", adapter_config("x", 4, ["q_proj"]))
    if math.isfinite(value):
        checked(tmp_path)
    else:
        with pytest.raises(NonFinite, match=r"the first is at element 900007\."):
            checked(tmp_path)


def test_one_module_that_changes_something_is_enough(tmp_path: Path, base: Path) -> None:
    folder = tiny_adapter(tmp_path / "zero", base, zero=True)
    with pytest.raises(ZeroUpdate, match="zero in all 4 modules") as refusal:
        checked(folder)
    assert "--allow-zero" in refusal.value.hint
    checked(folder, allow_zero=True)
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    tensor = next(t for t in read_header(path) if t.name.endswith("lora_B.weight"))
    content[tensor.start + 2] = 0x80
    path.write_bytes(content)
    checked(folder)


def test_a_read_that_ends_early_is_refused(adapter: Path) -> None:
    headers = {WEIGHTS: read_header(adapter / WEIGHTS)}
    with pytest.raises(BadHeader, match="truncated"):
        check_adapter_tensors(read_adapter(adapter), headers, {WEIGHTS: lambda offset, length: b""})


# ── writing ──────────────────────────────────────────────────────────────────


def test_a_file_gets_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match="bytes-like"), atomic_write(path) as file:
        file.writelines([b"new", "no bytes"])  # type: ignore[list-item]  # the failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """No file may grow over a page: what a full disk answers, from the kernel itself."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path: Path, tiny_disk: None) -> None:
    with pytest.raises(DiskFull, match="No room left"), atomic_write(tmp_path / "x") as file:
        file.write(bytes(100_000))
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_room_is_a_full_disk() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as failure, full.open("wb", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(DiskFull):
        raise LocalFailure.of(failure.value, full)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathUnusable, match="No such file"), atomic_write(tmp_path / "no" / "x"):
        raise AssertionError("never reached")


# ── sketches ─────────────────────────────────────────────────────────────────


def test_a_sketch_leaves_the_digests_of_large_files_open_and_names_their_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_base(tmp_path / "shards", shards=2)
    assert sketch_base(folder, BASE) is None
    monkeypatch.setattr(files, "_LATE_FROM", 1000)
    sketch = sketch_base(folder, BASE)
    assert sketch is not None
    late = {entry.path: entry for entry in sketch.draft.late}
    assert set(late) == {path.name for path in folder.glob("*.safetensors")}
    assert {name for entry in late.values() for name in entry.tensors} == set(digest_base(folder).by_name)
    told = {path: str(sha256_file(folder / path)) for path in late}
    assert sketch.draft.sealed(told) == scan_folder("base", folder, base=BASE).manifest


def test_a_sketch_takes_digests_that_the_cache_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LATE_FROM", 1000)
    folder, cache = tiny_base(tmp_path / "shards", shards=2), HashCache(tmp_path / "cache")
    age(folder)
    first, second = sorted(folder.glob("*.safetensors"))
    sha256_file(first, cache=cache)
    sketch = sketch_base(folder, BASE, cache=cache)
    assert sketch is not None
    assert [entry.path for entry in sketch.draft.late] == [second.name]
    sha256_file(second, cache=cache)
    assert sketch_base(folder, BASE, cache=cache) is None
