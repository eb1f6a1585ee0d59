"""A registry with very many adapters, written as rows: what pushes would have left behind, without the pushes.

20 bases in 5 lines of 4 revisions; 12 target sets, as people choose them; each adapter has two versions, the second
on the same or the next revision, `prod` for four adapters of five, and a scoring of its newest version.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text
from sqlmodel import SQLModel

from registry.core.engines import ENGINES
from registry.core.manifest import FileEntry, Manifest, canonical_json
from registry.db.engine import Database
from registry.db.models import (
    Adapter,
    Alias,
    AliasMove,
    Base,
    Dataset,
    DatasetVersion,
    Evaluation,
    Line,
    Revision,
    StoredManifest,
    TargetFit,
    TargetSet,
    Version,
)
from tests import servers

from .house import Registry, fleet

LINES, REVISIONS, NAMESPACES = 5, 4, 50
BASES = LINES * REVISIONS
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_SETS = [MODULES[i:j] for i, j in [(0, 1), (0, 2), (0, 3), (0, 4), (0, 7), (4, 7), (2, 4), (1, 3), (3, 4)]]
TARGET_SETS += [("q_proj", "v_proj"), ("gate_proj", "down_proj"), ("q_proj", "o_proj", "down_proj")]
RANKS = (8, 16, 32, 64)
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_CHUNK = 2000


def digest(what: str, algorithm: str = "sha256") -> str:
    """A digest of its own for every ``what``."""
    return f"{algorithm}:{hashlib.sha256(what.encode()).hexdigest()}"


@dataclass
class Filled:
    """A registry's rows; `grow` adds adapters."""

    database: Database
    adapters: int = 0
    bases: list[str] = field(default_factory=list)
    """Digests; index + 1 is the id."""
    names: list[tuple[str, str, str]] = field(default_factory=list)
    """(``namespace/name``, digest of its newest version, digest of that version's base)"""

    def start(self) -> None:
        """Bases, lines, target sets, fits and a suite."""
        self.bases = [digest(f"base {i}", "b3") for i in range(BASES)]
        rows: dict[type[SQLModel], list[dict[str, Any]]] = {
            Base: [_base(i, self.bases[i]) for i in range(BASES)],
            Line: [
                {"id": i + 1, "name": f"line{i}", "next_revision": REVISIONS + 1, "created_at": BEGAN}
                for i in range(LINES)
            ],
            Revision: [
                {"line_id": i // REVISIONS + 1, "number": i % REVISIONS + 1, "base_id": i + 1, "created_by": "filler",
                 "created_at": BEGAN}
                for i in range(BASES)
            ],
            TargetSet: [
                {"id": i + 1, "digest": digest(f"set {i}"), "body": canonical_json(_tensors(modules))}
                for i, modules in enumerate(TARGET_SETS)
            ],
            TargetFit: [
                _fit(old, new, target)
                for old in range(BASES)
                for new in range(BASES)
                for target in range(len(TARGET_SETS))
                if old != new
            ],
            Dataset: [{"id": 1, "kind": "suite", "namespace": "team0", "name": "suite", "next_version": 2,
                       "created_at": BEGAN}],
            DatasetVersion: [{"id": 1, "dataset_id": 1, "number": 1, "digest": digest("suite"), "rows": 400,
                              "gate_rows": 300, "spec": {"metric": "accuracy"}, "size": 100_000,
                              "created_by": "filler", "created_at": BEGAN}],
        }  # fmt: skip
        self._write(rows)

    def grow(self, adapters: int) -> None:
        """Add adapters until there are ``adapters``, and let the database look at its tables."""
        for first in range(self.adapters, adapters, _CHUNK):
            rows: dict[type[SQLModel], list[dict[str, Any]]] = {
                table: [] for table in (Adapter, StoredManifest, Version, Alias, AliasMove, Evaluation)
            }
            for index in range(first, min(first + _CHUNK, adapters)):
                self._adapter(rows, index)
            self._write(rows)
        self.adapters = max(self.adapters, adapters)
        with self.database.read() as session:
            postgres = self.database.dialect == "postgresql"  # its autovacuum would come by in a minute
            session.connection().execute(text("VACUUM (ANALYZE)" if postgres else "ANALYZE"))

    def _adapter(self, rows: dict[type[SQLModel], list[dict[str, Any]]], index: int) -> None:
        draw = random.Random(index)
        namespace, name, number = f"team{index % NAMESPACES}", f"bot-{index}", index + 1
        first = draw.randrange(BASES)
        stays = draw.random() < 0.5 or first % REVISIONS == REVISIONS - 1
        second = first if stays else first + 1
        target = min(int(draw.expovariate(0.4)), len(TARGET_SETS) - 1)
        rank = draw.choice(RANKS)
        rows[Adapter].append(
            {"id": number, "namespace": namespace, "name": name, "next_version": 3, "task": f"task{index % 20}",
             "created_at": BEGAN}
        )  # fmt: skip
        for version, base in ((1, first), (2, second)):
            manifest = _manifest(f"{index} {version}", self.bases[base], rank, TARGET_SETS[target])
            rows[StoredManifest].append(
                {"digest": str(manifest.digest), "kind": "adapter", "body": manifest.canonical(),
                 "size": manifest.size}
            )  # fmt: skip
            rows[Version].append(
                _version(2 * index + version, number, version, base + 1, target, rank)
                | {"digest": str(manifest.digest), "latest": version == 2 or not stays, "size": manifest.size,
                   "evidence": draw.choice(["recorded", "resolved", "declared"])}
            )  # fmt: skip
        latest = 2 * index + 2
        self.names.append((f"{namespace}/{name}", str(manifest.digest), self.bases[second]))
        if index % 5 < 4:
            at = {"adapter_id": number, "base_id": second + 1, "name": "prod", "generation": 1}
            rows[Alias].append(at | {"version_id": latest, "target_set_id": target + 1})
            rows[AliasMove].append(at | {"to_version_id": latest, "actor": "filler", "reason": "", "at": BEGAN})
        rows[Evaluation].append(
            {"base_id": second + 1, "version_id": latest, "suite_id": 1, "harness": digest("harness"),
             "summary": {"accuracy": {"gate": {"mean": draw.random(), "n": 300}}},
             "records": digest(f"records {index}"), "job_id": f"j{index}", "seconds": 10.0, "created_at": BEGAN}
        )  # fmt: skip

    def _write(self, rows: dict[type[SQLModel], list[dict[str, Any]]]) -> None:
        with self.database.write() as session:
            for table, values in rows.items():
                if values:
                    session.connection().execute(insert(table), values)


def aliased(names: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Those of `Filled.names` whose series has the alias ``prod``."""
    return [entry for index, entry in enumerate(names) if index % 5 < 4]


@contextmanager
def served(folder: Path, app: str, adapters: int, processes: int = 1) -> Iterator[tuple[Registry, Filled, str]]:
    """A fleet without daemons that has so many adapters, what they are, and the URL of its database."""
    with (
        servers.postgres() as database,
        servers.seaweedfs() as storage,
        fleet(folder, database, storage, app=app, daemons=False, processes=processes) as registry,
    ):
        filled = Filled(Database(database))
        filled.start()
        filled.grow(adapters)
        filled.database.close()
        yield registry, filled, database


def _base(index: int, base: str) -> dict[str, Any]:
    return {
        "id": index + 1,
        "digest": base,
        "weights_digest": digest(f"weights {index}", "b3"),
        "arch_digest": digest("arch", "b3"),
        "arch_kind": "canonical",
        "model_type": "llama",
        "parameters": 8_000_000_000,
        "weights": "full",
        "names": [f"org/model-{index}"],
        "created_by": "filler",
        "created_at": BEGAN,
    }


def _tensors(modules: Sequence[str]) -> list[str]:
    return sorted(f"model.layers.{layer}.{module}.weight" for layer in range(32) for module in modules)


def _fit(old: int, new: int, target: int) -> dict[str, Any]:
    """Inside a line most have the same shape, some equal targets, few are casts; other lines are other models."""
    fit, reasons = "incompatible", [{"subject": "model.layers.0", "text": "other shapes"}]
    if old // REVISIONS == new // REVISIONS:
        fit = ["same-shape", "same-shape", "targets-equal", "derived"][(old + new + target) % 4]
        reasons = [{"subject": "lm_head.weight", "text": "other values"}]
    return {
        "old_id": old + 1,
        "new_id": new + 1,
        "target_set_id": target + 1,
        "fit": fit,
        "reasons": reasons,
        "vocabulary_changed": False,
        "drift": 0.01,
    }


def _manifest(seed: str, base: str, rank: int, modules: Sequence[str]) -> Manifest:
    size = 4 * 2 * 4096 * rank * 32 * len(modules)
    config = {
        "base_model_name_or_path": "org/model",
        "bias": "none",
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
    }
    files = (
        FileEntry(path="adapter_config.json", size=len(str(config)), digest=digest(f"config {seed}")),
        FileEntry(path="adapter_model.safetensors", size=size, digest=digest(f"weights {seed}")),
    )
    return Manifest(kind="adapter", files=files, base=base, config=config)


def _version(id_: int, adapter_id: int, number: int, base_id: int, target: int, rank: int) -> dict[str, Any]:
    modules = TARGET_SETS[target]
    return {
        "id": id_,
        "adapter_id": adapter_id,
        "number": number,
        "base_id": base_id,
        "target_set_id": target + 1,
        "binding": {"declared": "org/model", "recorded": None},
        "peft_type": "LORA",
        "runnable": True,
        "rank": rank,
        "engines": (1 << len(ENGINES)) - 1,
        "spec": {
            "modules": 32 * len(modules),
            "targets": list(modules),
            "ranks": [rank],
            "scales": [2.0],
            "features": [],
            "engines": dict.fromkeys(ENGINES, "yes"),
            "why_not_runnable": None,
            "recorded": {},
        },
        "message": "",
        "job_id": None,
        "created_by": "filler",
        "created_at": BEGAN + timedelta(seconds=id_),
    }
