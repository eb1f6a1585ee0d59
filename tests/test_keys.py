"""Keys: three curves, a passphrase where wanted, and words for what is no key."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from registry.core.errors import BadSignature, BadSigningKey, PassphraseNeeded
from registry.keys import PrivateKey, PublicKey
from tests.core.test_signatures import MANIFEST

KEY = PrivateKey.generate()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_a_key_of_each_curve_signs_holds_by_it_and_by_no_other(curve: ec.EllipticCurve) -> None:
    made = ec.generate_private_key(curve)
    key = PrivateKey(made, PublicKey.of(made.public_key(), "here"))
    again = PrivateKey.parse(key.pem().encode(), "here")
    bundle = again.sign("team/bot", MANIFEST)
    PublicKey.parse(key.public.pem, "here").verify(bundle, "team/bot", MANIFEST)
    with pytest.raises(BadSignature, match="by key"):
        KEY.public.verify(bundle, "team/bot", MANIFEST)


def test_a_name_is_of_the_key_and_not_of_how_its_file_is_written() -> None:
    windows = KEY.public.pem.replace("\n", "\r\n") + "\r\n\r\n"
    assert PublicKey.parse(windows, "here") == KEY.public


def test_who_names_another_key_in_a_bundle_signs_for_nobody() -> None:
    other = PrivateKey.generate()
    bundle = other.sign("team/bot", MANIFEST)
    forged = type(bundle)(KEY.public.fingerprint, bundle.payload, bundle.signature)
    with pytest.raises(BadSignature, match="did not make it"):
        KEY.public.verify(forged, "team/bot", MANIFEST)


def test_a_locked_key_opens_by_its_passphrase_alone() -> None:
    locked = KEY.pem("correct horse").encode()
    assert b"ENCRYPTED" in locked
    assert PrivateKey.parse(locked, "here", "correct horse").public == KEY.public
    with pytest.raises(PassphraseNeeded):
        PrivateKey.parse(locked, "here")
    with pytest.raises(BadSigningKey, match="passphrase is wrong"):
        PrivateKey.parse(locked, "here", "battery staple")
    assert PrivateKey.parse(KEY.pem().encode(), "here", "not needed").public == KEY.public


def test_a_private_key_is_not_taken_for_a_public_one() -> None:
    with pytest.raises(BadSigningKey, match="nobody else may see"):
        PublicKey.parse(KEY.pem(), "here")


def _pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


NO_KEYS = {
    "nothing": b"",
    "text": b"hello",
    "ed25519, which model signing does not take": _pem(ed25519.Ed25519PrivateKey.generate()),
    "another curve": _pem(ec.generate_private_key(ec.SECP256K1())),
    "a broken PEM": KEY.public.pem.encode()[:-40],
}


@pytest.mark.parametrize("data", NO_KEYS.values(), ids=NO_KEYS)
def test_what_is_no_key_is_refused_with_what_is(data: bytes) -> None:
    with pytest.raises(BadSigningKey, match="P-256"):
        PublicKey.parse(data, "here")
    with pytest.raises(BadSigningKey, match="P-256"):
        PrivateKey.parse(data, "here")
