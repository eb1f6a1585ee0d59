"""Signatures: one version has one statement, and nothing else passes for it."""

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.digest import Digest
from registry.core.errors import BadSignature
from registry.core.manifest import FileEntry, Lineage, Manifest
from registry.core.signatures import Bundle, encoded, statement
from registry.keys import PublicKey

GOLDEN = Path(__file__).parents[1] / "golden" / "signed"
DOCUMENT = json.loads((GOLDEN / "bundle.sigstore.json").read_text())
MANIFEST = Manifest.parse((GOLDEN / "manifest.json").read_bytes())
PUBLIC = PublicKey.parse((GOLDEN / "public.pem").read_bytes(), "public.pem")


def test_a_signature_that_the_model_signing_library_verified_holds_here() -> None:
    bundle = Bundle.parse(DOCUMENT, "team/bot")
    PUBLIC.verify(bundle, "team/bot", MANIFEST)
    assert bundle.payload == statement("team/bot", MANIFEST)
    assert bundle.document() == DOCUMENT
    assert bundle.series == "team/bot"


def test_a_statement_is_an_in_toto_statement_over_the_digests_of_the_files_and_of_the_version() -> None:
    said = json.loads(statement("team/bot", MANIFEST))
    digests = [Digest.parse(entry.digest).hex for entry in MANIFEST.files]
    root = Digest.sha256(bytes.fromhex("".join(digests))).hex
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "team/bot", "digest": {"sha256": root}}]
    assert said["predicateType"] == "https://model_signing/signature/v1.0"
    assert [resource["digest"] for resource in said["predicate"]["resources"]] == digests
    assert said["predicate"]["loractl"] == {"version": str(MANIFEST.digest)}


def test_what_is_signed_is_encoded_as_dsse_says() -> None:
    assert encoded(b"hello") == b"DSSEv1 28 application/vnd.in-toto+json 5 hello"


FILE = FileEntry(path="a", size=1, digest=str(Digest.sha256(b"a")))
OTHERS = {
    "another base": {"base": "b3:" + "2" * 64},
    "another configuration": {"config": {"peft_type": "LORA", "r": 8}},
    "another lineage": {"lineage": Lineage(recipe={"kind": "finetune"})},
    "another file": {"files": (*MANIFEST.files[:-1], FILE.model_copy(update={"path": MANIFEST.files[-1].path}))},
    "a file less": {"files": MANIFEST.files[1:]},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_a_signature_covers_base_configuration_and_lineage_too(changes: dict[str, Any]) -> None:
    other = MANIFEST.model_copy(update=changes)
    with pytest.raises(BadSignature, match=str(other.digest)):
        PUBLIC.verify(Bundle.parse(DOCUMENT, "team/bot"), "team/bot", other)


def test_a_signature_of_one_series_is_none_of_another() -> None:
    with pytest.raises(BadSignature, match="it is of 'team/bot'"):
        PUBLIC.verify(Bundle.parse(DOCUMENT, "team/faq"), "team/faq", MANIFEST)


def test_a_statement_of_another_program_names_no_version() -> None:
    said = json.loads(statement("team/bot", MANIFEST))
    del said["predicate"]["loractl"]
    bundle = Bundle("sha256:" + "0" * 64, json.dumps(said).encode(), b"")
    with pytest.raises(BadSignature, match="names no version"):
        bundle.require_of("team/bot", MANIFEST)


def test_a_statement_that_names_the_version_and_lists_other_files_is_refused() -> None:
    said = json.loads(statement("team/bot", MANIFEST))
    said["predicate"]["resources"].pop()
    bundle = Bundle("sha256:" + "0" * 64, json.dumps(said).encode(), b"")
    with pytest.raises(BadSignature, match="other files"):
        bundle.require_of("team/bot", MANIFEST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    ["mediaType"], ["verificationMaterial"], ["verificationMaterial", "publicKey"],
    ["verificationMaterial", "publicKey", "hint"], ["dsseEnvelope"], ["dsseEnvelope", "payload"],
    ["dsseEnvelope", "payloadType"], ["dsseEnvelope", "signatures"], ["dsseEnvelope", "signatures", 0],
    ["dsseEnvelope", "signatures", 0, "sig"],
]  # fmt: skip


@given(st.sampled_from(PLACES), JSON)
def test_a_bundle_with_anything_else_in_it_is_refused_or_does_not_hold(place: list[Any], value: Any) -> None:
    document: Any = copy.deepcopy(DOCUMENT)
    inner = document
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(BadSignature):
        PUBLIC.verify(Bundle.parse(document, "team/bot"), "team/bot", MANIFEST)


@given(JSON)
def test_no_document_breaks_the_reader(document: Any) -> None:
    with pytest.raises(BadSignature):
        Bundle.parse(document, "team/bot")


@given(st.data())
def test_no_flipped_bit_of_statement_or_signature_holds(data: st.DataObject) -> None:
    document = copy.deepcopy(DOCUMENT)
    envelope = document["dsseEnvelope"]
    holder, name = data.draw(st.sampled_from([(envelope, "payload"), (envelope["signatures"][0], "sig")]))
    raw = bytearray(base64.b64decode(holder[name]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    holder[name] = base64.b64encode(raw).decode()
    with pytest.raises(BadSignature):
        PUBLIC.verify(Bundle.parse(document, "team/bot"), "team/bot", MANIFEST)
