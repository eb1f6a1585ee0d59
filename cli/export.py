"""The command that writes GGUF files, for llama.cpp and the tools on it: out of folders or a registry, here."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from registry.core.errors import PathUnusable, ToolMissing
from registry.core.names import Reference

from . import config
from .adapters import fetched
from .bases import FOLDER
from .keys import pinned_keys
from .output import Output, command, fields, size
from .parameters import no_path
from .work import in_child, refuse_other_base


@command(
    None,
    "loractl export ./llama --out llama.gguf --dtype q8_0",
    "loractl export team/bot:prod --for ./llama --out bot.gguf",
    "loractl export ./bot --for ./llama --merge --out llama-bot.gguf",
)
@click.argument("source", metavar="SOURCE")
@click.option("--for", "base", type=FOLDER, metavar="DIR", help="The adapter's base: your weights, in a folder.")
@click.option("--merge", "merged", is_flag=True, help="The adapter merged into its base, as one model.")
@click.option("--out", "target", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Where to; such as bot.gguf.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16", "q8_0"]),
              help="Type of the weights; default: as stored, an adapter in fp32; q8_0 is for models.")  # fmt: skip
@click.option("--trust-base", is_flag=True, help="Even if the adapter's file records another base.")
def export(
    out: Output, source: str, base: Path | None, merged: bool, target: Path, dtype: str | None, trust_base: bool
) -> None:
    """Write a base model, an adapter or both merged as a GGUF file that llama.cpp loads.

    SOURCE is the folder of a base model or of an adapter, or an adapter in the registry. The file holds the digests
    of what it was made from, and is read back before it gets its name.
    """
    from importlib.util import find_spec

    from registry.core.adapter import CONFIG_FILE
    from registry.transfer import digested, scanned

    for library, extra in (("torch", "worker,gguf"), ("gguf", "gguf")):
        if find_spec(library) is None:
            raise ToolMissing(what="writing GGUF", extra=extra)
    folder = Path(source if Path(source).is_dir() else no_path(source))
    is_base = folder.is_dir() and not (folder / CONFIG_FILE).is_file()
    if is_base and (base or merged):
        raise click.UsageError(f"{source} is a base model: --for and --merge belong to adapters.")
    if not is_base and base is None:
        raise click.UsageError("An adapter is written for its base: --for FOLDER.")
    if target.exists():
        raise PathUnusable(path=str(target), reason="it is there already")
    if not target.absolute().parent.is_dir():
        raise PathUnusable(path=str(target), reason="its folder is not there")
    scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent)
    with scratch as name, out.progress() as bar:
        work = Path(name)
        weights = folder if base is None else base
        digest = digested(weights, progress=bar, cache=config.hashes()).digest
        origin = {"loractl.base": str(digest)}
        line = [sys.executable, "-m", "workers.export", "--base", str(weights), "--out", str(target), "--work", name]
        if not is_base:
            adapter = folder
            if not folder.is_dir():
                adapter = work / "adapter"
                reference = Reference.parse(source)
                with config.connect() as client:
                    pinned = pinned_keys(reference.series.namespace)
                    fetched(client, reference, adapter, {"base": str(digest)}, pinned, bar)
            elif not trust_base:
                refuse_other_base(adapter, digest)
            version = scanned("adapter", adapter, base=digest, progress=bar).manifest.digest
            origin["loractl.adapter"] = str(version)
            line += ["--adapter", str(adapter), *(["--merge"] if merged else [])]
        line += [f"--origin={key}={value}" for key, value in origin.items()]
        in_child([*line, *(["--dtype", dtype] if dtype else [])], work / "error.json")
        made: dict[str, Any] = json.loads((work / "result.json").read_text())
    kinds = ", ".join(f"{count} {kind}" for kind, count in made["types"].items())
    out.emit({"out": str(target), **origin, **made}, lambda: fields({
        "exported": str(target),
        "size": size(made["size"]),
        "architecture": made["architecture"],
        "tensors": f"{made['tensors']} ({kinds}); {made['checked']} of their rows were read back and compared",
        **origin,
    }))  # fmt: skip


COMMANDS: dict[str, click.Command] = {"export": export}
