"""How an adapter stands to a base model: an ordered class, with reasons module by module.

    exact > derived > targets-equal > same-shape > incompatible;  unknown where we cannot tell

Only the tensors that the adapter patches count. Adapters share a few *target sets*, so a class is
computed once per (base, base, target set) and joined; nothing here is computed adapter by adapter.
``unknown`` is a class of its own and never reads as "compatible".
"""

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal

from .adapter import AdapterSpec, Module
from .base_model import BaseModel, Tensor, diff
from .digest import Digest
from .errors import AdapterDoesNotFit, AmbiguousModule, EvidenceContradicts
from .manifest import canonical_json
from .policy import Evidence

Why = Literal["missing", "shape", "ambiguous", "quantised"]
_PREFIXES = ("model.", "transformer.", "gpt_neox.")
_RENAMES = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
    ("visual.", "model.visual."),
    ("vision_tower.", "model.vision_tower."),
)
_PACKED_NAMES = ("qweight", "weight_packed", "blocks")
_PACKED = ("U8", "I8", "I32", "F4", "F8_E4M3", "F8_E5M2")


class FitClass(StrEnum):
    """The classes, best first."""

    EXACT = "exact"
    DERIVED = "derived"
    TARGETS_EQUAL = "targets-equal"
    SAME_SHAPE = "same-shape"
    INCOMPATIBLE = "incompatible"
    UNKNOWN = "unknown"

    @property
    def order(self) -> int:
        """0 for exact; larger is worse."""
        return list(FitClass).index(self)

    def at_least(self, other: "FitClass") -> bool:
        """Whether this is as good as ``other`` or better; unknown is as good as nothing but itself."""
        return self.order <= other.order and (self is not FitClass.UNKNOWN or other is FitClass.UNKNOWN)


BY_DEFAULT = (FitClass.EXACT, FitClass.DERIVED)
"""What pull and resolve give unasked."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One fact behind a class: what it is about, and what was found there."""

    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


@dataclass(frozen=True, slots=True)
class Fit:
    """A class and its reasons."""

    class_: FitClass
    reasons: tuple[Reason, ...] = ()
    vocabulary_changed: bool = False
    drift: float | None = None
    """Median over the patched tensors of ‖W2 − W1‖/‖W1‖; None when it was not measured."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A module of the adapter that has no place in the base, and why."""

    module: str
    why: Why
    text: str

    @property
    def reason(self) -> Reason:
        """For a `Fit`."""
        return Reason(self.module, self.text)


@dataclass(frozen=True)
class TargetSet:
    """The base tensors that an adapter patches: canonical names, sorted, each once."""

    tensors: tuple[str, ...]

    @cached_property
    def digest(self) -> Digest:
        """Equal sets have equal digests."""
        return Digest.sha256(canonical_json(list(self.tensors)))

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True, slots=True)
class Derivation:
    """How one base came from another; only a measured one says anything about fit."""

    kind: Literal["cast", "quantised", "merged", "continued"]
    measured: bool = False
    error: float | None = None
    """Relative reconstruction error; 0 where it is equal after the cast."""


# ── from a module's path to a tensor of the base ─────────────────────────────


def candidates(tensor: str, base: BaseModel) -> tuple[str, ...]:
    """The tensors of ``base`` that a writer may have called ``tensor``; more than one is ambiguous.

    As it is; then with a base prefix more or less; then by known renames; then the embedding for a tied head.
    The first of these steps that finds anything decides.
    """
    family, table = base.family, base.by_name
    prefixes = (family.prefix,) if family else _PREFIXES
    tied = base.arch_fields.get("tie_word_embeddings")
    steps = (
        [tensor],
        [prefix + tensor for prefix in prefixes] + [tensor.removeprefix(p) for p in prefixes if tensor.startswith(p)],
        [new + tensor.removeprefix(old) for old, new in _RENAMES if tensor.startswith(old)],
        [family.embedding] if family and tied and tensor.endswith(family.head) else [],
    )
    for step in steps:
        if found := tuple(dict.fromkeys(name for name in step if name in table)):
            return found
    return ()


def tensor_of(tensor: str, base: BaseModel, module: str | None = None) -> Tensor | None:
    """The one row of ``base`` that ``tensor`` means, or None; `AmbiguousModule` when there are several."""
    found = candidates(tensor, base)
    if len(found) > 1:
        raise AmbiguousModule(module=module or tensor, candidates=" or ".join(found))
    return base.by_name[found[0]] if found else None


def in_by_out(module: str, adapter: AdapterSpec, base: BaseModel) -> bool:
    """Whether the base stores this module's weight as in × out (Conv1D); its family knows, else the author says."""
    return bool(base.family.in_by_out.search(module)) if base.family else adapter.transposed


def mismatches(adapter: AdapterSpec, base: BaseModel) -> list[Mismatch]:
    """Everything of ``adapter`` that does not belong in ``base``; empty when all of it does."""
    found = [_module_mismatch(module, adapter, base) for module in adapter.modules]
    found += [_whole_mismatch(saved.name, saved.shape, base, new_allowed=True) for saved in adapter.saved]
    found += [_whole_mismatch(bias.name, bias.shape, base, new_allowed=False) for bias in adapter.biases]
    found += [_rows_mismatch(rows.name, rows.shape, base) for rows in adapter.token_rows]
    return [mismatch for mismatch in found if mismatch is not None]


def _look_up(tensor: str, module: str, base: BaseModel) -> Tensor | Mismatch:
    try:
        row = tensor_of(tensor, base, module)
    except AmbiguousModule as error:
        return Mismatch(module, "ambiguous", error.message)
    if row is not None:
        return row
    for packed in _PACKED_NAMES:
        if candidates(f"{module}.{packed}", base):
            return Mismatch(module, "quantised", "the base stores this module quantised, its shape cannot be compared")
    return Mismatch(module, "missing", f"the base has no tensor '{tensor}'")


def _module_mismatch(module: Module, adapter: AdapterSpec, base: BaseModel) -> Mismatch | None:
    row = _look_up(f"{module.name}.weight", module.name, base)
    if isinstance(row, Mismatch):
        return row
    turned = module.kind == "linear" and in_by_out(module.name, adapter, base)
    shape: tuple[int, ...] = module.shape[::-1] if turned else module.shape
    if len(module.a.shape) > 2:  # a convolution: B is out × rank × 1 × 1, A is rank × in × its kernel
        shape = module.shape + module.a.shape[2:]
    if row.shape == shape:
        return None
    if row.dtype in _PACKED:
        return Mismatch(module.name, "quantised", "the base stores this module quantised, its shape cannot be compared")
    text = f"the update is {_by(shape)}, the base tensor '{row.name}' is {_by(row.shape)}"
    return Mismatch(module.name, "shape", text)


def _whole_mismatch(name: str, shape: tuple[int, ...], base: BaseModel, new_allowed: bool) -> Mismatch | None:
    row = _look_up(name, name, base)
    if isinstance(row, Mismatch):
        # A head that the base does not have (a classifier) is the adapter's own.
        return None if new_allowed and row.why == "missing" else row
    family = base.family
    vocabulary = family is not None and row.name in (family.embedding, family.head)
    if row.shape == shape or (vocabulary and row.shape[1:] == shape[1:] and shape[0] > row.shape[0]):
        return None
    text = f"the saved tensor is {_by(shape)}, the base tensor '{row.name}' is {_by(row.shape)}"
    return Mismatch(name, "shape", text)


def _rows_mismatch(module: str, shape: tuple[int, ...], base: BaseModel) -> Mismatch | None:
    row = _look_up(f"{module}.weight", module, base)
    if isinstance(row, Mismatch):
        return row
    if len(shape) == len(row.shape) == 2 and shape[1] == row.shape[1] and shape[0] <= row.shape[0]:
        return None
    text = f"the trained rows are {_by(shape)}, the base tensor '{row.name}' is {_by(row.shape)}"
    return Mismatch(module, "shape", text)


def _by(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"


def target_set(adapter: AdapterSpec, base: BaseModel) -> TargetSet:
    """The base tensors that ``adapter`` patches; of what has no place in ``base`` (see `mismatches`) nothing."""
    names = [f"{module.name}.weight" for module in adapter.modules]
    names += [tensor.name for tensor in (*adapter.saved, *adapter.biases)]
    names += [f"{rows.name}.weight" for rows in adapter.token_rows]
    rows = (found[0] for name in names if len(found := candidates(name, base)) == 1)
    return TargetSet(tuple(sorted(set(rows))))


# ── the class ────────────────────────────────────────────────────────────────


def fit(adapter: AdapterSpec, base: BaseModel) -> Fit:
    """How ``adapter`` stands to ``base``, from the two alone: exact only where our training recorded this base."""
    if adapter.recorded_base == base.digest:
        wrong = mismatches(adapter, base)
        if not wrong:
            return Fit(FitClass.EXACT, (Reason("", "its training recorded this base"),))
    elif adapter.opaque:
        return Fit(FitClass.UNKNOWN, (Reason("", adapter.why_not_runnable or "its tensors cannot be placed"),))
    else:
        wrong = mismatches(adapter, base)
    reasons = tuple(mismatch.reason for mismatch in wrong)
    if any(mismatch.why != "quantised" for mismatch in wrong):
        return Fit(FitClass.INCOMPATIBLE, reasons)
    if wrong:
        return Fit(FitClass.UNKNOWN, reasons)
    said = Reason("", "every tensor has its place; that it was trained on these weights is not recorded")
    return Fit(FitClass.SAME_SHAPE, (said,))


def classify(
    targets: TargetSet | None,
    old: BaseModel,
    new: BaseModel,
    derivation: Derivation | None = None,
    drift: Mapping[str, float] | None = None,
) -> Fit:
    """How adapters that patch ``targets`` of ``old`` stand to ``new``.

    ``targets`` is None for adapters whose tensors cannot be placed. ``derivation`` is how ``new`` came from ``old``;
    ``drift`` is ‖W2 − W1‖/‖W1‖ by canonical name, where it was measured.
    """
    if old.digest == new.digest:
        return Fit(FitClass.EXACT)
    between = diff(old, new)
    vocabulary = _vocabulary_changed(old, new)
    about_arch = tuple(Reason(f"config {name}", f"{a!r} became {b!r}") for name, (a, b) in sorted(between.arch.items()))
    if derivation is not None and derivation.measured and derivation.kind in ("cast", "quantised"):
        error = "unknown" if derivation.error is None else f"{derivation.error:.3g}"
        said = Reason("", f"measured: {derivation.kind}, relative error {error}")
        return Fit(FitClass.DERIVED, (said, *about_arch), vocabulary, derivation.error)
    if targets is None or not targets.tensors:
        return Fit(FitClass.UNKNOWN, (Reason("", "which tensors it patches is not known"), *about_arch), vocabulary)
    wrong = tuple(_place(name, old, new) for name in targets.tensors)
    if lost := tuple(reason for reason in wrong if reason is not None):
        packed = [name for name in targets.tensors if _is_packed(name, old) or _is_packed(name, new)]
        compared = any(reason.subject not in packed for reason in lost)
        class_ = FitClass.INCOMPATIBLE if compared else FitClass.UNKNOWN
        return Fit(class_, (*lost, *about_arch), vocabulary)
    changed = [name for name in targets.tensors if old.by_name[name].digest != new.by_name[name].digest]
    if not changed:
        count = len(between.added) + len(between.removed) + len(between.changed) + len(between.reshaped)
        said = Reason("", f"all {len(targets)} patched tensors are identical; {count} others differ")
        return Fit(FitClass.TARGETS_EQUAL, (said, *about_arch), vocabulary, 0.0)
    measured = [drift[name] for name in targets.tensors if name in drift] if drift else []
    median = statistics.median(measured) if len(measured) == len(targets) else None
    said = Reason("", f"{len(changed)} of {len(targets)} patched tensors have other values; drift "
                      f"{'not measured' if median is None else f'{median:.3g}'}")  # fmt: skip
    return Fit(FitClass.SAME_SHAPE, (said, *about_arch), vocabulary, median)


def _place(name: str, old: BaseModel, new: BaseModel) -> Reason | None:
    before, after = old.by_name.get(name), new.by_name.get(name)
    if _is_packed(name, old) != _is_packed(name, new):
        return Reason(name, "one of the bases stores it quantised, so that shapes cannot be compared")
    if before is None:
        return Reason(name, "it is not in the old base")
    if after is None:
        return Reason(name, "the new base has no such tensor")
    if before.shape != after.shape:
        return Reason(name, f"{_by(before.shape)} became {_by(after.shape)}")
    return None


def _is_packed(name: str, base: BaseModel) -> bool:
    """Whether the base stores this tensor in 8 or 4 bits, under its own name or in parts beside it."""
    stored = base.by_name.get(name)
    if stored is not None:
        return stored.dtype in _PACKED
    return any(f"{name.removesuffix('.weight')}.{part}" in base.by_name for part in _PACKED_NAMES)


def _vocabulary_changed(old: BaseModel, new: BaseModel) -> bool:
    tokens = {old.tokenizer.vocabulary, new.tokenizer.vocabulary}
    if None not in tokens and len(tokens) == 2:
        return True
    families = (old.family, new.family)
    rows = [base.by_name.get(family.embedding) for base, family in zip((old, new), families, strict=True) if family]
    sizes = [row.shape[0] for row in rows if row is not None]
    return len(sizes) == 2 and sizes[0] != sizes[1]


# ── at push ──────────────────────────────────────────────────────────────────


def suggestion(fitting: Collection[str]) -> str:
    """A sentence that names the registered bases that would do, to end a refusal with; empty without any."""
    if not fitting:
        return ""
    shown = sorted(fitting)
    return f" It fits {', '.join(shown[:5])}{' and others' if len(shown) > 5 else ''}."


def fitting(adapter: AdapterSpec, bases: Mapping[str, BaseModel]) -> list[str]:
    """The labels of those ``bases`` in which everything of ``adapter`` has its place; recorded ones first."""
    labels = [label for label, base in bases.items() if not mismatches(adapter, base)]
    recorded = [label for label in labels if bases[label].digest == adapter.recorded_base]
    return recorded or labels


def require_fit(
    adapter: AdapterSpec, base: BaseModel, others: Mapping[str, BaseModel], *, path: str, name: str
) -> Fit:
    """``fit(adapter, base)``; `AdapterDoesNotFit` with the reasons, and which of ``others`` it would fit."""
    found = fit(adapter, base)
    if found.class_ is FitClass.INCOMPATIBLE:
        shown = "; ".join(str(reason) for reason in found.reasons[:5])
        more = f"; and {len(found.reasons) - 5} more" if len(found.reasons) > 5 else ""
        raise AdapterDoesNotFit(
            base=base.digest.short, reasons=f"{shown}{more}.", suggestion=suggestion(fitting(adapter, others)),
            path=path, name=name,
        )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class Binding:
    """How we know that an adapter belongs to its base, and what was overridden to say so."""

    evidence: Evidence
    overridden: str | None = None


def binding_evidence(
    adapter: AdapterSpec,
    base: Digest,
    *,
    declared: Collection[Digest] = (),
    labels: Mapping[Digest, str] | None = None,
    trust_base: bool = False,
    path: str = "DIR",
    name: str = "TEAM/NAME",
) -> Binding:
    """What ties ``adapter`` to ``base``, strongest first: recorded, then resolved, then declared.

    ``declared`` are the registered bases that the declared name and revision stand for here, ``labels`` what people
    call registered bases. `EvidenceContradicts` when the file records another base, or the declared name stands only
    for others; with ``trust_base`` that is overridden, on record.
    """
    recorded = adapter.recorded_base
    if recorded == base:
        return Binding(Evidence.RECORDED)
    called = labels or {}
    claims: tuple[Digest, ...]
    if recorded is not None:
        claims, evidence = (recorded,), "recorded in its file by the training"
    elif declared and base not in declared:
        claims, evidence = tuple(declared), f"declared as '{adapter.declared_base}'"
    else:
        return Binding(Evidence.RESOLVED if list(declared) == [base] else Evidence.DECLARED)
    claimed = " or ".join(called.get(digest, digest.short) for digest in sorted(claims))
    if trust_base:
        return Binding(Evidence.DECLARED, overridden=f"{claimed} ({evidence})")
    raise EvidenceContradicts(
        claimed=claimed,
        evidence=evidence,
        base=called.get(base, base.short),
        suggestion=suggestion([called[digest] for digest in claims if digest in called]),
        path=path,
        name=name,
    )
