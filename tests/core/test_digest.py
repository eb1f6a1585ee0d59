import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.digest import Digest
from registry.core.errors import BadDigest


@given(st.sampled_from(["sha256", "b3"]), st.binary(min_size=32, max_size=32))
def test_a_digest_printed_and_parsed_is_itself(algorithm: str, raw: bytes) -> None:
    digest = Digest.parse(f"{algorithm}:{raw.hex()}")
    assert Digest.parse(str(digest)) == digest
    assert digest.raw == raw
    assert Digest.of_raw(digest.algorithm, raw) == digest
    assert digest.short == f"{algorithm}:{raw.hex()[:12]}"


@given(st.binary(max_size=100))
def test_sha256_is_sha256(data: bytes) -> None:
    assert Digest.sha256(data).hex == hashlib.sha256(data).hexdigest()


def test_base64_is_as_object_stores_spell_it() -> None:
    assert Digest.sha256(b"").base64 == "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="


ZEROS = "0" * 64


@pytest.mark.parametrize(
    "text", ["", "sha256:", f"sha256:{ZEROS[:-1]}", "sha256:" + "A" * 64, f"md5:{ZEROS}", ZEROS, f"b3:{ZEROS}\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadDigest, match="64 lower-case hexadecimal digits"):
        Digest.parse(text)
