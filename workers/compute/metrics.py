"""What an item of a suite is scored by; higher is better in every metric.

likelihood   ln p(right completion | prompt) ⁄ its UTF-8 bytes: nat per byte, so that tokenizers compare
accuracy     1 when the right choice has the highest likelihood per byte, else 0
exact-match  1 when the greedy continuation is the completion, spaces at its ends apart, else 0
"""

from collections.abc import Sequence
from statistics import fmean

from registry.core.recipes import Metric
from registry.core.records import Record, Split


def likelihood(log_probability: float, text: str) -> float:
    """Nat per UTF-8 byte of ``text``."""
    return log_probability / len(text.encode())


def accuracy(log_probabilities: Sequence[float], texts: Sequence[str], answer: int) -> int:
    """Whether ``answer`` is the likeliest by byte; the first of equals counts."""
    scores = [likelihood(value, text) for value, text in zip(log_probabilities, texts, strict=True)]
    return int(scores.index(max(scores)) == answer)


def exact_match(output: str, text: str) -> int:
    """Whether the two are equal, spaces at their ends apart."""
    return int(output.strip() == text.strip())


def mean(records: Sequence[Record], metric: Metric, split: Split | None = None) -> float:
    """The mean of ``metric`` over a split, or over all; 0 items are an error."""
    return fmean(record.metrics[metric] for record in records if split in (None, record.split))
