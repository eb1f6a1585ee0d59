"""Values of options that click has no type for."""

import click

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
TIER = click.Choice(["carry", "align", "warm-start", "retrain"])
"""As in registry.core.recipes."""
