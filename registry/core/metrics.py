"""The names of what an item of a suite is scored by. Higher is better in every metric.

    likelihood              ln p(right completion | prompt) ⁄ its UTF-8 bytes: nat per byte
    accuracy, exact-match   1 or 0
    f1, bleu, chrf, rouge-l between 0 and 1, of a generated text against its references
    custom:NAME             any finite number, by a function that a package of the worker's brings
    custom-binary:NAME      the same, 1 or 0
    lm-eval:NAME[,FILTER]   what a task of lm-eval gives for an item

What is right or wrong is judged by other statistics than what has a size (`gate`), and the registry judges metrics
whose code only a worker has: so the name alone says which of the two it is.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

NAMED = ("likelihood", "accuracy", "exact-match", "f1", "bleu", "chrf", "rouge-l")
GENERATED = frozenset({"exact-match", "f1", "bleu", "chrf", "rouge-l"})
"""Those of `NAMED` that look at a generated text; all custom ones do."""
CUSTOM, CUSTOM_BINARY, LM_EVAL = "custom:", "custom-binary:", "lm-eval:"
ALLOWED = f"{', '.join(NAMED)}, {CUSTOM}NAME, {CUSTOM_BINARY}NAME, {LM_EVAL}NAME"
_BINARY = frozenset({"accuracy", "exact-match"})
_LM_EVAL_BINARY = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})
_PATTERN = (
    rf"^({'|'.join(NAMED)}|custom(-binary)?:[a-z0-9]([a-z0-9._-]{{0,62}}[a-z0-9])?"
    r"|lm-eval:[A-Za-z0-9_.+-]{1,64}(,[A-Za-z0-9_.+-]{1,64})?)$"
)


def check_metric(name: str) -> str:
    """``name`` itself when it is a metric's; ValueError with what is allowed when not."""
    if not re.fullmatch(_PATTERN, name) or name.endswith("\n"):
        raise ValueError(f"'{name[:100]}' is no metric; allowed are {ALLOWED}")
    return name


Metric = Annotated[str, AfterValidator(check_metric), Field(json_schema_extra={"pattern": _PATTERN})]


def is_binary(metric: str) -> bool:
    """Whether it is 1 or 0 for every item, right or wrong."""
    called = metric.removeprefix(LM_EVAL).partition(",")[0] if metric.startswith(LM_EVAL) else None
    return metric in _BINARY or metric.startswith(CUSTOM_BINARY) or called in _LM_EVAL_BINARY


def is_share(metric: str) -> bool:
    """Whether it lies between 0 and 1, so that people read it in points of a hundred."""
    return is_binary(metric) or (metric in NAMED and metric != "likelihood")


def is_generated(metric: str) -> bool:
    """Whether it looks at a text that the model is asked to write."""
    return metric in GENERATED or metric.startswith((CUSTOM, CUSTOM_BINARY))
