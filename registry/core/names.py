"""What people type to name things: ``team/bot:prod``, ``team/bot@v7``, ``llama@r2``, ``b3:…``.

One grammar for adapters, datasets and suites (a series with numbered versions), one for base models
(a line with numbered revisions, or a content digest). Parsed at the door, true inside.
"""

import re
from dataclasses import dataclass
from typing import Self

from .digest import Beginning, Digest, named
from .errors import BadDigest, BadName, BadReference

NAME_RULE = "1 to 64 characters from a-z, 0-9, '-', '_' and '.', starting and ending with a letter or digit, no '..'"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_REVISION = re.compile(r"r([1-9][0-9]{0,8})")


def check_name(value: str, what: str) -> str:
    """``value`` itself when it is a name; `BadName` with the rule when not."""
    if not _NAME.fullmatch(value) or ".." in value:
        raise BadName(value=value[:100], what=what, rule=NAME_RULE)
    return value


@dataclass(frozen=True, slots=True, order=True)
class SeriesName:
    """``namespace/name``: a series of adapter, dataset or suite versions."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str, what: str = "adapter") -> Self:
        """``team/name``; `BadName` with the rule otherwise."""
        namespace, slash, name = text.partition("/")
        if not slash:
            raise BadName(value=text[:100], what=f"{what} name", rule="expected NAMESPACE/NAME, such as team/bot")
        return cls(check_name(namespace, "namespace"), check_name(name, f"{what} name"))

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Reference:
    """A series, and at most one of an alias, a version number and a digest, or the first digits of one."""

    series: SeriesName
    alias: str | None = None
    version: int | None = None
    digest: Digest | None = None
    begins: Beginning | None = None

    EXAMPLES = "team/bot  team/bot:prod  team/bot@v7  team/bot@sha256:…"

    @classmethod
    def parse(cls, text: str, what: str = "adapter") -> Self:
        """One of the four forms of a reference; `BadReference` says what is wrong."""

        def refused(rule: str) -> BadReference:
            article = "an" if what[0] in "aeiou" else "a"
            return BadReference(value=text[:200], what=f"{article} {what}", rule=rule, examples=cls.EXAMPLES)

        series_text, at, exact = text.partition("@")
        series_text, colon, alias = series_text.partition(":")
        if at and colon:
            raise refused("an alias and a version at once")
        try:
            series = SeriesName.parse(series_text, what)
            if colon:
                return cls(series, alias=check_name(alias, "alias"))
            if not at:
                return cls(series)
            if match := _VERSION.fullmatch(exact):
                return cls(series, version=int(match[1]))
            digest = named(exact)
        except (BadName, BadDigest) as error:
            raise refused(error.message) from error
        if digest.algorithm != "sha256":
            raise refused("versions have sha256 digests")
        if isinstance(digest, Beginning):
            return cls(series, begins=digest)
        return cls(series, digest=digest)

    @property
    def exact(self) -> str | None:
        """The one version that is meant, as a path spells it: ``v7``, a digest or its beginning; None for others."""
        if self.version is not None:
            return f"v{self.version}"
        found = self.digest or self.begins
        return str(found) if found else None

    def __str__(self) -> str:
        if self.alias is not None:
            return f"{self.series}:{self.alias}"
        return f"{self.series}@{self.exact}" if self.exact else str(self.series)


@dataclass(frozen=True, slots=True)
class BaseReference:
    """A base model: a digest or its first digits, or a line with or without a revision (without: its newest)."""

    line: str | None = None
    revision: int | None = None
    digest: Digest | None = None
    begins: Beginning | None = None

    EXAMPLES = "llama  llama@r2  b3:…"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``line``, ``line@rN`` or ``b3:…``; `BadReference` says what is wrong."""

        def refused(rule: str) -> BadReference:
            return BadReference(value=text[:200], what="a base model", rule=rule, examples=cls.EXAMPLES)

        try:
            if text.startswith(("b3:", "sha256:")):
                digest = named(text)
                if digest.algorithm != "b3":
                    raise refused("base digests start with b3:")
                return cls(begins=digest) if isinstance(digest, Beginning) else cls(digest=digest)
            line, at, revision = text.partition("@")
            check_name(line, "line")
        except (BadName, BadDigest) as error:
            raise refused(error.message) from error
        match = _REVISION.fullmatch(revision)
        if at and match is None:
            raise refused("expected @rN after the line")
        return cls(line=line, revision=int(match[1]) if match else None)

    def __str__(self) -> str:
        if found := self.digest or self.begins:
            return str(found)
        return f"{self.line}@r{self.revision}" if self.revision else str(self.line)
