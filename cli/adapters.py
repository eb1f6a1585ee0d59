"""Commands about adapters: push, pull, list, show, log, diff, aliases and policies."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import (
    BadReference,
    BadRequest,
    BaseNotFound,
    PolicyNotFound,
    VersionNotFound,
)
from registry.core.names import Reference, SeriesName

from . import bases, config
from .bases import FOLDER
from .keys import pinned_keys, private_key
from .output import Bar, Output, ago, command, fields, number, short, size, table, tree
from .parameters import FILE, METRIC, METRICS, TIER

if TYPE_CHECKING:
    from rich.tree import Tree

    from registry.client import RegistryClient
    from registry.core.manifest import Manifest
    from registry.core.policy import Gate
    from registry.schemas import (
        AdapterInfo,
        AliasInfo,
        CompatibleAdapter,
        Download,
        LineageInfo,
        LogInfo,
        PolicyInfo,
        Provenance,
        Resolution,
        VersionInfo,
    )
    from registry.trust import Checked, Keys

FITS = ["exact", "derived", "targets-equal", "same-shape", "incompatible", "unknown"]
ENGINES = ["vllm", "sglang", "lorax", "peft", "llama.cpp"]


@click.group("alias", short_help="Aliases of an adapter: set, list.")
def alias() -> None:
    """Movable pointers to versions, kept per base."""


@click.group("policy", short_help="What gates an adapter, and what an upgrade does: show, set.")
def policy() -> None:
    """What must hold before an alias moves, and what is done when the base changes."""


# ── push and pull ────────────────────────────────────────────────────────────


@command(
    None,
    "loractl push ./out team/bot --base ./llama",
    "loractl push ./out team/bot --base llama@r2 --alias prod -m 'more data'",
    "loractl push ./out team/bot --base ./llama --sign signing-key.pem",
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("ref", metavar="REF")
@click.option("--base", "base_text", required=True, metavar="BASE", help="A local folder, line@rev, line, or a digest.")
@click.option("--alias", "aliases", multiple=True, metavar="A", help="An alias to point at the new version.")
@click.option("-m", "--message", default="", metavar="TEXT", help="What is new in it.")
@click.option("--task", metavar="TEXT", help="What it is for, to be found by.")
@click.option("--trust-base", is_flag=True, help="Believe --base against contradicting evidence; on record.")
@click.option("--allow-zero", is_flag=True, help="Take a fresh adapter whose update is zero.")
@click.option("--sign", "key_file", metavar="KEY", type=FILE, help="Sign it with this private key, before it is sent.")
def push(
    out: Output,
    folder: Path,
    ref: str,
    base_text: str,
    aliases: tuple[str, ...],
    message: str,
    task: str | None,
    trust_base: bool,
    allow_zero: bool,
    key_file: Path | None,
) -> None:
    """Push the adapter in DIR as a new version of REF, bound to BASE by content."""
    from registry.schemas import Wishes
    from registry.transfer import push_adapter

    name = Reference.parse(ref)
    if name.exact:
        raise BadReference(
            value=ref, what="an adapter to push to", rule="versions are numbered by the registry",
            examples="team/bot  team/bot:prod",
        )  # fmt: skip
    wishes = Wishes(
        aliases=[*([name.alias] if name.alias else []), *aliases],
        message=message,
        task=task,
        trust_base=trust_base,
        allow_zero=allow_zero,
    )
    sign = None
    if key_file is not None:
        key, series = private_key(key_file), str(name.series)

        def sign(manifest: "Manifest") -> dict[str, Any]:
            return key.sign(series, manifest).document()

    with config.connect() as client, out.progress() as bar, out.if_interrupted(
        "Nothing is lost: repeat the command, and it resumes behind the parts that arrived."
    ):
        base = bases.wanted(base_text, bar)
        digest = base.digest(client)

        def send() -> Any:
            return push_adapter(
                client, folder, str(name.series), digest, wishes, sign=sign, progress=bar, cache=config.hashes()
            )

        try:
            info = send()
        except BaseNotFound:
            if base.model is None:
                raise
            bases.register(client, base.model)
            info = send()
    out.emit(info, lambda: bases.pushed_lines(info))


@command(
    None,
    "loractl pull team/bot:prod --for ./llama",
    "loractl pull team/bot@v7 --out ./bot",
    "loractl pull team/bot:prod --for llama@r2 --fit same-shape",
    "loractl pull team/bot:prod --for ./llama --key release.pub",
)
@click.argument("ref", metavar="REF")
@click.option("--for", "base_text", metavar="BASE", help="Your weights: a local folder, line@rev, line, or a digest.")
@click.option("--out", "target", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where to; default: ./NAME")  # fmt: skip
@click.option("--fit", type=click.Choice(FITS[:4]), multiple=True, help="Accept this class; default: exact, derived.")
@click.option("--engine", type=click.Choice(ENGINES), help="Refuse what this engine cannot load.")
@click.option("--key", "key_files", multiple=True, metavar="PUB", type=FILE,
              help="Refuse what none of these public keys signed; default: those of loractl key pin.")  # fmt: skip
@click.option("--unverified", is_flag=True, help="Look at no signature, although keys are pinned or one is required.")
@click.option("--force", is_flag=True, help="Replace files in DIR that no pull wrote.")
def pull(
    out: Output,
    ref: str,
    base_text: str | None,
    target: Path | None,
    fit: tuple[str, ...],
    engine: str | None,
    key_files: tuple[Path, ...],
    unverified: bool,
    force: bool,
) -> None:
    """Fetch the one version of REF that belongs to your weights, verified byte by byte.

    What an earlier pull wrote into DIR is replaced, other files are not, unless you say --force.

    Signatures are verified by the keys that are pinned here, else by the living keys of the namespace, and kept in
    DIR/.loractl with the manifest.
    """
    from registry import pulled, trust

    if unverified and key_files:
        raise click.UsageError("--key and --unverified exclude each other.")
    name = Reference.parse(ref)
    pinned = pinned_keys(name.series.namespace, key_files)
    target = target or Path(name.series.name)
    with config.connect() as client, out.progress() as bar, out.if_interrupted(
        f"What arrived lies in {target / '.partial'} and is used when you repeat the command; no file has its name"
        " before it was verified."
    ):
        base = bases.wanted(base_text, bar).ref if base_text else None
        wanted = {"base": base, "engine": engine, "fit": ",".join(fit) or None}
        keys = None if unverified else pinned
        found, checked, written = fetched(client, name, target, wanted, keys, bar, keep=True, force=force)
        trust.keep_beside(target, checked)
        pulled.end(target, found.files, (found.version.base, found.base))
    counting = checked.counting if checked is not None else []
    signed = [{"key": one.key, "name": one.name, "pinned": one.key in pinned} for one in counting]
    document = {
        "ref": found.version.ref,
        "digest": found.version.digest,
        "base": found.base,
        "base_assumed": found.base_assumed,
        "fit": found.fit,
        "status": found.version.status,
        "signatures": signed,
        "out": str(target),
        "files": [str(target / file.path) for file in found.files],
        "fetched": [str(path) for path in written],
    }
    if found.version.status == "yanked":
        out.say(f"Warning: {found.version.ref} is yanked: {found.version.status_reason or 'no reason was given'}")
    assumed = " (the newest revision of its line; name yours with --for)" if found.base_assumed else ""
    out.emit(document, lambda: fields({
        "pulled": found.version.ref,
        "digest": short(found.version.digest),
        "base": f"{found.version.base_ref} {short(found.base)}{assumed}",
        "fit": found.fit.fit,
        "signed": ", ".join(f"{one['name']} {short(str(one['key']))}" for one in signed),
        "out": f"{target} ({len(written)} of {len(found.files)} files were fetched, all are verified)",
    }))  # fmt: skip


def fetched(
    client: "RegistryClient",
    name: Reference,
    target: Path,
    wanted: Mapping[str, str | None],
    pinned: "Keys | None",
    bar: Bar,
    *,
    keep: bool = False,
    force: bool = False,
) -> "tuple[Resolution, Checked | None, list[Path]]":
    """Resolve ``name`` by what is ``wanted``, verify its signatures by ``pinned``, and fetch it; None: look at none.

    What was found, how its signatures were judged (None: there are none to look at), and the files that came.
    ``keep``: the folder is somebody's, whose files are replaced by ``force`` alone.
    """
    from registry import pulled, trust
    from registry.transfer import fetch

    def resolve() -> "Resolution":
        return client.resolve(str(name), **wanted)

    def again() -> "Sequence[Download]":
        return client.downloads([found.manifest]).files[found.manifest]  # the alias may point elsewhere by now

    found, checked = resolve(), None
    if pinned is not None and (pinned or found.signature_required or found.version.signed_by):
        checked = trust.check(client, str(name.series), found.manifest, found.version.ref, pinned)
        checked.require()
        checked.require_files(found.files)
        checked.require_asked(name, found.base, wanted.get("base"), found.fit.fit, by_name=bool(wanted.get("fit")))
    if keep and not force:
        pulled.require_ours(target, found.files)
    if keep:
        pulled.begin(target, found.files)
    return found, checked, fetch(found.files, target, refresh=again, progress=bar)


# ── looking ──────────────────────────────────────────────────────────────────


@command(
    None,
    "loractl list",
    "loractl list --fits llama@r2 --class exact --class derived --engine vllm",
    "loractl list --namespace team --json",
    name="list",
)
@click.argument("text", required=False)
@click.option("--fits", "base_text", metavar="BASE", help="Only adapters that stand to this base as --class says.")
@click.option("--class", "classes", type=click.Choice(FITS), multiple=True, help="Default: exact, derived.")
@click.option("--engine", type=click.Choice(ENGINES), help="Only what this engine can load.")
@click.option("--alias", "alias_name", metavar="A", help="Only versions that this alias points at.")
@click.option("--max-rank", type=click.IntRange(1), help="Only ranks up to this.")
@click.option("--namespace", help="Only this namespace.")
@click.option("--task", help="Only this task.")
def list_adapters(
    out: Output,
    text: str | None,
    base_text: str | None,
    classes: tuple[str, ...],
    engine: str | None,
    alias_name: str | None,
    max_rank: int | None,
    namespace: str | None,
    task: str | None,
) -> None:
    """List adapters, those whose name holds TEXT, or those that fit a base."""
    from registry.client import every

    if base_text is None:
        if classes or engine or alias_name or max_rank:
            raise click.UsageError("--class, --engine, --alias and --max-rank need --fits BASE.")
        with config.connect() as client:
            found = list(every(lambda cursor: client.adapters(q=text, namespace=namespace, task=task, cursor=cursor)))
        chosen = any((text, namespace, task))
        out.emit(found, lambda: _adapters(found, chosen=chosen))
        return
    with config.connect() as client, out.progress() as bar:
        base = bases.wanted(base_text, bar).ref
        fitting = list(every(lambda cursor: client.compatible(
            base, fit=classes or None, engine=engine, alias=alias_name, max_rank=max_rank, namespace=namespace,
            task=task, cursor=cursor,
        )))  # fmt: skip
    fitting = [item for item in fitting if text is None or text in item.version.ref]
    out.emit(fitting, lambda: _fitting(fitting))


def _adapters(found: Iterable["AdapterInfo"], *, chosen: bool) -> None:
    def row(info: "AdapterInfo") -> list[object]:
        newest = info.latest
        pointing = ", ".join(f"{a.alias}→v{a.version} ({a.base_ref})" for a in info.aliases)
        if newest is None:
            return [info.name, "", "", "", pointing, info.task, ""]
        rank, at = newest.rank, ago(newest.created_at)
        return [info.name, f"v{newest.version}", newest.base_ref, rank, pointing, info.task, at]

    table(["adapter", "newest", "base", "rank", "aliases", "task", "pushed"], map(row, found),
          empty="No adapter is like that. All of them: loractl list" if chosen
          else "No adapters. Push one: loractl push DIR team/name --base BASE")  # fmt: skip


def _fitting(found: Iterable["CompatibleAdapter"]) -> None:
    table(
        ["version", "fit", "base", "evidence", "rank", "aliases", "engines"],
        (
            [item.version.ref, item.fit.fit, item.version.base_ref, item.version.evidence, item.version.rank,
             ", ".join(item.version.aliases),
             ", ".join(name for name, verdict in item.version.engines.items() if verdict == "yes")]
            for item in found
        ),
        empty="No adapter stands to this base like that. Others: --class targets-equal --class same-shape",
    )  # fmt: skip


@command(None, "loractl show team/bot", "loractl show team/bot@v7 --json")
@click.argument("ref", metavar="REF")
def show(out: Output, ref: str) -> None:
    """Show an adapter, or one version of it."""
    from registry.client import every

    name = Reference.parse(ref)
    series = str(name.series)
    with config.connect() as client:
        if name.exact or name.alias:
            version = version_of(client, name)
            scores = client.evaluations(series).items
            version = version.model_copy(
                update={"evaluations": [score for score in scores if score.version == version.ref]}
            )
            lineage = client.lineage(series, f"v{version.version}")
            made = next((node.provenance for node in lineage.nodes if node.digest == lineage.root), None)
            out.emit({**version.model_dump(mode="json"), "provenance": made}, lambda: _version(version, made))
            return
        info = client.adapter(series)
        versions = list(every(lambda cursor: client.versions(series, cursor=cursor)))
    document = {**info.model_dump(mode="json"), "versions": versions}
    out.emit(document, lambda: _adapter(info, versions))


def _adapter(info: "AdapterInfo", versions: Iterable["VersionInfo"]) -> None:
    fields({"adapter": info.name, "task": info.task, "since": ago(info.created_at)})
    click.echo()
    table(
        ["version", "base", "evidence", "rank", "size", "aliases", "pushed", "message"],
        ([f"v{v.version}", v.base_ref, v.evidence, v.rank, size(v.size), ", ".join(v.aliases), ago(v.created_at),
          v.message if v.status == "live" else f"{v.status}: {v.status_reason}"] for v in versions),
    )  # fmt: skip
    if info.aliases:
        click.echo()
        _alias_table(info.aliases)


def _version(version: "VersionInfo", made: "Provenance | None") -> None:
    fields({
        "version": version.ref,
        "standing": version.status + (f": {version.status_reason}" if version.status_reason else ""),
        "digest": version.digest,
        "base": f"{version.base_ref} {version.base}",
        "evidence": version.evidence,
        "kind": version.peft_type + ("" if version.runnable else " (not runnable here)"),
        "rank": str(version.rank),
        "targets": ", ".join(version.targets),
        "size": size(version.size),
        "aliases": ", ".join(version.aliases),
        "message": version.message,
        "job": version.job,
        "pushed": f"{ago(version.created_at)} by {made.by if made else version.created_by}",
        "made": _made(made) if made else "",
        "recipe": made.recipe if made else "",
        "data": ", ".join(short(data) for data in made.datasets) if made else "",
        "with": ", ".join(f"{name} {release}" for name, release in made.versions.items()) if made else "",
        "recorded": ", ".join(f"{name} {short(text)}" for name, text in made.recorded.items()) if made else "",
        "signed": ", ".join(version.signed_by),
    })  # fmt: skip
    for engine, verdict in version.engines.items():
        click.echo(f"{engine:<10} {verdict}")
    if version.evaluations:
        click.echo()
        table(
            ["suite", "base", "metric", "split", "mean", "n", "at"],
            ([score.suite, short(score.base), metric, split, number(mean["mean"]), f"{mean['n']:.0f}",
              ago(score.created_at)]
             for score in version.evaluations
             for metric, splits in score.summary.items()
             for split, mean in splits.items()),
        )  # fmt: skip


def _made(made: "Provenance") -> str:
    """Where a version was made, in words."""
    if made.job is None:
        return "by a person: what its lineage says is their word"
    on = f" on {made.device}" if made.device else ""
    return f"by {made.kind} {made.job}, attempt {made.attempt}, worker {made.worker}{on}"


@command(None, "loractl log team/bot", "loractl log team/bot@v7 --json")
@click.argument("ref", metavar="REF")
def log(out: Output, ref: str) -> None:
    """Show who did what to an adapter, and where its versions came from."""
    name = Reference.parse(ref)
    with config.connect() as client:
        series = str(name.series)
        history = client.log(series)
        while history.cursor is not None:
            more = client.log(series, cursor=history.cursor)
            history = more.model_copy(update={"entries": history.entries + more.entries})
        version = version_of(client, name)
        lineage = client.lineage(series, f"v{version.version}")
    out.emit({"log": history, "lineage": lineage}, lambda: _log(history, lineage))


def _log(history: "LogInfo", lineage: "LineageInfo") -> None:
    table(
        ["at", "who", "what", "detail"],
        ([f"{entry.at:%Y-%m-%d %H:%M}", entry.actor, entry.event, entry.detail] for entry in history.entries),
    )
    click.echo("\nLineage")
    tree(lineage_tree(lineage))


def lineage_tree(lineage: "LineageInfo") -> "Tree":
    """What a version was made from, parents below their children."""
    from rich.tree import Tree

    nodes = {node.digest: node for node in lineage.nodes}
    parents: dict[str, list[tuple[str, str]]] = {}
    for child, parent, relation in lineage.edges:
        parents.setdefault(child, []).append((parent, relation))

    def words(digest: str, relation: str) -> str:
        node = nodes.get(digest)
        if node is None:
            return f"{relation} {short(digest)}".strip()
        recipe = (node.recipe or {}).get("kind") or ""
        tier = (node.recipe or {}).get("tier") or ""
        made = f"  by {recipe}{f' ({tier})' if tier else ''}" if recipe else ""
        base = f"  on {short(node.base)}" if node.base else ""
        how = node.provenance
        who = f"  {f'worker {how.worker}' if how.job else f'pushed by {how.by}'}" if how else ""
        return f"{relation + ': ' if relation else ''}{node.ref or short(digest)}{base}{made}{who}"

    def grow(branch: "Tree", digest: str, above: frozenset[str]) -> None:
        for parent, relation in parents.get(digest, []):
            twig = branch.add(words(parent, relation))
            if parent not in above:
                grow(twig, parent, above | {parent})

    root = Tree(words(lineage.root, ""))
    grow(root, lineage.root, frozenset({lineage.root}))
    return root


@command(None, "loractl diff team/bot@v1 team/bot@v2", "loractl diff team/bot:prod team/bot@v7")
@click.argument("a", metavar="REF")
@click.argument("b", metavar="REF")
def diff(out: Output, a: str, b: str) -> None:
    """Compare two versions: base, configuration, files and scores."""
    with config.connect() as client:
        left, right = (_facts(client, Reference.parse(text)) for text in (a, b))
    differing = {
        name: [left.get(name), right.get(name)]
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    }
    out.emit({"a": left["ref"], "b": right["ref"], "differing": differing}, lambda: table(
        ["", left["ref"], right["ref"]],
        ([name, *pair] for name, pair in differing.items() if name != "ref"),
        empty="They are the same version.",
    ))  # fmt: skip


def _facts(client: "RegistryClient", name: Reference) -> dict[str, Any]:
    """What a version is, flat."""
    version = version_of(client, name)
    manifest = json.loads(client.manifest(str(name.series), f"v{version.version}"))
    flat: dict[str, Any] = {
        "ref": version.ref,
        "base": f"{version.base_ref} {short(version.base)}",
        "evidence": version.evidence,
        "rank": version.rank,
        "targets": ", ".join(version.targets),
        "message": version.message,
        "aliases": ", ".join(version.aliases),
    }
    flat |= {f"config {key}": json.dumps(value) for key, value in manifest.get("config", {}).items()}
    flat |= {f"file {entry['path']}": f"{entry['size']} bytes, {short(entry['digest'])}" for entry in manifest["files"]}
    for score in client.evaluations(str(name.series)).items:
        if score.version == version.ref:
            for metric, splits in score.summary.items():
                flat |= {f"{score.suite} {metric} {split}": number(mean["mean"]) for split, mean in splits.items()}
    return flat


def version_of(client: "RegistryClient", name: Reference, base: str | None = None) -> "VersionInfo":
    """The version that a reference means: named, aliased (on ``base``, else the newest of its line), or the newest."""
    series = str(name.series)
    if name.alias:
        return client.resolve(str(name), base=base).version
    if name.exact:
        return client.version(series, name.exact)
    newest = client.adapter(series).latest
    if newest is None:
        raise VersionNotFound(ref=series, name=series, nearest="")
    return newest


# ── aliases ──────────────────────────────────────────────────────────────────


@command(
    alias,
    "loractl alias set team/bot@v7 staging",
    "loractl alias set team/bot@v7 prod --generation 3",
    "loractl alias set team/bot@v7 prod --force -m 'incident 12'",
    name="set",
)
@click.argument("ref", metavar="REF")
@click.argument("alias_name", metavar="ALIAS")
@click.option("--generation", type=click.IntRange(0), help="Move it only from this generation; 0: it must be new.")
@click.option("--force", is_flag=True, help="Without a passing gate: needs the scope admin, and is on record.")
@click.option("-m", "--message", default="", metavar="TEXT", help="Why.")
def alias_set(out: Output, ref: str, alias_name: str, generation: int | None, force: bool, message: str) -> None:
    """Point ALIAS at a version, on the base of that version."""
    _move(out, ref, alias_name, generation, message, force=force)


@command(None, "loractl promote team/bot@v7 prod", "loractl promote team/bot:staging prod -m 'passed review'")
@click.argument("ref", metavar="REF")
@click.argument("alias_name", metavar="ALIAS")
@click.option("-m", "--message", default="", metavar="TEXT", help="Why.")
def promote(out: Output, ref: str, alias_name: str, message: str) -> None:
    """Point a gated ALIAS at a version that passed its gate, unless it moves meanwhile.

    Exits with 4 when the gate has not passed, and says which criterion decided.
    """
    with config.connect() as client:
        name = Reference.parse(ref)
        version = version_of(client, name)
        known = client.aliases(str(name.series))
    generation = next((a.generation for a in known if (a.alias, a.base) == (alias_name, version.base)), 0)
    _move(out, f"{name.series}@v{version.version}", alias_name, generation, message, force=False)


def _move(out: Output, ref: str, alias_name: str, generation: int | None, message: str, *, force: bool) -> None:
    from registry.schemas import AliasRequest

    name = Reference.parse(ref)
    with config.connect() as client:
        version = version_of(client, name)
        request = AliasRequest(version=f"v{version.version}", reason=message, force=force)
        info = client.move_alias(str(name.series), alias_name, request, generation=generation)
    out.emit(info, lambda: _alias_line(str(name.series), info))


@command(alias, "loractl alias list team/bot", name="list")
@click.argument("name", metavar="NAME")
def alias_list(out: Output, name: str) -> None:
    """List the aliases of an adapter on every base."""
    with config.connect() as client:
        found = client.aliases(str(SeriesName.parse(name)))
    out.emit(found, lambda: _alias_table(found))


@command(None, "loractl rollback team/bot prod", "loractl rollback team/bot prod --for llama@r2 -m 'worse on names'")
@click.argument("name", metavar="NAME")
@click.argument("alias_name", metavar="ALIAS")
@click.option("--for", "base_text", metavar="BASE", help="On which base; default: the newest of its line.")
@click.option("-m", "--message", default="", metavar="TEXT", help="Why.")
def rollback(out: Output, name: str, alias_name: str, base_text: str | None, message: str) -> None:
    """Point ALIAS at what it pointed at before."""
    from registry.schemas import RollbackRequest

    series = SeriesName.parse(name)
    with config.connect() as client, out.progress() as bar:
        base = bases.wanted(base_text, bar).ref if base_text else None
        info = client.roll_back(str(series), alias_name, RollbackRequest(base=base, reason=message))
    out.emit(info, lambda: _alias_line(str(series), info))


def _alias_line(series: str, info: "AliasInfo") -> None:
    click.echo(f"{series}:{info.alias} on {info.base_ref} is now v{info.version} (generation {info.generation})")


def _alias_table(found: Iterable["AliasInfo"]) -> None:
    table(
        ["alias", "base", "version", "generation", "moved", "by", "why"],
        ([a.alias, a.base_ref, f"v{a.version}", a.generation, ago(a.moved_at), a.actor, a.reason] for a in found),
        empty="No aliases. Set one: loractl alias set REF ALIAS",
    )


# ── policies ─────────────────────────────────────────────────────────────────


@command(policy, "loractl policy show team/bot", "loractl policy show team --json", name="show")
@click.argument("name", metavar="NAME")
def policy_show(out: Output, name: str) -> None:
    """Show the policy of an adapter (team/bot), or the default of a namespace (team)."""
    with config.connect() as client:
        info = client.policy(name)
    out.emit(info, lambda: _policy(info))


@command(
    policy,
    "loractl policy set team --suite team/reviews-test --metric likelihood --margin 2%gain",
    "loractl policy set team/bot --action ask --recipe recipe.toml",
    name="set",
)
@click.argument("name", metavar="NAME")
@click.option("--suite", metavar="S", help="The suite that gates it; with --metric and --margin.")
@click.option("--metric", type=METRIC, metavar="METRIC", help=f"What is read from the suite: {METRICS}.")
@click.option("--margin", metavar="E", help="How much worse it may be: 0.01, or 2%gain of the gain over the bare base.")
@click.option("--also", is_flag=True, help="Add this gate to the others in place of replacing them.")
@click.option("--guard", metavar="S", help="A general suite that must not get worse by more than the margin.")
@click.option("--action", type=click.Choice(["auto", "ask", "frozen"]), help="What an upgrade may do by itself.")
@click.option("--recipe", metavar="R", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A RECIPE.toml to retrain by, for adapters made outside.")  # fmt: skip
@click.option("--alias", "aliases", multiple=True, metavar="A", help="The gated aliases; default: prod.")
@click.option("--tier", "tiers", multiple=True, type=TIER,
              help="The tiers that an upgrade may try, in this order.")  # fmt: skip
@click.option("--warm-steps", type=click.IntRange(1),
              help="Steps of a warm start; by default a twentieth of the training, from 20 to 60.")  # fmt: skip
@click.option("--budget", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help="Device seconds that one upgrade may spend.")  # fmt: skip
@click.option("--evidence", type=click.Choice(["recorded", "resolved", "behavioural", "declared"]),
              help="The weakest binding that a gated alias accepts.")  # fmt: skip
@click.option("--max-flips", type=click.FloatRange(0, 1), help="Share of answers that may turn wrong.")
@click.option("--retained", metavar="D", help="A dataset with inputs kept for label-free repair.")
@click.option("--pool", metavar="D",
              help="A dataset of unlabelled inputs to decide what the suite cannot tell; 'none': no more.")  # fmt: skip
def policy_set(
    out: Output,
    name: str,
    suite: str | None,
    metric: str | None,
    margin: str | None,
    also: bool,
    guard: str | None,
    action: str | None,
    recipe: Path | None,
    aliases: tuple[str, ...],
    tiers: tuple[str, ...],
    warm_steps: int | None,
    budget: float | None,
    evidence: str | None,
    max_flips: float | None,
    retained: str | None,
    pool: str | None,
) -> None:
    """Set the policy of an adapter (team/bot), or the default of a namespace (team).

    What is not named stays as it is, or as the namespace has it.
    """
    from registry.core.policy import Policy

    from .work import load_recipe

    if suite is None and (metric or margin) and guard is None:
        raise click.UsageError("--metric and --margin belong to --suite or --guard.")
    with config.connect() as client:
        try:
            before = client.policy(name).policy
        except PolicyNotFound:
            before = Policy()
        changes: dict[str, Any] = {
            "action": action,
            "aliases": aliases or None,
            "tiers": tiers or None,
            "warm_steps": warm_steps,
            "budget_seconds": budget,
            "evidence": evidence,
            "max_negative_flips": max_flips,
            "retained": retained,
            "pool": pool,
        }
        if suite:
            gate = make_gate(suite, metric, margin)
            changes["gates"] = (*before.gates, gate) if also else (gate,)
        if guard:
            changes["guard"] = make_gate(guard, metric, margin)
        if recipe:
            changes["recipe"] = json.dumps(resolved_recipe(client, load_recipe(recipe).recipe))
        changed = {key: value for key, value in changes.items() if value is not None}
        if pool == "none":
            changed["pool"] = None
        info = client.set_policy(name, Policy.model_validate(before.model_dump() | changed))
    out.emit(info, lambda: _policy(info))


def make_gate(suite: str, metric: str | None, margin: str | None) -> "Gate":
    """A gate from its parts; the margin as ``0.01`` or ``2%gain``."""
    from registry.core.policy import Gate, Margin

    if metric is None:
        raise click.UsageError(f"The gate on {suite} needs --metric.")
    text = margin or ("2%gain" if metric == "likelihood" else "0.01")
    try:
        of_gain = text.endswith("%gain")
        parsed = Margin(value=float(text.removesuffix("%gain")) / (100 if of_gain else 1), of_gain=of_gain)
    except ValueError as error:
        raise click.UsageError(f"--margin {text}: expected a number such as 0.01, or 2%gain.") from error
    Reference.parse(suite, "suite")
    return Gate.model_validate({"suite": suite, "metric": metric, "margin": parsed})


def resolved_recipe(client: "RegistryClient", recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose references to base and datasets became digests."""
    from registry.core.recipes import parse_recipe

    if "base" not in recipe or "datasets" not in recipe:
        raise BadRequest(problems="the recipe needs 'base' and 'datasets'")
    datasets = [
        text if text.startswith("sha256:") else client.dataset("dataset", text).digest
        for text in recipe["datasets"]
    ]
    base = str(recipe["base"])
    digests = {"base": bases.Wanted(base).digest(client), "datasets": datasets}
    return parse_recipe({**recipe, **digests}).model_dump(mode="json")


def _policy(info: "PolicyInfo") -> None:
    found = info.policy
    fields({
        "policy": f"{info.name} revision {info.revision}" + (" (the namespace's default)" if info.inherited else ""),
        "gates": "; ".join(f"{g.suite} {g.metric} margin {g.margin}" for g in found.gates) or "none: upgrades freeze",
        "guard": f"{found.guard.suite} {found.guard.metric} margin {found.guard.margin}" if found.guard else None,
        "aliases": ", ".join(found.aliases),
        "action": found.action,
        "tiers": ", ".join(found.tiers) + f" (warm start: {found.warm_steps or '20 to 60'} steps)",
        "budget": f"{found.budget_seconds:g} s" if found.budget_seconds else None,
        "evidence": found.evidence,
        "flips": f"at most {found.max_negative_flips:.0%} may turn wrong",
        "recipe": found.recipe,
        "retained": found.retained,
        "pool": found.pool,
    })  # fmt: skip
    for note in info.notes:
        click.echo(f"note     {note}")


COMMANDS: dict[str, click.Command] = {
    "push": push, "pull": pull, "list": list_adapters, "show": show, "log": log, "diff": diff,
    "alias": alias, "promote": promote, "rollback": rollback, "policy": policy,
}  # fmt: skip
