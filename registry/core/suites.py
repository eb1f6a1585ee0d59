"""What a suite asks for beside its rows: its suite.json, which is the configuration of its version.

    {"metrics": ["likelihood", "chrf"], "max_new_tokens": 32, "form": "json"}
    {"lm_eval": {"tasks": [...]}}                                           see `tasks`

By default rows with choices are scored by accuracy and likelihood, others by likelihood. ``form`` is what every output
must be, whatever it says: ``json``, or ``regex:`` and an expression that matches all of it.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

from .errors import BadConfig
from .metrics import ALLOWED, LM_EVAL, Metric, check_metric, is_generated
from .tasks import Task, parse_tasks

SUITE_FILE = "suite.json"


@dataclass(frozen=True, slots=True)
class SuiteSpec:
    """``metrics`` None: by the form of each row; ``max_new_tokens``: how far an output may go."""

    metrics: tuple[Metric, ...] | None = None
    max_new_tokens: int = 64
    form: str | None = None
    tasks: tuple[Task, ...] = ()

    @classmethod
    def parse(cls, spec: dict[str, Any]) -> Self:
        """The spec of a suite; `BadConfig` says what it may hold. Whether an expression compiles, a worker says."""
        tasks = parse_tasks(spec)
        names, length, form = spec.get("metrics"), spec.get("max_new_tokens", 64), spec.get("form")
        if names is not None and not _are_metrics(names):
            raise BadConfig(path=SUITE_FILE, reason=f"metrics are {json.dumps(names)[:200]}; allowed are {ALLOWED}")
        for name in names or ():
            if name.startswith(LM_EVAL) != bool(tasks):
                belong = f"with lm_eval, all are {LM_EVAL}…" if tasks else f"{LM_EVAL}… is what its tasks measure"
                raise BadConfig(path=SUITE_FILE, reason=f"metrics are {names}; {belong}")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            reason = f"max_new_tokens is {json.dumps(length)[:200]}; it must be a whole number above 0"
            raise BadConfig(path=SUITE_FILE, reason=reason)
        if form is not None and form != "json" and not (isinstance(form, str) and form.startswith("regex:")):
            allowed = "allowed are 'json', and 'regex:' with an expression behind it"
            raise BadConfig(path=SUITE_FILE, reason=f"form is {json.dumps(form)[:200]}; {allowed}")
        return cls(None if names is None else tuple(names), length, form, tuple(tasks))

    def measured(self) -> tuple[Metric, ...]:
        """What its records may hold: what a gate can look at."""
        if self.metrics is not None:
            return self.metrics
        if self.tasks:
            return tuple(dict.fromkeys(name for task in self.tasks for name in task.metrics()))
        return metrics_of(None, choices=True)


def metrics_of(asked: tuple[Metric, ...] | None, *, choices: bool) -> tuple[Metric, ...]:
    """Which of the metrics that a suite asks for score a row, by whether it has choices; none: it does not belong."""
    if choices:
        return tuple(name for name in asked or ("accuracy", "likelihood") if not is_generated(name))
    return tuple(name for name in asked or ("likelihood",) if name != "accuracy")


def _are_metrics(names: object) -> bool:
    try:
        return isinstance(names, list) and bool(names) and all(check_metric(name) for name in names)
    except (TypeError, ValueError):
        return False
