"""`python -m tests.fuzz.guided TARGET CORPUS [libFuzzer's options]`: atheris changes bytes, led by what our code runs.

What was executed is seen by instrumenting our modules as they are imported, so none of them may be here before.
libFuzzer ends the process itself: how many inputs were taken is written to the file that ``TAKEN`` names as it goes.
"""

import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["registry", "cli"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run until libFuzzer has enough, or something is found."""
    target, taken, place = TARGETS[sys.argv[1]], 0, Path(os.environ["TAKEN"])

    def case(data: bytes) -> None:
        nonlocal taken
        if target.outcome(data) == "taken":
            taken += 1
            if taken & (taken - 1) == 0 or taken % 1000 == 0:
                place.write_text(str(taken))

    atheris.Setup([sys.argv[0], *sys.argv[2:]], case)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
