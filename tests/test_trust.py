"""What a client believes without the registry: the version and the base that were asked for."""


import pytest

from registry.core.errors import NotVerified
from registry.core.manifest import Manifest
from registry.core.names import Reference
from registry.trust import Checked
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import adapter_push


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return str(base_of(tiny_base(folder / "a", 1)).digest), str(base_of(tiny_base(folder / "b", 2)).digest)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_base(folder / "base", 1)
    request, _ = adapter_push(tiny_adapter(folder / "bot", base, seed=1), base)
    return Checked("team/bot@v1", "team/bot", Manifest.model_validate(request.manifest), False, ())


BOT = Reference.parse("team/bot:prod")


def test_the_base_that_was_typed_goes_before_the_one_that_the_registry_tells(
    checked: Checked, bases: tuple[str, str]
) -> None:
    mine, other = bases
    assert checked.manifest.base == mine
    checked.require_asked(BOT, mine, mine, "exact", by_name=False)
    checked.require_asked(BOT, mine, "llama@r2", "exact", by_name=False)  # which the registry alone can say
    checked.require_asked(BOT, mine, None, "exact", by_name=False)
    for told in (mine, other):  # a lie, and one that is not even consistent
        with pytest.raises(NotVerified, match="it is bound to"):
            checked.require_asked(BOT, told, other, "exact", by_name=True)
    with pytest.raises(NotVerified, match="it is bound to"):
        checked.require_asked(BOT, other, "llama@r2", "exact", by_name=False)


def test_another_fit_is_the_registrys_word_and_taken_by_name(checked: Checked, bases: tuple[str, str]) -> None:
    _, other = bases
    with pytest.raises(NotVerified, match="taken by --fit derived"):
        checked.require_asked(BOT, other, other, "derived", by_name=False)
    checked.require_asked(BOT, other, other, "derived", by_name=True)


def test_a_digest_names_one_version(checked: Checked, bases: tuple[str, str]) -> None:
    digest = str(checked.manifest.digest)
    for named in (digest, digest[:15]):
        checked.require_asked(Reference.parse(f"team/bot@{named}"), bases[0], None, "exact", by_name=False)
    for named in ("sha256:" + "0" * 64, "sha256:" + "0" * 12):
        with pytest.raises(NotVerified, match="was asked for, the registry gives"):
            checked.require_asked(Reference.parse(f"team/bot@{named}"), bases[0], None, "exact", by_name=False)
