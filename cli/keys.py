"""Commands of signing: keys, sign, verify."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import LocalFailure, PassphraseNeeded, PathUnusable, SigningKeyNotFound
from registry.core.names import Reference, SeriesName, check_name

from . import bases, config
from .output import Output, ago, command, fields, short, table
from .parameters import FILE, no_path

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.keys import PrivateKey, PublicKey
    from registry.schemas import KeyInfo
    from registry.trust import Checked

PASSPHRASE = "LORACTL_KEY_PASSPHRASE"  # noqa: S105  # the name of the variable


@click.group("key", short_help="Keys that sign versions: create, public, add, list, revoke, require, pin, unpin.")
def key() -> None:
    """Keys that sign versions, and whose signatures count: in a namespace of the registry, and on this machine."""


# ── keys on this machine ─────────────────────────────────────────────────────


def private_key(path: Path) -> "PrivateKey":
    """A private key; its passphrase comes from the environment, or is asked for."""
    from registry.keys import PrivateKey

    try:
        data = path.read_bytes()
    except OSError as error:
        raise LocalFailure.of(error, path) from error
    try:
        return PrivateKey.parse(data, str(path), os.environ.get(PASSPHRASE))
    except PassphraseNeeded:
        if not sys.stdin.isatty():
            raise
        return PrivateKey.parse(data, str(path), click.prompt(f"Passphrase of {path}", hide_input=True, err=True))


def pinned_keys(namespace: str, named: Sequence[Path] = ()) -> "dict[str, PublicKey]":
    """fingerprint -> key: of the files ``named``, else those that are pinned for the namespace on this machine."""
    from registry.trust import read_key

    found = [read_key(path) for path in named or sorted(_pins(namespace).glob("*.pem"))]
    return {one.fingerprint: one for one in found}


def _pins(namespace: str) -> Path:
    return config.path().parent / "keys" / check_name(namespace, "namespace")


@command(key, "loractl key create --out signing-key.pem", "loractl key create --passphrase")
@click.option("--out", "target", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Where to; default: signing-key.pem in the folder of the login.")  # fmt: skip
@click.option("--passphrase", is_flag=True, help=f"Lock it by a passphrase, asked for or from {PASSPHRASE}.")
def create(out: Output, target: Path | None, passphrase: bool) -> None:
    """Make a pair of keys (ECDSA, P-256): FILE for its owner alone, and FILE.pub for everybody.

    The private one stays on this machine: a registry is given the public one (loractl key add).
    """
    from registry.keys import PrivateKey

    target = target or config.path().parent / "signing-key.pem"
    public = target.with_name(f"{target.name}.pub")
    secret = os.environ.get(PASSPHRASE) if passphrase else None
    if passphrase and secret is None:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    made = PrivateKey.generate()
    its_public_one = f"its public one: loractl key public {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if target.exists():
            raise PathUnusable(
                path=str(target), reason=f"it is there already, and a key is not overwritten; {its_public_one}"
            )
        config.write_secret(target, made.pem(secret), anew=True)
    except OSError as error:
        raise LocalFailure.of(error, target) from error
    try:
        public.write_text(made.public.pem)
    except OSError as error:
        reason = f"{error.strerror or error}; {target} was made, {its_public_one}"
        raise PathUnusable(path=str(public), reason=reason) from error
    document = {"private": str(target), "public": str(public), "fingerprint": made.public.fingerprint}
    out.emit(document, lambda: fields(document))


@command(key, "loractl key public signing-key.pem > signing-key.pem.pub")
@click.argument("file", metavar="PRIVATE.pem", type=FILE)
def public(out: Output, file: Path) -> None:
    """Print the public key that belongs to a private one."""
    found = private_key(file).public
    out.emit({"public": found.pem, "fingerprint": found.fingerprint}, lambda: click.echo(found.pem, nl=False))


@command(key, "loractl key pin team release.pub")
@click.argument("namespace", metavar="NAMESPACE")
@click.argument("file", metavar="PUBLIC.pem", type=FILE)
def pin(out: Output, namespace: str, file: Path) -> None:
    """Trust a key on this machine: pull and verify then take nothing of NAMESPACE that no pinned key signed.

    So a registry that lies about keys or versions is found out.
    """
    from registry.trust import read_key

    found = read_key(file)
    target = _pins(namespace) / f"{found.fingerprint.removeprefix('sha256:')}.pem"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        config.write_secret(target, found.pem)
    except OSError as error:
        raise LocalFailure.of(error, target) from error
    document = {"pinned": found.fingerprint, "namespace": namespace, "file": str(target)}
    out.emit(document, lambda: click.echo(f"pinned {found.fingerprint} for {namespace}"))


@command(key, "loractl key unpin team sha256:1f2e…")
@click.argument("namespace", metavar="NAMESPACE")
@click.argument("fingerprint", metavar="FINGERPRINT")
def unpin(out: Output, namespace: str, fingerprint: str) -> None:
    """Trust a key on this machine no more; FINGERPRINT may be its beginning."""
    digits = fingerprint.rstrip("…").removeprefix("sha256:")
    found = [path for path in sorted(_pins(namespace).glob("*.pem")) if digits and path.stem.startswith(digits)]
    if len(found) != 1:
        raise click.UsageError(f"{len(found)} keys pinned for {namespace} begin with '{fingerprint}'.")
    found[0].unlink()
    out.emit({"unpinned": f"sha256:{found[0].stem}"}, lambda: click.echo(f"unpinned sha256:{found[0].stem}"))


# ── keys of a namespace ──────────────────────────────────────────────────────


@command(key, "loractl key add team signing-key.pem.pub --name 'release desk'")
@click.argument("namespace", metavar="NAMESPACE")
@click.argument("file", metavar="PUBLIC.pem", type=FILE)
@click.option("--name", "owner", metavar="TEXT", help="Whose it is; default: the name of the file.")
def add(out: Output, namespace: str, file: Path, owner: str | None) -> None:
    """Let signatures by a public key count in NAMESPACE; needs the scope admin there."""
    from registry.schemas import KeyRequest
    from registry.trust import read_key

    found = read_key(file)
    with config.connect() as client:
        info = client.add_key(namespace, KeyRequest(public=found.pem, name=owner or file.name.split(".")[0] or "key"))
    out.emit(info, lambda: click.echo(f"{info.fingerprint} ({info.name}) signs for {namespace}"))


@command(key, "loractl key list team", name="list")
@click.argument("namespace", metavar="NAMESPACE")
def list_keys(out: Output, namespace: str) -> None:
    """List the keys of NAMESPACE, those that were revoked, and those that are pinned on this machine."""
    pinned = pinned_keys(namespace)
    with config.connect() as client:
        found = client.keys(namespace).items
        required = client.signing(namespace).required
    unknown = [one for one in pinned if one not in {info.fingerprint for info in found}]
    rows = [
        {**info.model_dump(mode="json", exclude={"follows"}), "pinned": info.fingerprint in pinned} for info in found
    ]
    document = {"namespace": namespace, "required": required, "keys": rows, "pinned_only": unknown}

    def show() -> None:
        table(
            ["key", "name", "added", "by", "standing", "pinned here"],
            [*([short(k.fingerprint), k.name, ago(k.created_at), k.created_by, _standing(k),
                "yes" if k.fingerprint in pinned else ""] for k in found),
             *([short(one), "", "", "", "not known to the registry", "yes"] for one in unknown)],
            empty=f"No keys. Add one: loractl key add {namespace} PUBLIC.pem",
        )  # fmt: skip
        click.echo(f"Signatures are {'required' if required else 'not required'} in {namespace}.")

    out.emit(document, show)


def _standing(info: "KeyInfo") -> str:
    if info.revoked_at is None:
        return "living"
    return f"revoked {ago(info.revoked_at)} by {info.revoked_by}" + (
        f": {info.revoked_reason}" if info.revoked_reason else ""
    )


@command(key, "loractl key revoke team sha256:1f2e… -m 'laptop stolen'")
@click.argument("namespace", metavar="NAMESPACE")
@click.argument("fingerprint", metavar="FINGERPRINT")
@click.option("-m", "--message", default="", metavar="TEXT", help="Why.")
def revoke(out: Output, namespace: str, fingerprint: str, message: str) -> None:
    """Let nothing count that a key signed, and nothing that it will sign, for good; needs the scope admin.

    FINGERPRINT may be its beginning. What no other living key signed is named, with the aliases that resolve no more
    where signatures are required: sign it with another key (loractl sign).
    """
    from registry.schemas import RevokeRequest

    wanted = fingerprint.rstrip("…")
    with config.connect() as client:
        known = [one.fingerprint for one in client.keys(namespace).items]
        found = [one for one in known if wanted and one.startswith(wanted)]
        if not found:
            raise SigningKeyNotFound(id=fingerprint, namespace=namespace)
        if len(found) > 1:
            raise click.UsageError(f"{len(found)} keys of {namespace} begin with '{fingerprint}'.")
        info = client.revoke_key(namespace, found[0], RevokeRequest(reason=message))
    out.emit(info, lambda: _followed(f"{info.fingerprint} ({info.name}) is revoked in {namespace}", info.follows))


@command(key, "loractl key require team", "loractl key require team --off")
@click.argument("namespace", metavar="NAMESPACE")
@click.option("--off", is_flag=True, help="Require none any more.")
def require(out: Output, namespace: str, off: bool) -> None:
    """Require signatures in NAMESPACE: nothing unsigned is pushed, promoted, or given by alias; needs the scope admin.

    What workers make waits for a signature before an alias moves to it.
    """
    from registry.schemas import SigningRequest

    with config.connect() as client:
        info = client.set_signing(namespace, SigningRequest(required=not off))
    said = f"Signatures are {'required' if info.required else 'not required'} in {namespace}."
    out.emit(info, lambda: _followed(said, info.follows))


def _followed(said: str, follows: Iterable[str]) -> None:
    click.echo(said)
    for line in follows:
        click.echo(f"follows  {line}")


# ── signing and verifying ────────────────────────────────────────────────────


@command(
    None,
    "loractl sign team/bot@v7 --key signing-key.pem",
    "loractl sign team/bot@v7 team/faq@v2 --key signing-key.pem",
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--key", "key_file", required=True, metavar="KEY", type=FILE, help="The private key.")
def sign(out: Output, refs: tuple[str, ...], key_file: Path) -> None:
    """Sign versions that are there: their files, base, configuration and lineage, by the version's digest.

    The manifest is fetched and its digest checked; the private key stays here.
    """
    from registry.schemas import SignatureRequest
    from registry.trust import manifest_of

    from .adapters import version_of

    mine = private_key(key_file)
    made = []
    with config.connect() as client:
        for ref in refs:
            name = Reference.parse(ref)
            series = str(name.series)
            version = version_of(client, name)
            bundle = mine.sign(series, manifest_of(client, series, version.digest)).document()
            info = client.sign(series, version.digest, SignatureRequest(bundle=bundle))
            made.append({"ref": version.ref, "digest": version.digest, "key": info.key, "name": info.name})
    rows = [[one["ref"], short(one["digest"]), short(one["key"]), one["name"]] for one in made]
    out.emit(made, lambda: table(["signed", "digest", "key", "name"], rows))


@command(
    None,
    "loractl verify team/bot:prod",
    "loractl verify team/bot:prod --for llama@r1",
    "loractl verify team/bot@v7 --key release.pub",
    "loractl verify ./bot --key release.pub",
)
@click.argument("what", metavar="REF|DIR")
@click.option("--key", "key_files", multiple=True, metavar="PUB", type=FILE,
              help="Trust these public keys alone; default: the pinned ones, else the namespace's.")  # fmt: skip
@click.option("--for", "base_text", metavar="BASE", help="Of an alias: on which base; default: the newest of its line.")
def verify(out: Output, what: str, key_files: tuple[Path, ...], base_text: str | None) -> None:
    """Say who signed a version, and whether that counts; exits with 1 when nothing does.

    Of a folder that a pull wrote every byte is read; with --key or pinned keys no registry is asked.
    """
    from registry import trust

    if (folder := Path(what)).is_dir():
        checked = _folder(folder, key_files)
    else:
        from .adapters import version_of

        name = Reference.parse(no_path(what))
        with config.connect() as client, out.progress() as bar:
            base = bases.wanted(base_text, bar).ref if base_text else None
            version = version_of(client, name, base)
            pinned = pinned_keys(name.series.namespace, key_files)
            checked = trust.check(client, str(name.series), version.digest, version.ref, pinned)
    rows = [
        {"key": one.key, "name": one.name, "counts": one.counts, "reason": one.reason} for one in checked.signatures
    ]
    document: dict[str, Any] = {
        "ref": checked.ref, "series": checked.series, "digest": str(checked.manifest.digest),
        "base": checked.manifest.base, "files": len(checked.manifest.files), "signatures": rows,
        "verified": bool(checked.counting) and not any(one.wrong for one in checked.signatures),
    }  # fmt: skip

    def show() -> None:
        fields({name: str(document[name]) for name in ("ref", "series", "digest", "base", "files")})
        table(
            ["signed by", "name", "counts", "why not"],
            ([short(one.key), one.name, "yes" if one.counts else "no", one.reason] for one in checked.signatures),
            empty="No signatures. Sign it: loractl sign REF --key KEY",
        )

    out.emit(document, show)
    if not document["verified"]:
        raise click.exceptions.Exit(1)


def _folder(folder: Path, named: Sequence[Path]) -> "Checked":
    """By the keys that are named or pinned; else by the living ones of the namespace that the signatures speak of."""
    from registry import trust

    beside = trust.read_beside(folder)
    namespace = SeriesName.parse(beside.series).namespace if beside.series else ""
    trusted = pinned_keys(namespace, named) if namespace else {}
    if namespace and not trusted:
        with config.connect() as client:
            trusted = _living(client, namespace)
    return trust.check_folder(folder, beside, trusted)


def _living(client: "RegistryClient", namespace: str) -> "dict[str, PublicKey]":
    from registry.keys import PublicKey

    found = [PublicKey.parse(info.public, info.name) for info in client.keys(namespace).items if not info.revoked_at]
    return {one.fingerprint: one for one in found}


COMMANDS: dict[str, click.Command] = {"key": key, "sign": sign, "verify": verify}
