"""Signing at the command line, and registries that lie."""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select, update

from cli.main import run
from registry.client import RegistryClient
from registry.core.manifest import Manifest, canonical_json
from registry.core.signatures import BESIDE
from registry.db.models import Adapter, Alias, Signature, SigningKey, Version
from registry.keys import PrivateKey
from registry.services import signatures
from tests import live
from tests.factories import tiny_adapter, tiny_base

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.Live]:
    with live.registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="module")
def base(house: live.Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def registry(house: live.Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> live.Live:
    """One for all tests of this file; each has a namespace and a home of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORACTL_URL", house.url)
    monkeypatch.setenv("LORACTL_TOKEN", house.token)
    monkeypatch.delenv("LORACTL_KEY_PASSPHRASE", raising=False)
    return house


@dataclass
class Signed:
    """A namespace with a key, and a signed adapter behind ``prod``."""

    call: Call
    registry: live.Live
    folder: Path
    base: Path
    team: str
    private: str
    public: str
    fingerprint: str

    @property
    def ref(self) -> str:
        return f"{self.team}/bot"

    def push(self, seed: int, *more: str, code: int = 0) -> Any:
        adapter = self.folder / f"a{seed}"
        if not adapter.exists():
            tiny_adapter(adapter, self.base, seed=seed)
        return self.call("push", adapter, self.ref, "--base", self.base, *more, code=code)

    def pull(self, *more: str, ref: str = ":prod", code: int = 0, out: str = "out") -> Any:
        return self.call("pull", self.ref + ref, "--out", self.folder / out, *more, code=code)


@pytest.fixture
def signed(call: Call, registry: live.Live, tmp_path: Path, base: Path, request: pytest.FixtureRequest) -> Signed:
    team = f"t{abs(hash(request.node.name)) % 10**9}"
    made = call("key", "create", "--out", tmp_path / "release.pem")
    call("key", "add", team, made["public"], "--name", "release desk")
    found = Signed(call, registry, tmp_path, base, team, made["private"], made["public"], made["fingerprint"])
    assert found.push(1, "--sign", found.private, "--alias", "prod")["outcome"]["signed"] == [found.fingerprint]
    return found


def problem(told: Any) -> tuple[str, str]:
    return told["error"]["code"], told["error"]["detail"]


# ── keys ─────────────────────────────────────────────────────────────────────


def test_a_pair_of_keys_is_made_for_its_owner_alone_and_never_overwritten(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = call("key", "create")
    private = Path(made["private"])
    assert private == tmp_path / "config" / "loractl" / "signing-key.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert PrivateKey.parse(private.read_bytes(), "here").public.fingerprint == made["fingerprint"]
    code, detail = problem(call("key", "create", code=1))
    assert code == "path-unusable" and f"loractl key public {private}" in detail
    assert call("key", "public", private)["public"] == Path(made["public"]).read_text()
    assert not [path for path in private.parent.iterdir() if path.name.startswith(".")]
    monkeypatch.setenv("LORACTL_KEY_PASSPHRASE", "correct horse")
    locked = call("key", "create", "--passphrase", "--out", tmp_path / "locked.pem")
    assert "ENCRYPTED" in Path(locked["private"]).read_text()
    call("key", "add", "locked", locked["public"])
    assert problem(call("key", "add", "locked", locked["private"], code=1))[0] == "bad-signing-key"


def test_a_locked_key_signs_by_its_passphrase(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORACTL_KEY_PASSPHRASE", "correct horse")
    locked = signed.call("key", "create", "--passphrase", "--out", tmp_path / "locked.pem")
    signed.call("key", "add", signed.team, locked["public"])
    monkeypatch.delenv("LORACTL_KEY_PASSPHRASE")
    sign = ("sign", f"{signed.ref}@v1", "--key", locked["private"])
    assert problem(signed.call(*sign, code=1))[0] == "passphrase-needed"
    monkeypatch.setenv("LORACTL_KEY_PASSPHRASE", "correct horse")
    assert signed.call(*sign)[0]["key"] == locked["fingerprint"]


# ── the walk-through ─────────────────────────────────────────────────────────


def test_who_signed_a_version_is_shown_verified_and_pulled_with_it(signed: Signed) -> None:
    found = signed.call("verify", f"{signed.ref}:prod")
    assert (found["verified"], found["signatures"][0]["name"]) == (True, "release desk")
    assert signed.call("show", f"{signed.ref}@v1")["signed_by"] == ["release desk"]
    pulled = signed.pull()
    assert pulled["signatures"] == [{"key": signed.fingerprint, "name": "release desk", "pinned": False}]
    out = signed.folder / "out"
    assert signed.call("verify", out)["verified"]  # by the namespace's keys
    again = signed.call("push", out, signed.ref, "--base", signed.base)
    assert (again["outcome"]["ref"], again["state"]) == (f"{signed.ref}@v1", "committed")


def test_an_unsigned_push_is_refused_where_signatures_are_required_and_sends_nothing(signed: Signed) -> None:
    assert signed.call("key", "require", signed.team)["required"]
    before = signed.registry.sent()
    assert problem(signed.push(2, code=1))[0] == "signature-required"
    assert signed.registry.sent() == before
    signed.push(2, "--sign", signed.private)
    assert signed.call("key", "list", signed.team)["required"]
    assert not signed.call("key", "require", signed.team, "--off")["required"]


def test_what_is_not_signed_is_pulled_only_by_who_says_so(signed: Signed) -> None:
    signed.push(2)
    signed.call("key", "require", signed.team)
    assert problem(signed.pull(ref="", code=1))[0] == "signature-required"
    assert problem(signed.pull(ref="@v2", code=1))[0] == "not-verified"
    assert not (signed.folder / "out").exists()
    assert signed.pull("--unverified", ref="@v2")["signatures"] == []
    assert signed.call("verify", f"{signed.ref}@v2", code=1)["verified"] is False
    signed.call("sign", f"{signed.ref}@v2", "--key", signed.private)
    assert signed.pull(ref="")["signatures"][0]["key"] == signed.fingerprint


def test_a_revocation_ends_the_alias_at_once_and_is_listed(signed: Signed) -> None:
    signed.call("key", "require", signed.team)
    exact = ("--for", str(signed.base))  # an answer that the registry remembers
    assert signed.pull(*exact)["digest"]
    revoked = signed.call("key", "revoke", signed.team, signed.fingerprint[:20], "-m", "stolen")
    assert revoked["follows"] == [
        f"{signed.ref}@v1 has no signature that counts", f"{signed.ref}:prod resolves no more until v1 is signed",
    ]  # fmt: skip
    assert problem(signed.pull(*exact, code=1))[0] == "signature-required"
    assert problem(signed.pull("--key", signed.public, ref="@v1", code=1))[0] == "not-verified"
    [key] = signed.call("key", "list", signed.team)["keys"]
    assert (key["revoked_reason"], key["revoked_at"] is None) == ("stolen", False)
    assert problem(signed.call("sign", f"{signed.ref}@v1", "--key", signed.private, code=1))[0] == "key-revoked"
    other = signed.call("key", "create", "--out", signed.folder / "other.pem")
    signed.call("key", "add", signed.team, other["public"])
    signed.call("sign", f"{signed.ref}@v1", "--key", other["private"])
    assert signed.pull(*exact)["signatures"][0]["key"] == other["fingerprint"]
    assert run(["key", "list", signed.team]) == run(["verify", f"{signed.ref}:prod"]) == 0


def test_a_pinned_key_is_kept_for_the_next_pull_until_it_is_unpinned(signed: Signed) -> None:
    other = signed.call("key", "create", "--out", signed.folder / "other.pem")
    signed.call("key", "pin", signed.team, other["public"])
    code, detail = problem(signed.pull(code=1))
    assert (code, "none of those that are pinned" in detail) == ("not-verified", True)
    assert signed.call("key", "list", signed.team)["pinned_only"] == [other["fingerprint"]]
    signed.call("key", "pin", signed.team, signed.public)
    assert signed.pull()["signatures"] == [{"key": signed.fingerprint, "name": "release desk", "pinned": True}]
    signed.call("key", "unpin", signed.team, signed.fingerprint[:16])
    assert problem(signed.pull(code=1))[0] == "not-verified"
    assert signed.pull("--key", signed.public)["signatures"][0]["pinned"]


# ── a registry that lies ─────────────────────────────────────────────────────


@dataclass
class Liar:
    """Whoever owns the database: rows are changed past every check."""

    signed: Signed

    def __post_init__(self) -> None:
        self.mallory = PrivateKey.generate()
        self.signed.push(2)

    def row(self, session: Any, number: int) -> Any:
        team = self.signed.team
        query = select(Version).join(Adapter).where(Adapter.namespace == team, Version.number == number)
        return session.exec(query).one()

    def serve(self, number: int) -> None:
        """Let the alias point at another version."""
        with self.signed.registry.parts.database.write() as session:
            alias = session.exec(select(Alias).where(Alias.version_id == self.row(session, 1).id)).one()
            alias.version_id = self.row(session, number).id
            session.add(alias)

    def trust_and_sign(self) -> None:
        """Its own key becomes the namespace's, and signs what the alias means now."""
        with self.signed.registry.parts.database.write() as session:
            version = self.row(session, 2)
            public = self.mallory.public
            key = SigningKey(
                namespace=self.signed.team, fingerprint=public.fingerprint, name="release desk", public=public.pem,
                created_by="x", created_at=version.created_at,
            )  # fmt: skip
            session.add(key)
            session.flush()
            assert key.id is not None
            bundle = self.mallory.sign(self.signed.ref, signatures.manifest_of(session, version)).document()
            session.add(Signature(
                version_id=version.id, key_id=key.id, bundle=canonical_json(bundle), created_by="x",
                created_at=version.created_at,
            ))  # fmt: skip

    def copy_signature(self) -> None:
        """The signature of v1 is shown for v2."""
        with self.signed.registry.parts.database.write() as session:
            mine, other = self.row(session, 1), self.row(session, 2)
            row = session.exec(select(Signature).where(Signature.version_id == mine.id)).one()
            session.add(Signature(
                version_id=other.id, key_id=row.key_id, bundle=row.bundle, created_by="x", created_at=row.created_at
            ))  # fmt: skip

    def swap_public_key(self) -> None:
        """The public key's text is exchanged under its name, and what is given is signed by the new one."""
        self.trust_and_sign()
        with self.signed.registry.parts.database.write() as session:
            mine, theirs = self.signed.fingerprint, self.mallory.public.fingerprint
            for name, new in ((mine, "sha256:" + "0" * 64), (theirs, mine)):
                row = (col(SigningKey.namespace) == self.signed.team, col(SigningKey.fingerprint) == name)
                session.exec(update(SigningKey).where(*row).values(fingerprint=new))


@pytest.fixture
def liar(signed: Signed) -> Liar:
    return Liar(signed)


def test_a_registry_that_trusts_its_own_key_is_found_out_by_a_pinned_one(liar: Liar) -> None:
    signed = liar.signed
    liar.serve(2)
    liar.trust_and_sign()
    assert signed.pull()["ref"] == f"{signed.ref}@v2"  # who believes the registry is lied to
    code, detail = problem(signed.pull("--key", signed.public, code=1, out="pinned"))
    assert (code, "pinned" in detail) == ("not-verified", True)
    assert not (signed.folder / "pinned").exists()
    assert signed.call("verify", f"{signed.ref}:prod", "--key", signed.public, code=1)["verified"] is False


def test_a_signature_of_another_version_is_found_out_by_everybody(liar: Liar) -> None:
    signed = liar.signed
    liar.serve(2)
    liar.copy_signature()
    for more in ((), ("--key", signed.public)):
        code, detail = problem(signed.pull(*more, code=1))
        assert (code, "it is of sha256:" in detail) == ("not-verified", True)


def test_a_public_key_that_was_exchanged_under_its_name_is_found_out(liar: Liar) -> None:
    signed = liar.signed
    liar.serve(2)
    liar.swap_public_key()
    assert problem(signed.pull(code=1))[0] == "not-verified"
    assert problem(signed.pull("--key", signed.public, code=1))[0] == "not-verified"


def test_an_unsigned_version_behind_the_alias_is_found_out_by_a_pinned_key(liar: Liar) -> None:
    liar.serve(2)
    assert problem(liar.signed.pull("--key", liar.signed.public, code=1))[0] == "not-verified"


def test_a_manifest_or_files_that_are_not_the_signed_ones_are_found_out(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signed.registry.client() as client:
        other = Manifest.parse(client.manifest(signed.ref, "v1")).model_copy(update={"config": {}})
    with monkeypatch.context() as lying:
        lying.setattr(RegistryClient, "manifest", lambda *_: other.canonical())
        assert "manifest with digest" in problem(signed.pull("--key", signed.public, code=1))[1]
    honest = RegistryClient.resolve

    def resolved(client: RegistryClient, *arguments: Any, **more: Any) -> Any:
        found = honest(client, *arguments, **more)
        return found.model_copy(update={"files": found.files[1:]})

    monkeypatch.setattr(RegistryClient, "resolve", resolved)
    assert "other files" in problem(signed.pull("--key", signed.public, code=1))[1]


# ── a folder, without any registry ───────────────────────────────────────────


def test_a_pulled_folder_is_verified_byte_by_byte_without_a_registry(
    signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed.pull()
    monkeypatch.setenv("LORACTL_URL", "http://127.0.0.1:9")
    out = signed.folder / "out"
    verify = ("verify", out, "--key", signed.public)
    found = signed.call(*verify)
    assert (found["verified"], found["series"]) == (True, signed.ref)
    other = signed.call("key", "create", "--out", signed.folder / "other.pem")
    assert signed.call("verify", out, "--key", other["public"], code=1)["verified"] is False
    weights = out / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "has other bytes" in problem(signed.call(*verify, code=1))[1]
    weights.write_bytes(kept)
    (out / "extra.py").write_text("")
    assert "'extra.py' is no file of the version" in problem(signed.call(*verify, code=1))[1]
    (out / "extra.py").unlink()
    config = out / "adapter_config.json"
    config.rename(out.parent / "config")
    assert "'adapter_config.json' is missing" in problem(signed.call(*verify, code=1))[1]
    (out.parent / "config").rename(config)
    manifest = out / BESIDE / "manifest.json"
    body = json.loads(manifest.read_bytes())
    manifest.write_bytes(canonical_json(body | {"base": "b3:" + "0" * 64}))
    assert signed.call(*verify, code=1)["signatures"][0]["reason"].startswith("A signature of")
    shutil.rmtree(out / BESIDE)
    assert "as a pull of a signed version writes it" in problem(signed.call(*verify, code=1))[1]


def test_show_says_how_a_version_came_to_be(signed: Signed, capsys: pytest.CaptureFixture[str]) -> None:
    made = signed.call("show", f"{signed.ref}@v1")["provenance"]
    assert (made["by"], made["job"], made["worker"]) == ("admin", None, None)
    assert run(["show", f"{signed.ref}@v1"]) == run(["log", signed.ref]) == 0
    said = capsys.readouterr().out
    assert "by a person: what its lineage says is their word" in said
    assert "pushed by admin" in said


def test_merging_and_exporting_here_take_nothing_that_no_pinned_key_signed(signed: Signed) -> None:
    other = signed.call("key", "create", "--out", signed.folder / "other.pem")
    signed.call("key", "pin", signed.team, other["public"])
    merged, exported = signed.folder / "merged", signed.folder / "bot.gguf"
    for command in (
        ("merge", f"{signed.ref}:prod", "--local", "--for", signed.base, "--out", merged),
        ("export", f"{signed.ref}:prod", "--for", signed.base, "--out", exported),
    ):
        assert problem(signed.call(*command, code=1))[0] == "not-verified"
    assert not merged.exists() and not exported.exists()


def test_what_is_pulled_unverified_leaves_no_signature_of_an_earlier_version_beside_it(signed: Signed) -> None:
    signed.pull()
    assert (signed.folder / "out" / BESIDE).is_dir()
    signed.push(2)
    assert signed.pull(ref="@v2")["signatures"] == []
    assert [path.name for path in (signed.folder / "out" / BESIDE).iterdir()] == ["pulled.json"]
