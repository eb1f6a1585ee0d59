"""Every benchmark runs and yields rows with claims; what it measures is for a quiet machine, not for a test."""

import copy
import importlib
import itertools
import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import house, run
from benchmarks.rebase import exactness, gate, labelfree, published, widths
from benchmarks.table import Row, at_least, at_most
from tests.workers import factories
from workers.compute.lora import Patch

TINY = 0.002


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark does apart begins where the imports that take longest are done."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.train", "benchmarks.transfer"])
    monkeypatch.setattr(house, "START", "forkserver")


@pytest.mark.parametrize("name", run.names())
def test_a_benchmark_yields_rows_with_claims(name: str) -> None:
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run(TINY)
    assert rows
    for row in rows:
        assert row.claim
        assert row.target
        assert row.measured >= 0
        json.dumps(asdict(row))


def test_the_exactness_of_aligning_is_measured_family_by_family() -> None:
    families = list(exactness.FAMILIES)[1:5:2]
    found = list(exactness.cells(steps=4, rows=4, families=families))
    assert {cell.family for cell in found} == set(families)
    assert {"width, clones", "every shape"} <= {cell.rewrite for cell in found}
    assert all(abs(cell.aligned - cell.before) <= exactness.LIMIT for cell in found)
    assert exactness.table(found) != exactness.table([replace(found[0], aligned=found[0].before + 1), *found[1:]])


def test_what_is_brought_to_another_width_is_measured_beside_what_has_been_published(tmp_path: Path) -> None:
    found = list(widths.cells(tmp_path, widths.Sizes(pretraining=2, steps=2, prompts=2, test=2)))
    assert {(cell.old, cell.new) for cell in found} == {widths.WIDTHS, widths.WIDTHS[::-1]}
    assert all(cell.brought.keys() == set(widths.WAYS) for cell in found)
    reached = [replace(cell, bare=2.0, trained=1.0, brought=dict.fromkeys(widths.WAYS, 1.5)) for cell in found]
    assert "| 50% |" in widths.table(reached)
    assert "missed" not in widths.table(reached)
    assert "missed" in widths.table([replace(cell, brought=dict.fromkeys(widths.WAYS, 1.7)) for cell in reached])


def test_the_published_way_by_heads_finds_heads_that_changed_places() -> None:
    old = factories.llama(num_attention_heads=4, num_key_value_heads=4)
    new = copy.deepcopy(old)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for layer in new.model.layers:
            for part in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(layer.self_attn, part).weight
                weight.copy_(weight.unflatten(0, (4, -1))[order].flatten(0, 1))
            weight = layer.self_attn.o_proj.weight
            weight.copy_(weight.unflatten(1, (4, -1))[:, order].flatten(1))
    adapter = factories.random_adapter(old, 1, rank=4, targets=("all-linear",))
    same = [(token, token) for token in range(old.config.vocab_size)]
    kept, moved = (published.lorasuite(old, base, adapter, same) for base in (old, new))
    assert kept.keys() == moved.keys() == adapter.patches.keys()
    for name, patch in kept.items():
        whole: Any = patch.update.dense()
        if name.endswith("o_proj"):
            whole = whole.unflatten(1, (4, -1))[:, order].flatten(1)
        elif "self_attn" in name:
            whole = whole.unflatten(0, (4, -1))[order].flatten(0, 1)
        torch.testing.assert_close(moved[name].update.dense(), whole, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(patch.update.dense().norm(), adapter.patches[name].update.dense().norm())


def test_the_published_way_by_heads_is_its_formula_written_out() -> None:
    old = factories.llama(num_attention_heads=4, num_key_value_heads=2)
    new = factories.llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=48, intermediate_size=96)
    adapter = factories.random_adapter(old, 1, rank=4, targets=("all-linear",))
    same = [(token, token) for token in range(3, old.config.vocab_size)]
    found = published.lorasuite(old, new, adapter, same)
    w1, w2 = ({name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
              for model in (old, new))  # fmt: skip
    t = torch.linalg.pinv(w1["model.embed_tokens"][3:]) @ w2["model.embed_tokens"][3:]
    at = "model.layers.1.self_attn"

    def head(weights: dict[str, Any], part: str, number: int) -> torch.Tensor:
        """d rows, of o d columns."""
        weight = weights[f"{at}.{part}"]
        size = weights[f"{at}.q_proj"].shape[0] // 4
        number = number // 2 if part in ("k_proj", "v_proj") else number
        rows = slice(number * size, (number + 1) * size)
        found: torch.Tensor = weight[:, rows] if part == "o_proj" else weight[rows]
        return found.detach()

    delta = {f"{at}.{part}": adapter.patches[f"{at}.{part}"].update.dense() for part in ("q_proj", "k_proj", "o_proj")}

    def alike(a: int, b: int) -> float:
        q1, k1, v1, o1 = (head(w1, part, a) for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
        q2, k2, v2, o2 = (head(w2, part, b) for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
        was = torch.cat([(t.T @ q1.T @ k1 @ t).flatten(), (t.T @ v1.T @ o1.T @ t).flatten()])
        now = torch.cat([(q2.T @ k2).flatten(), (v2.T @ o2.T).flatten()])
        return float(torch.cosine_similarity(was, now, dim=0))

    best = max(itertools.permutations(range(4)), key=lambda order: sum(alike(a, b) for a, b in enumerate(order)))
    moved_q, moved_k, moved_o = torch.zeros(48, 48), torch.zeros(24, 48), torch.zeros(48, 48)
    for a, b in enumerate(best):
        rows, group = slice(12 * b, 12 * b + 12), slice(12 * (b // 2), 12 * (b // 2) + 12)
        between_q = head(w1, "q_proj", a) @ t @ head(w2, "q_proj", b).T
        between_k = head(w1, "k_proj", a) @ t @ head(w2, "k_proj", b).T
        between_o = head(w1, "o_proj", a).T @ t @ head(w2, "o_proj", b)
        moved_q[rows] = between_q.T @ head(delta, "q_proj", a) @ t
        moved_k[group] += between_k.T @ head(delta, "k_proj", a) @ t / 2
        moved_o[:, rows] = t.T @ head(delta, "o_proj", a) @ between_o
    for part, moved in (("q_proj", moved_q), ("k_proj", moved_k), ("o_proj", moved_o)):
        u, s, vt = torch.linalg.svd(moved)
        like(found[f"{at}.{part}"], u[:, :4] @ torch.diag(s[:4]) @ vt[:4])
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    t_back = torch.linalg.pinv(t)
    like(found[up], w2[up] @ t_back @ torch.linalg.pinv(w1[up]) @ adapter.patches[up].update.dense() @ t)
    like(found[down], t_back @ adapter.patches[down].update.dense() @ torch.linalg.pinv(w1[down]) @ t @ w2[down])


def like(patch: Patch, delta: torch.Tensor) -> None:
    """The same but for its size."""
    found = patch.update.dense()
    torch.testing.assert_close(found / found.norm(), (delta / delta.norm()).detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cell", [gate.WORSE[1], gate.WORSE[5], *gate.AS_GOOD[1:]])
def test_simulated_campaigns_open_rarely_for_what_is_worse_and_mostly_for_what_is_as_good(cell: gate.Cell) -> None:
    found = gate.simulate(cell, campaigns=1500)
    assert found.met, found
    if cell.n == 100:
        assert found.bootstrap > 0.15, "the naive gate looks as careful as ours: what is simulated here?"
    assert gate.table([found]) != gate.table([replace(found, tiers=0.5)])


def test_the_plot_of_false_openings_shows_what_was_simulated(tmp_path: Path) -> None:
    cells = [gate.Rate(cell, 1, bootstrap=0.3, one=0.01, tiers=0.01) for cell in gate.WORSE]
    drawn = []
    for rates in (cells, cells, [replace(rate, tiers=0.2) for rate in cells]):
        gate.plot(rates, tmp_path / "plot.svg")
        drawn.append((tmp_path / "plot.svg").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


def test_recovery_without_labels_is_measured_by_upgrade_and_task() -> None:
    found = list(labelfree.cells(TINY, {"short": 20}))
    assert len(found) == 3
    assert all(cell.scores.keys() == {"bare", "carry", "inputs", "texts", "retrained"} for cell in found)
    good = replace(found[0], scores={"bare": 0.0, "carry": 0.5, "inputs": 0.98, "texts": 0.8, "retrained": 1.0})
    assert "| median | | | | | 0.50 | 0.98 (≥ 0.97: met) | 0.80 (≥ 0.9: **missed**) | |" in labelfree.table([good])


def test_every_row_is_in_the_table_with_its_verdict() -> None:
    rows = [at_least("fast", 2.0, 1.0, peer="slow"), at_most("small", 1234.0, 100, unit="MB")]
    stored = {"rows": [asdict(row) for row in rows], "date": "2026-01-01", "machine": "here", "scale": 1.0}
    shown = run.table({"example": stored})
    assert "| fast | 2 × | ≥ 1 | met | slow |  |" in shown
    assert "| small | 1,234 MB | ≤ 100 | **missed** |  |  |" in shown


def test_the_table_in_docs_is_what_was_measured() -> None:
    assert run.TABLE.read_text() == run.table(json.loads(run.STORE.read_text()))
