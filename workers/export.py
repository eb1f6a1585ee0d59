"""Write one GGUF file out of local folders, without a registry or a network.

    python -m workers.export --base DIR [--adapter DIR [--merge]] --out FILE --work DIR [--dtype T] [--origin KEY=TEXT]

A base alone is written as a model, with an adapter the adapter is, with ``--merge`` the model of both. To ``--work``
go result.json, or error.json with the refusal and exit status 1, and what is merged on the way.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `workers.run`

from registry.core.errors import LoractlError

from .compute.export import TYPES, Exported, export_adapter, export_model
from .compute.finetune import Report
from .compute.merge import OUT_TYPES, Form, merge
from .compute.rebase.normalise import normalised
from .compute.weights import write_file


def export(
    base: Path, adapter: Path | None, out: Path, work: Path, report: Report, *,
    merged: bool = False, dtype: str | None = None, origin: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    """Write ``out`` as a model or an adapter; a merge goes through a folder in ``work``, in the type asked for."""
    if adapter is None:
        return export_model(base, out, dtype, report, origin)
    if not merged:
        return export_adapter(base, normalised(adapter, base), out, dtype, report, origin)
    between = dtype if dtype in OUT_TYPES else None
    merge(base, normalised(adapter, base), work / "merged", report, Form(between, digests=False, durable=False))
    return export_model(work / "merged", out, dtype, report, origin)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, write once, and say how it ended: 0, 1 refused, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(prog="python -m workers.export", description="Write one GGUF file.")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR")
    parser.add_argument("--adapter", type=Path, metavar="DIR")
    parser.add_argument("--merge", action="store_true", help="the model of both, not the adapter")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where result.json or error.json goes")
    parser.add_argument("--dtype", choices=list(TYPES))
    parser.add_argument("--origin", action="append", default=[], metavar="KEY=TEXT", help="goes into the file")
    args = parser.parse_args(argv)

    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    def report(_: dict[str, Any]) -> None:
        if stopped:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    origin = dict(text.split("=", 1) for text in args.origin)
    try:
        made = export(args.base, args.adapter, args.out, args.work, report,
                      merged=args.merge, dtype=args.dtype, origin=origin)  # fmt: skip
        write_file(args.work / "result.json", json.dumps(asdict(made), indent=2, sort_keys=True).encode() + b"\n")
    except KeyboardInterrupt:
        return 130
    except LoractlError as error:
        write_file(args.work / "error.json", json.dumps(error.problem(), indent=2, default=str).encode() + b"\n")
        sys.stderr.write(f"{error.message}\n{error.hint}".strip() + "\n")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
