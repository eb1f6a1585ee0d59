"""Values of options that click has no type for."""

import re
from pathlib import Path

import click

from registry.core.errors import PathUnusable

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

METRICS = "likelihood, accuracy, exact-match, f1, bleu, chrf, rouge-l, custom:NAME, custom-binary:NAME, lm-eval:NAME"
"""As in registry.core.metrics, which is not imported before it is needed (tests/cli/test_commands.py)."""


class MetricName(click.ParamType[str]):
    """The name of a metric, as the registry spells it."""

    name = "metric"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself; a usage error with what is allowed."""
        from registry.core.metrics import check_metric

        try:
            return check_metric(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


METRIC = MetricName()
TIER = click.Choice(["carry", "align", "transport", "warm-start", "distil", "retrain"])
"""As in registry.core.recipes."""

_SIZE = re.compile(r"(?P<count>\d+(\.\d+)?)\s*(?P<unit>[kKMGT]?)(?P<binary>i?)B?")


def bytes_of(text: str) -> int:
    """``5GB``, ``500MB`` (powers of 1000) or ``2GiB`` (of 1024) as a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.UsageError(f"'{text}' is not a size such as 500MB, 5GB or 2GiB.")
    power = ("", "K", "M", "G", "T").index(match["unit"].upper())
    return int(float(match["count"]) * (1024 if match["binary"] else 1000) ** power)


def no_path(text: str) -> str:
    """``text`` itself, which is no folder; `PathUnusable` when it was meant to be one, and is not there."""
    if text.startswith((".", "/", "~")):
        raise PathUnusable(path=text, reason="there is no such folder")
    return text
