"""What an item of a suite is scored by; higher is better in every metric.

likelihood   ln p(right completion | prompt) ⁄ its UTF-8 bytes: nat per byte, so that tokenizers compare
accuracy     1 when the right choice has the highest likelihood per byte, else 0

The others compare what the model writes, greedily and without the spaces at its ends, with the references: the
row's completion and what it has under "references". The best one counts, except for bleu, which counts n-grams over
all of them.

exact-match  1 when it is a reference, else 0
f1           overlap of words, as SQuAD does it: lower case, no punctuation, no English articles
bleu         of the sentence, by sacrebleu (smoothed, no longer n-grams than there are), ⁄ 100
chrf         F of character n-grams (Popović 2015), by sacrebleu, ⁄ 100
rouge-l      F of the longest common subsequence of words (Lin 2004), by rouge-score, without stemming; its words are
             made of the letters a to z and of digits: for other scripts take chrf

    custom:NAME, custom-binary:NAME

are functions (output, references) -> float that an installed package names as entry points NAME of the groups
``loractl.metrics`` and ``loractl.metrics.binary``; those of the second group return 0 or 1.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from statistics import fmean
from typing import Any

from registry.core.errors import BadConfig
from registry.core.gate import mean_interval, paired_interval
from registry.core.metrics import CUSTOM, CUSTOM_BINARY, Metric, is_binary
from registry.core.records import Record, Split

Compare = Callable[[str, Sequence[str]], float]
"""(output, references) -> score."""
GROUPS = {CUSTOM: "loractl.metrics", CUSTOM_BINARY: "loractl.metrics.binary"}
_LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge-l": "rouge-score"}


def likelihood(log_probability: float, text: str) -> float:
    """Nat per UTF-8 byte of ``text``."""
    return log_probability / len(text.encode())


def accuracy(log_probabilities: Sequence[float], texts: Sequence[str], answer: int) -> int:
    """Whether ``answer`` is the likeliest by byte; the first of equals counts."""
    return int(likeliest(log_probabilities, texts) == answer)


def likeliest(log_probabilities: Sequence[float], texts: Sequence[str]) -> int:
    """Which text is the likeliest by byte; the first of equals."""
    scores = [likelihood(value, text) for value, text in zip(log_probabilities, texts, strict=True)]
    return scores.index(max(scores))


def exact_match(output: str, references: Sequence[str]) -> int:
    """Whether the output is one of the references, spaces at their ends apart."""
    return int(output.strip() in {text.strip() for text in references})


def f1(output: str, references: Sequence[str]) -> float:
    """2PR ⁄ (P + R) over words, P of them right and R of the reference's found (Rajpurkar et al. 2016).

    Without any word on one side: 1 when there is none on the other either.
    """
    return max(_f1(_words(output), _words(text)) for text in references)


def _f1(made: Sequence[str], right: Sequence[str]) -> float:
    if not made or not right:
        return float(made == right)
    return 2 * sum((Counter(made) & Counter(right)).values()) / (len(made) + len(right))


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def bleu(output: str, references: Sequence[str]) -> float:
    """BLEU of one sentence (Papineni et al. 2002), 0 to 1."""
    import sacrebleu

    return min(1.0, float(sacrebleu.sentence_bleu(output, list(references)).score) / 100)


def chrf(output: str, references: Sequence[str]) -> float:
    """The chrF of one sentence, 0 to 1: n-grams of up to 6 characters, recall counting twice."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(output, list(references)).score) / 100


def rouge_l(output: str, references: Sequence[str]) -> float:
    """ROUGE-L's F, 0 to 1."""
    return float(_rouge().score_multi(references, output)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


_COMPARED: dict[Metric, Compare] = {
    "exact-match": exact_match, "f1": f1, "bleu": bleu, "chrf": chrf, "rouge-l": rouge_l,
}  # fmt: skip


def comparison(metric: Metric) -> Compare:
    """The function behind a metric of generated texts; `BadConfig` for a custom one that nobody brings."""
    if metric in _COMPARED:
        return _COMPARED[metric]
    function = _entry(metric).load()

    def checked(output: str, references: Sequence[str]) -> float:
        value = float(function(output, references))
        if not math.isfinite(value) or (is_binary(metric) and value not in (0, 1)):
            raise BadConfig(path="suite.json", reason=f"{metric} returned {value:g}; {_range(metric)} is allowed")
        return value

    return checked


def version_of(metric: Metric) -> str | None:
    """Package and version that a score depends on; None for what is computed here."""
    if metric in _LIBRARIES:
        return f"{_LIBRARIES[metric]} {metadata.version(_LIBRARIES[metric])}"
    if metric.startswith(tuple(GROUPS)):
        found = _entry(metric).dist
        return f"{found.name} {found.version}" if found else "unknown"
    return None


def _entry(metric: Metric) -> metadata.EntryPoint:
    prefix = CUSTOM_BINARY if metric.startswith(CUSTOM_BINARY) else CUSTOM
    found = {f"{kind}{entry.name}": entry for kind, group in GROUPS.items()
             for entry in metadata.entry_points(group=group)}  # fmt: skip
    if metric not in found:
        there = ", ".join(sorted(found)) or "none"
        reason = (
            f"no package here has the metric {metric}, an entry point '{metric.removeprefix(prefix)}' of the group "
            f"{GROUPS[prefix]}; there are: {there}"
        )
        raise BadConfig(path="suite.json", reason=reason)
    return found[metric]


def _range(metric: Metric) -> str:
    return "0 or 1" if is_binary(metric) else "any finite number"


def mean(records: Sequence[Record], metric: Metric, split: Split | None = None) -> float:
    """The mean of ``metric`` over a split, or over all; 0 items are an error."""
    return fmean(record.metrics[metric] for record in records if split in (None, record.split))


ALPHA = 0.05
"""The error of each bound of an interval where nothing is decided for good: the gate has its own."""


@dataclass(frozen=True)
class Difference:
    """How much better one candidate is than another, on the same items."""

    estimate: float
    lower: float
    upper: float

    @property
    def clearly_better(self) -> bool:
        """Whether its lower bound is above zero."""
        return self.lower > 0

    def clearly_worse(self, margin: float) -> bool:
        """Whether even its upper bound is a loss of more than ``margin``."""
        return self.upper < -margin

    def dump(self) -> list[float]:
        """Estimate and both bounds."""
        return [self.estimate, self.lower, self.upper]


def difference(
    one: Sequence[Record], other: Sequence[Record], metric: Metric, alpha: float = ALPHA, split: Split | None = None
) -> Difference:
    """One less the other on the items of a split, or all, with bounds that are each wrong with probability ``alpha``.

    Paired as in the gate; items that the metric does not apply to are left out.
    """
    sides = [
        {record.item: record.metrics[metric] for record in records
         if split in (None, record.split) and metric in record.metrics}
        for records in (one, other)
    ]  # fmt: skip
    values = [value - sides[1][item] for item, value in sides[0].items()]
    if is_binary(metric):
        bounds = paired_interval(values.count(1), values.count(-1), len(values), alpha)
    else:
        bounds = mean_interval(values, alpha)
    return Difference(math.fsum(values) / len(values), *bounds)
