"""Whom one trusts, asked on this side of the wire: a registry that lies, or was broken into, is found out here.

    pinned keys      a signature counts by a key that lies on this machine, whatever the registry says of keys
    no pinned keys   a signature counts by a living key of the namespace, as the registry names them

In both cases it is over the manifest whose digest the version is, and the files are those of the manifest. A key that
the registry says was revoked counts in neither: the worst that a lie can do there is to refuse.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .client import RegistryClient
from .core.digest import Digest
from .core.errors import BadManifest, BadSignature, BadSigningKey, LocalFailure, NotVerified
from .core.manifest import Manifest
from .core.names import BaseReference, Reference
from .core.signatures import BESIDE, Bundle
from .keys import PublicKey
from .schemas import Download, SignatureInfo

MANIFEST = "manifest.json"
Keys = Mapping[str, PublicKey]
"""fingerprint -> a key that is trusted here"""


@dataclass(frozen=True, slots=True)
class Judged:
    """One signature, and what it is worth here."""

    key: str
    name: str
    """Whose key it is, as somebody said; empty when nobody did."""
    counts: bool
    reason: str
    """Why it does not count."""
    wrong: bool
    """Whether it is no signature of this version at all, which no honest side would give."""
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """A version as its manifest says, and its signatures."""

    ref: str
    series: str
    manifest: Manifest
    required: bool
    """Whether the namespace requires signatures, as the registry says."""
    signatures: tuple[Judged, ...]

    @property
    def counting(self) -> list[Judged]:
        """Signatures that count."""
        return [one for one in self.signatures if one.counts]

    def require(self) -> None:
        """`NotVerified` unless a signature counts, and none is wrong."""
        wrong = next((one for one in self.signatures if one.wrong), None)
        if wrong is not None:
            raise NotVerified(ref=self.ref, reason=wrong.reason)
        if not self.counting:
            told = "; ".join(f"key {one.key[:19]}: {one.reason}" for one in self.signatures[:5])
            raise NotVerified(ref=self.ref, reason=f"no signature of it counts{f' ({told})' if told else ''}")

    def require_files(self, given: Iterable[Download]) -> None:
        """`NotVerified` unless ``given`` are the files that were signed."""
        promised = {(entry.path, entry.size, entry.digest) for entry in self.manifest.files}
        if {(file.path, file.size, file.digest) for file in given} != promised:
            raise NotVerified(ref=self.ref, reason="the registry gives other files than the manifest lists")

    def require_asked(self, name: Reference, told: str, asked: str | None, fit: str, *, by_name: bool) -> None:
        """`NotVerified` unless it is the version, and on the base, that was asked for.

        ``told``: the base that the registry says it is for. ``asked``: the one that was typed, whose digest goes before
        that. Another fit than exact is the registry's word, and ``by_name`` takes it: the fit was asked for.
        """
        digest = str(self.manifest.digest)
        if name.digest is not None and str(name.digest) != digest:
            raise NotVerified(ref=self.ref, reason=f"{name.digest} was asked for, the registry gives {digest}")
        if name.begins is not None and not digest.startswith(str(name.begins)):
            raise NotVerified(ref=self.ref, reason=f"{name.begins} was asked for, the registry gives {digest}")
        own = BaseReference.parse(asked).digest if asked else None
        base = str(own) if own else told
        if self.manifest.base != base and (fit == "exact" or (own is not None and not by_name)):
            reason = f"it is bound to {self.manifest.base}, and not to {base}"
            word = "" if fit == "exact" else f"; that it fits as '{fit}' is the registry's word, taken by --fit {fit}"
            raise NotVerified(ref=self.ref, reason=f"{reason}{word}")


def read_key(path: Path) -> PublicKey:
    """A public key from a file."""
    try:
        return PublicKey.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise LocalFailure.of(error, path) from error


def manifest_of(client: RegistryClient, series: str, digest: str) -> Manifest:
    """The manifest with just this digest; `NotVerified` when the registry gives something else."""
    body = client.manifest(series, digest)
    if str(actual := Digest.sha256(body)) != digest:
        raise NotVerified(ref=f"{series}@{digest}", reason=f"the registry gives a manifest with digest {actual}")
    return _parsed(body, f"{series}@{digest}")


def _parsed(body: bytes, ref: str) -> Manifest:
    try:
        manifest = Manifest.parse(body)
    except BadManifest as error:
        raise NotVerified(ref=ref, reason=error.message) from error
    if manifest.canonical() != body:
        raise NotVerified(ref=ref, reason="its manifest is not in canonical form")
    return manifest


def check(client: RegistryClient, series: str, digest: str, ref: str, pinned: Keys) -> Checked:
    """A version with its signatures, judged by ``pinned``, or by the namespace's keys where none is pinned."""
    manifest = manifest_of(client, series, digest)
    found = client.signatures(series, digest)
    judged = tuple(_judged(info, series, manifest, pinned) for info in found.signatures)
    return Checked(ref, series, manifest, found.required, judged)


def _judged(info: SignatureInfo, series: str, manifest: Manifest, pinned: Keys) -> Judged:
    reason, wrong = "", False
    if pinned and info.key not in pinned:
        reason = "it is none of those that are pinned here"
    else:
        try:
            key = pinned.get(info.key) or PublicKey.parse(info.public, info.name)
            if key.fingerprint != info.key:
                raise BadSignature(ref=series, reason=f"the registry gives another key under the name {info.key[:19]}")
            key.verify(Bundle.parse(info.bundle, series), series, manifest)
        except (BadSignature, BadSigningKey) as error:
            reason, wrong = error.message, True
        if info.revoked_at is not None and not wrong:
            reason = f"revoked at {info.revoked_at:%Y-%m-%d %H:%M} UTC"
    return Judged(info.key, info.name, not reason, reason, wrong, info.bundle)


# ── beside the files ─────────────────────────────────────────────────────────


def keep_beside(folder: Path, checked: Checked | None) -> None:
    """Write manifest and signatures into the folder that the version was pulled to, so that they go where it goes.

    Those of an earlier version go; None: nothing comes in their place.
    """
    beside = folder / BESIDE
    for old in (*beside.glob("*.sigstore.json"), beside / MANIFEST):
        old.unlink(missing_ok=True)
    if checked is None:
        return
    beside.mkdir(exist_ok=True)
    _write(beside / MANIFEST, checked.manifest.canonical())
    for one in checked.signatures:
        name = Digest.parse(one.key).hex[:16]
        _write(beside / f"{name}.sigstore.json", json.dumps(one.document, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with files.atomic_write(path) as file:
        file.write(data)


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside a folder's files; nothing of it is verified yet."""

    manifest: Manifest
    documents: tuple[dict[str, Any], ...]
    bundles: tuple[Bundle, ...]

    @property
    def series(self) -> str:
        """The series that the signatures claim to be of; empty where there are none."""
        return next((bundle.series for bundle in self.bundles if bundle.series), "")


def read_beside(folder: Path) -> Beside:
    """The manifest and the signatures that a pull wrote; `NotVerified` when there are none."""
    beside = folder / BESIDE
    try:
        manifest = _parsed((beside / MANIFEST).read_bytes(), str(folder))
        documents = tuple(json.loads(path.read_bytes()) for path in sorted(beside.glob("*.sigstore.json")))
    except FileNotFoundError as error:
        reason = f"there is no {BESIDE}/{MANIFEST} in it, as a pull of a signed version writes it"
        raise NotVerified(ref=str(folder), reason=reason) from error
    except (OSError, ValueError) as error:
        raise NotVerified(ref=str(folder), reason=f"{BESIDE} cannot be read: {error}") from error
    return Beside(manifest, documents, tuple(Bundle.parse(document, str(folder)) for document in documents))


def check_folder(folder: Path, beside: Beside, trusted: Keys) -> Checked:
    """A pulled folder, every byte of it read, with its signatures judged by ``trusted``; asks no registry.

    `NotVerified` when a file differs, is missing, or is none of the version.
    """
    _require_same(folder, beside.manifest)
    judged = []
    for bundle, document in zip(beside.bundles, beside.documents, strict=True):
        key, reason, wrong = trusted.get(bundle.key), "", False
        if key is None:
            reason = "it is none of those that are trusted here"
        else:
            try:
                key.verify(bundle, bundle.series or "", beside.manifest)
            except BadSignature as error:
                reason, wrong = error.message, True
        judged.append(Judged(bundle.key, "", not reason, reason, wrong, document))
    counting = next((bundle.series for bundle, one in zip(beside.bundles, judged, strict=True) if one.counts), None)
    return Checked(str(folder), counting or beside.series, beside.manifest, required=False, signatures=tuple(judged))


def _require_same(folder: Path, manifest: Manifest) -> None:
    there = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).parts[0] != BESIDE
    }
    listed = {entry.path: entry.digest for entry in manifest.files}
    problem = _first(sorted(listed.keys() - there.keys()), "is missing")
    problem = problem or _first(sorted(there.keys() - listed.keys()), "is no file of the version")
    differing = [path for path in sorted(listed) if not problem and str(files.sha256_file(there[path])) != listed[path]]
    if problem := problem or _first(differing, "has other bytes than those that were signed"):
        raise NotVerified(ref=str(folder), reason=problem)


def _first(paths: Sequence[str], what: str) -> str:
    more = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"'{paths[0]}' {what}{more}" if paths else ""
