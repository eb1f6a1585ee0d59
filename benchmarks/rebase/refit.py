"""`python -m benchmarks.rebase.refit LEDGER.json`: the thresholds of routing, refitted from what became of upgrades.

The file is a registry's own ledger, ``loractl upgrade ledger --json > LEDGER.json``. Printed is the mean regret of a
decision, in retrainings, by the thresholds as they are and by those that would have been best. What is refitted on
these upgrades is to be tried on others before anybody believes it.
"""

import argparse
import json
from pathlib import Path

from registry.core.ledger import outcomes
from registry.core.recipes import TIERS
from registry.core.route import Refit, Thresholds, refitted


def refit(path: Path) -> Refit:
    """The refitted thresholds of one ledger."""
    return refitted(outcomes(json.loads(path.read_text())), TIERS)


def told(found: Refit) -> str:
    """Old and new thresholds side by side, and what either costs."""
    if not found.outcomes:
        return "Nothing to refit from: no upgrade in this ledger tried a tier whose retraining has a known cost."
    before, after = Thresholds().model_dump(), found.thresholds.model_dump()
    lines = [f"{name:<10} {before[name]:>8.4g} → {after[name]:.4g}" for name in before]
    of = f"retrainings a decision, over {found.outcomes} upgrades"
    lines.append(f"{'regret':<10} {found.before:>8.4g} → {found.after:.4g}   {of}")
    return "\n".join(lines)


def main() -> None:
    """Refit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path, metavar="LEDGER.json")
    print(told(refit(parser.parse_args().ledger)))


if __name__ == "__main__":
    main()
