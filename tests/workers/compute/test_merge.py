import errno
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from registry.core.errors import BadHeader, BadTensor, NotRunnable, PathUnusable
from registry.files import digest_base
from tests.workers import factories
from workers.compute import shards, stream
from workers.compute.bank import attached
from workers.compute.lora import Adapter, Patch
from workers.compute.merge import Form, merge
from workers.compute.model import Model
from workers.compute.verify import deviation
from workers.compute.weights import DTYPES, write_adapter


def adapted(model: Model, adapter: Adapter) -> torch.Tensor:
    with attached(model, adapter):
        return factories.logits(model)


def assert_answers(folder: Path, logits: torch.Tensor) -> None:
    """The model of ``folder`` loads in transformers and gives ``logits``."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(factories.logits(model), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("blocks", [96, 1 << 18])
def test_merged_is_adapted(
    make: Callable[[], Model], blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", blocks)
    model = make()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    merge(factories.saved(model, tmp_path / "base"), adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_untouched_tensors_and_files_are_the_same_bytes(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    merged = merge(base, factories.random_adapter(model), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(merged.changed) == {name for name in before if "q_proj" in name or "v_proj" in name}
    for name in ("config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_every_tensors_digest_is_taken_on_the_way(tmp_path: Path) -> None:
    model = factories.llama()
    merged = merge(factories.saved(model, tmp_path / "base"), factories.random_adapter(model), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.tensors == {name: blake3(value.numpy().tobytes()).hexdigest() for name, value in written.items()}


def test_shards_and_their_index_stay_as_they_were(tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    adapter = factories.random_adapter(model)
    merge(base, adapter, tmp_path / "out")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "out")
    )
    assert len(set(before["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_the_update_is_rounded_once_to_the_bases_own_type(tmp_path: Path) -> None:
    model = factories.llama().bfloat16()
    adapter = factories.random_adapter(model)
    base = factories.saved(model, tmp_path / "base")
    merge(base, adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name, patch in adapter.patches.items():
        exact = before[f"{name}.weight"].double() + patch.update.dense().double()
        assert after[f"{name}.weight"].dtype == torch.bfloat16
        error = (after[f"{name}.weight"].double() - exact).abs()
        assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize("stored", ["one shard", "many shards"])
@pytest.mark.parametrize("target", ["head", "embedding", "saved head"])
def test_a_tied_head_that_diverges_is_untied(target: str, stored: str, tmp_path: Path) -> None:
    model = factories.llama(tied=True)
    options = {"max_shard_size": "60KB"} if stored == "many shards" else {}
    base = factories.saved(model, tmp_path / "base", **options)
    torch.manual_seed(1)
    if target == "head":
        adapter = factories.random_adapter(model, targets=("lm_head",))
    elif target == "embedding":
        patch = Patch(torch.randn(2, 259) * 0.1, torch.randn(32, 2), 1.0, embedding=True)
        adapter = Adapter({"model.embed_tokens": patch}, {})
    else:
        adapter = replace(factories.random_adapter(model), replaced={"lm_head.weight": torch.randn(259, 32)})
    merged = merge(base, adapter, tmp_path / "out")
    assert merged.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_magnitudes_and_biases_are_merged(tmp_path: Path) -> None:
    model = factories.llama(attention_bias=True)
    torch.manual_seed(1)
    adapter = factories.random_adapter(model)
    patches = {
        name: replace(patch, magnitude_O=torch.rand(len(patch.b_OR)) + 1)
        if "q_proj" in name
        else replace(patch, bias_O=torch.randn(len(patch.b_OR)))
        for name, patch in adapter.patches.items()
    }
    adapter = replace(adapter, patches=patches, replaced={"model.layers.0.self_attn.k_proj.bias": torch.randn(16)})
    merge(factories.saved(model, tmp_path / "base"), adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_files_without_the_base_prefix_are_merged_too(tmp_path: Path) -> None:
    model = factories.gpt2()
    base = factories.saved(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = factories.random_adapter(model, targets=("c_attn",))
    merge(base, adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_a_merge_never_writes_over_a_folder_that_holds_something(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    with pytest.raises(PathUnusable, match="new or empty folder"):
        merge(base, factories.random_adapter(model), base)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(NotRunnable, match=r"the base is stored in gptq; merge into its full weights$"):
        merge(base, factories.random_adapter(model), tmp_path / "out")


def test_a_sum_that_overflows_the_bases_type_is_refused(tmp_path: Path) -> None:
    model = factories.llama().half()
    adapter = factories.random_adapter(model)
    patches = {name: replace(patch, scale=1e6) for name, patch in adapter.patches.items()}
    with pytest.raises(BadTensor, match="more than float16 holds \\(65504\\)"):
        merge(factories.saved(model, tmp_path / "base"), replace(adapter, patches=patches), tmp_path / "out")


def test_progress_counts_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    model, seen = factories.llama(tied=False), list[dict[str, Any]]()
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    merge(base, factories.random_adapter(model), tmp_path / "out", seen.append)
    assert [progress["step"] for progress in seen] == sorted(progress["step"] for progress in seen)
    assert seen[-1]["step"] == seen[-1]["steps"]


# ── the fast path against a plain one ────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 90), rank=st.integers(1, 5), seed=st.integers(0, 99),
    transposed=st.booleans(), stretched=st.booleans(), replaced=st.booleans(), shifted=st.booleans(),
    block=st.sampled_from([1, 64, 1 << 18]), hashed=st.booleans(), threads=st.integers(1, 3),
    kinds=st.tuples(st.sampled_from(["F64", "F32", "F16", "BF16"]), st.sampled_from(["F64", "F32", "F16", "BF16"])),
)  # fmt: skip
def test_every_change_is_its_float64_value_rounded_once(
    rows: int, columns: int, rank: int, seed: int, transposed: bool, stretched: bool, replaced: bool, shifted: bool,
    block: int, hashed: bool, threads: int, kinds: tuple[str, str],
) -> None:  # fmt: skip
    chance = torch.Generator().manual_seed(seed)
    w, value = (torch.randn(rows, columns, generator=chance).to(DTYPES[kinds[0]]) for _ in range(2))
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    a, b = (torch.randn(*shape, generator=chance) for shape in ((rank, inputs), (outputs, rank)))
    magnitude = torch.rand(outputs, generator=chance) + 0.5 if stretched else None
    shift = torch.randn(rows, generator=chance) if shifted else None
    change = stream.Change(Patch(a, b, 0.3, magnitude), transposed, value if replaced else None, shift)

    exact = (value if replaced else w).double()
    update = 0.3 * b.double() @ a.double()
    exact = exact + (update.T if transposed else update)
    if magnitude is not None:
        of_outputs = exact.T if transposed else exact
        of_outputs = of_outputs * (magnitude.double() / of_outputs.norm(dim=1))[:, None]
        exact = of_outputs.T if transposed else of_outputs
    exact = exact if shift is None else exact + shift.double()[:, None]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "BLOCK_ELEMENTS", block)
        patched.setattr(stream, "PIECE_ELEMENTS", 4 * block)
        save_file({"w": w}, Path(folder) / "in.safetensors")
        source = shards.stored_in(Path(folder) / "in.safetensors")[0]["w"]
        path = Path(folder) / "out"
        made = stream.Made("w", source, kinds[1], change, path, 24)
        path.write_bytes(bytes(24 + made.size))
        digests = stream.stream([made], lambda _: None, digests=hashed, threads=threads)
        data = path.read_bytes()[24:]
    found = torch.frombuffer(bytearray(data), dtype=DTYPES[kinds[1]]).view(rows, columns)
    assert digests == ({"w": blake3(data).hexdigest()} if hashed else {})
    wide = torch.promote_types(w.dtype, torch.float32)
    slack = 200 * torch.finfo(wide).eps * float(exact.abs().max() + update.abs().max() + 1)
    half = torch.finfo(found.dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= half * exact.abs() + slack + torch.finfo(found.dtype).tiny).all())


@pytest.mark.parametrize("tiles", [False, True])
def test_at_most_one_element_in_a_thousand_is_not_the_correctly_rounded_one(
    tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "has_tiles", lambda: tiles)
    chance = torch.Generator().manual_seed(1)
    w = (torch.randn(384, 512, generator=chance) * 0.02).bfloat16()
    patch = Patch(torch.randn(16, 512, generator=chance) / 22, torch.randn(384, 16, generator=chance) * 1e-3, 2.0)
    save_file({"w": w}, tmp_path / "in.safetensors")
    source, path = shards.stored_in(tmp_path / "in.safetensors")[0]["w"], tmp_path / "out"
    made = stream.Made("w", source, "BF16", stream.Change(patch), path, 0)
    path.write_bytes(bytes(made.size))
    stream.stream([made], lambda _: None)
    found = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).view(w.shape)
    rounded = (w.double() + 2.0 * patch.b_OR.double() @ patch.a_RI.double()).bfloat16()
    assert not torch.equal(rounded, w)
    apart = (found.view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
    assert float((apart > 0).float().mean()) <= 1e-3
    far = (found.double() - rounded.double()).abs()[apart > 1]  # none, but where W and a split product cancel
    assert len(far) == 0 or (tiles and float(far.max()) < 2**-15 * float(rounded.abs().max()))


def test_a_split_product_is_as_good_as_one_in_float32() -> None:
    chance = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 8, generator=chance), torch.randn(8, 64, generator=chance)
    parts = [part.double() for part in stream.split(left, right)]
    exact, bound = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    assert bool(((parts[0] @ parts[1] - exact).abs() <= 2**-15 * bound).all())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_where_base_and_update_cancel_an_element_is_still_next_to_the_exact_one(dtype: str, tmp_path: Path) -> None:
    model = factories.llama(tied=False).bfloat16()
    adapter = factories.random_adapter(model, targets=("q_proj",))
    chance = torch.Generator().manual_seed(1)
    for name in adapter.patches:  # of full rank, so that W + ΔW is no more than what float32 rounds away
        weight = model.get_submodule(name).weight.double()
        turn = torch.linalg.qr(torch.randn(32, 32, generator=chance, dtype=torch.float64))[0].float()
        adapter.patches[name] = Patch(turn, (-weight @ turn.double().inverse()).float(), 1.0)
    base = factories.saved(model, tmp_path / "base")
    merge(base, adapter, tmp_path / "out", form=Form(dtype))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name, patch in adapter.patches.items():
        found = after[f"{name}.weight"]
        exact = before[f"{name}.weight"].double() + patch.b_OR.double() @ patch.a_RI.double() * patch.scale
        units = found.view(torch.int16).int() - exact.to(found.dtype).view(torch.int16).int()
        assert int(units.abs().max()) <= 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_merge_of_peft_is_the_same_up_to_its_roundings(tmp_path: Path) -> None:
    model = factories.llama(tied=False).bfloat16()
    base = factories.saved(model, tmp_path / "base")
    adapter = factories.random_adapter(model, targets=("all-linear",))
    write_adapter(adapter, tmp_path / "adapter", base=factories.BASE, recipe="sha256:" + "0" * 64)
    merge(base, adapter, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, theirs[name], atol=1e-2, rtol=2**-6)


# ── types and files ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_are_written_in_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    model = factories.llama().bfloat16()
    base = factories.saved(model, tmp_path / "base")
    adapter = factories.random_adapter(model)
    merged = merge(base, adapter, tmp_path / "out", form=Form(dtype))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {value.dtype for value in after.values()} == {wanted}
    for name, value in after.items():
        update = adapter.patches.get(name.removesuffix(".weight"))
        exact = before[name].double() + (update.update.dense().double() if update else 0)
        torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(wanted).eps, atol=1e-6)
    assert merged.tensors.keys() == after.keys()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_a_value_that_float16_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = factories.llama().bfloat16()
    model.model.norm.weight.data[3] = 1e5
    base = factories.saved(model, tmp_path / "base")
    with pytest.raises(BadTensor, match=r"model\.norm\.weight.*65504"):
        merge(base, factories.random_adapter(model), tmp_path / "out", form=Form("fp16"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("limit", "files"), [(40_000, 3), (1 << 30, 1)])
def test_shards_are_of_the_size_that_is_asked_for(limit: int, files: int, tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    adapter = factories.random_adapter(model)
    merge(base, adapter, tmp_path / "out", form=Form(max_shard_bytes=limit))
    made = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(made) >= files
    assert (len(made) == 1) == (files == 1) == (not (tmp_path / "out" / "model.safetensors.index.json").exists())
    for path in made:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= limit
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_a_merge_that_is_stopped_leaves_no_shard_and_no_config(tmp_path: Path) -> None:
    model = factories.llama()

    def stop(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(factories.saved(model, tmp_path / "base"), factories.random_adapter(model), tmp_path / "out", stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_ends_early_is_refused(tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")
    stored = shards.stored_tensors(base)["model.norm.weight"]
    beyond = replace(stored, start=(base / "model.safetensors").stat().st_size - 8)
    (tmp_path / "out").write_bytes(bytes(stored.size))
    made = stream.Made(stored.name, beyond, stored.dtype, None, tmp_path / "out", 0)
    with pytest.raises(BadHeader, match="ends after the end of the file"):
        stream.stream([made], lambda _: None)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_the_digests_taken_on_the_way_are_those_of_the_files(dtype: str | None, tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    merged = merge(base, factories.random_adapter(model), tmp_path / "merged", form=Form(dtype))
    assert digest_base(tmp_path / "merged", taken=merged.tensors).digest == digest_base(tmp_path / "merged").digest


def test_torch_has_its_threads_back_after_a_merge(tmp_path: Path) -> None:
    model, before = factories.llama(), torch.get_num_threads()
    base = factories.saved(model, tmp_path / "base")
    torch.set_num_threads(2)
    try:
        merge(base, factories.random_adapter(model), tmp_path / "out")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ── verifying ────────────────────────────────────────────────────────────────


def test_a_merged_model_deviates_by_rounding_and_another_one_by_more(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    adapter = factories.random_adapter(model)
    merge(base, adapter, tmp_path / "out")
    good, bad = deviation(base, tmp_path / "out", adapter), deviation(base, base, adapter)
    assert good.relative < 1e-5
    assert good.kl < 1e-8
    assert (good.agreement, good.positions) == (1.0, 128)
    assert bad.relative > 1e-2
    assert bad.kl > 1e-4
    assert bad.largest > good.largest


def test_a_disk_that_fails_while_it_is_written_to_fails_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(PathUnusable, match="Input/output error"):
        merge(base, factories.random_adapter(factories.llama()), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
