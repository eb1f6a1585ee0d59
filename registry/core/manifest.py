"""Manifest: the files of a version and what they are bound to, as canonical JSON with a SHA-256.

A version's digest is the digest of its manifest, and the manifest holds nothing that differs between
two pushes of one folder (message, time and aliases live on the version's row), so pushing twice is one
version. Blobs are named ``sha256:<hex>``, as object stores, LFS and OCI name them.

A draft is a manifest whose sender does not know all digests yet: large files that are new to the registry are sent
while they are hashed, and the digests come last (docs/adr/0019).
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .digest import Digest
from .errors import BadDigest, BadManifest, BadPath

MAX_FILES = 4096
MAX_ORIGINS = 1000
"""Parents, and datasets, that one version can name."""
MAX_MANIFEST_BYTES = 16 << 20
MAX_DEPTH = 100
MAX_VALUES = 5_000_000
"""Of a JSON file: a table of 250 000 tensors has a dozen values each."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
Kind = Literal["adapter", "base", "dataset", "suite"]


def canonical_json(value: Any) -> bytes:
    """``value`` with sorted keys, no spaces, UTF-8 and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def check_json(value: Any) -> None:
    """Whether every database can keep a JSON value, and every reader read it; ValueError says why not.

    No text holds NUL or half of a surrogate pair; it is nested at most `MAX_DEPTH` deep and has at most `MAX_VALUES`
    values (a YAML file of a few lines can stand for billions). Numbers are looked at where they are written.
    """
    count, waiting = 0, [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"it is nested over {MAX_DEPTH} deep, or has over {MAX_VALUES} values")
        if isinstance(one, str):
            if "\0" in one or (not one.isascii() and _SURROGATE.search(one)):
                raise ValueError(f"a text holds NUL or half of a surrogate pair: {ascii(one)[:60]}")
        elif isinstance(one, dict):
            waiting += [(item, depth + 1) for pair in one.items() for item in pair]
        elif isinstance(one, list | tuple):
            waiting += [(item, depth + 1) for item in one]


def check_values(text: bytes) -> None:
    """ValueError when a JSON text may have over `MAX_VALUES` values: asked before it is read, it bounds the memory."""
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise ValueError(f"it may have over {MAX_VALUES} values")


def _json(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    canonical_json(value)
    return value


Json = Annotated[dict[str, Any], AfterValidator(_json)]
"""A JSON object that has a canonical form, and that every database can keep."""


def check_path(path: str) -> str:
    """``path`` itself when it is safe and relative; `BadPath` with the rule when not."""
    parts = path.split("/")
    rule = None
    if not path or len(path.encode()) > 512:
        rule = "1 to 512 bytes"
    elif any(ord(char) < 32 or ord(char) == 127 or char in '\\:*?"<>|' for char in path):
        rule = "no control characters and none of \\ : * ? \" < > |"
    elif any(part in ("", ".", "..") or part != part.strip() for part in parts):
        rule = "relative, with no empty, '.' or '..' part, and no part with spaces at its ends"
    elif any(len(part.encode()) > 255 for part in parts):
        rule = "no part of the path over 255 bytes"
    if rule:
        raise BadPath(path=path[:200], rule=rule)
    return path


def _sha256(value: str) -> str:
    try:
        if Digest.parse(value).algorithm == "sha256":
            return value
    except BadDigest as error:
        raise ValueError(error.message) from error
    raise ValueError("blobs are named by sha256")


def _b3(value: str) -> str:
    try:
        if Digest.parse(value).algorithm == "b3":
            return value
    except BadDigest as error:
        raise ValueError(error.message) from error
    raise ValueError("base models are named by b3")


Sha256 = Annotated[str, AfterValidator(_sha256)]
BaseDigest = Annotated[str, AfterValidator(_b3)]


class Frozen(BaseModel):
    """A value: no field changes, no unknown field is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Frozen):
    """One file of a version: where it lies in the folder, and which bytes it holds."""

    path: str
    size: Annotated[int, Field(ge=0, le=1 << 44)]
    digest: Sha256


class Lineage(Frozen):
    """Where a version came from, as far as its author or our worker knows."""

    parents: Annotated[tuple[Sha256, ...], Field(max_length=MAX_ORIGINS)] = ()
    """Digests of the versions it was made from (rebase: the original; combine: all)."""
    datasets: Annotated[tuple[Sha256, ...], Field(max_length=MAX_ORIGINS)] = ()
    """Version digests of the datasets it was trained on."""
    recipe: Json | None = None
    """The frozen recipe, as `registry.core.recipes` dumps it."""


class LateFile(Frozen):
    """A file of a draft whose digest comes with the seal."""

    path: str
    size: Annotated[int, Field(ge=0, le=1 << 44)]
    tensors: tuple[str, ...] = ()
    """Bases: canonical names of the tensors in it, by which the registry tells whether it may hold such a file."""


class Listing(Frozen):
    """What manifests and drafts have in common."""

    schema_: Annotated[Literal["loractl/1"], Field(alias="schema")] = "loractl/1"
    kind: Kind
    files: Annotated[tuple[FileEntry | LateFile, ...], Field(min_length=1, max_length=MAX_FILES)]
    base: BaseDigest | None = None
    """Adapters: the base they are bound to. Bases: their own base digest."""
    config: Json = Field(default_factory=dict)
    """Adapters: adapter_config.json as it is. Datasets and suites: their spec."""
    lineage: Lineage = Lineage()

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths = [check_path(entry.path) for entry in self.files]
        if paths != sorted(set(paths)):
            raise BadManifest(reason="paths must be sorted and occur once")
        folded = {path.casefold() for path in paths}
        if len(folded) != len(paths):
            raise BadManifest(reason="two paths differ only in upper and lower case")
        if any(f"{path}/".startswith(f"{other}/") for path, other in zip(paths[1:], paths, strict=False)):
            raise BadManifest(reason="a path is both a file and a folder")
        if (self.base is None) != (self.kind in ("dataset", "suite")):
            raise BadManifest(reason=f"a manifest of kind '{self.kind}' {'has no' if self.base else 'needs a'} base")
        return self

    @classmethod
    def parse(cls, data: bytes | dict[str, Any]) -> Self:
        """A manifest from JSON; `BadManifest` or `BadPath` says what is wrong with it."""
        if isinstance(data, bytes) and len(data) > MAX_MANIFEST_BYTES:
            raise BadManifest(reason=f"{len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
        try:
            return cls.model_validate_json(data) if isinstance(data, bytes) else cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BadManifest(reason=f"{where}: {first['msg']}") from error

    def canonical(self) -> bytes:
        """The bytes that are hashed and stored."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @property
    def digest(self) -> Digest:
        """The SHA-256 of the canonical bytes; a manifest's is the version's digest."""
        return Digest.sha256(self.canonical())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


class Manifest(Listing):
    """Everything that makes a version what it is."""

    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=MAX_FILES)]


class Draft(Listing):
    """A manifest that lacks the digests of some files; its own digest is its name until they are there."""

    @property
    def late(self) -> tuple[LateFile, ...]:
        """The files whose digests are not known."""
        return tuple(entry for entry in self.files if isinstance(entry, LateFile))

    def sealed(self, digests: Mapping[str, str]) -> Manifest:
        """The manifest that the draft becomes by ``digests``, path -> digest of every late file and of no other.

        `BadManifest` names what is missing, or too many.
        """
        wanted = {entry.path for entry in self.late}
        for path in sorted(wanted ^ digests.keys()):
            why = "has no digest" if path in wanted else "is no file whose digest was left open"
            raise BadManifest(reason=f"'{path[:100]}' {why}")
        files = [
            FileEntry(path=entry.path, size=entry.size, digest=digests[entry.path])
            if isinstance(entry, LateFile)
            else entry
            for entry in self.files
        ]
        return Manifest.parse({**self.model_dump(by_alias=True, exclude={"files"}), "files": files})


def parse_listing(data: dict[str, Any]) -> Manifest | Draft:
    """A manifest, or a draft when a file in it has no digest; `BadManifest` or `BadPath`."""
    files = data.get("files")
    open_ended = isinstance(files, list) and any(isinstance(entry, dict) and "digest" not in entry for entry in files)
    return Draft.parse(data) if open_ended else Manifest.parse(data)
