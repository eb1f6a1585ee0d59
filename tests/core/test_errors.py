import pickle
from string import Formatter
from typing import Any

import pytest

from registry.core.errors import (
    AliasMoved,
    BadFile,
    Conflict,
    DoesNotFit,
    Forbidden,
    Gone,
    InternalError,
    Invalid,
    LocalFailure,
    LoractlError,
    NotFound,
    PickleRefused,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownProblem,
    refusals,
)

BRANCHES = (Invalid, Unauthenticated, Forbidden, NotFound, Conflict, Gone, TooLarge, Unavailable, LocalFailure)
OUTSIDE = {UnknownProblem, InternalError}


def made(refusal: type[LoractlError]) -> LoractlError:
    """The refusal with a value for each of its facts."""
    return refusal(**{name: _value(refusal, name) for name in refusal.fact_names()})


def _value(refusal: type[LoractlError], name: str) -> Any:
    """A number where the sentence formats one, else the fact's own name."""
    specs = [spec for _, field, spec, _ in Formatter().parse(refusal.says + refusal.help) if field == name]
    return 7 if any(specs) else f"<{name}>"


@pytest.mark.parametrize("refusal", refusals())
def test_every_refusal_states_its_sentence(refusal: type[LoractlError]) -> None:
    error = made(refusal)
    assert error.message == str(error)
    assert error.message[0] == error.message[0].upper() or error.message[0] in "'<"
    assert "{" not in error.message


@pytest.mark.parametrize("refusal", refusals())
def test_every_refusal_travels_as_json_and_comes_back(refusal: type[LoractlError]) -> None:
    error = made(refusal)
    back = LoractlError.from_problem(error.problem())
    assert (type(back), back.facts, back.message, back.hint) == (refusal, error.facts, error.message, error.hint)


@pytest.mark.parametrize("refusal", refusals())
def test_every_refusal_survives_pickling(refusal: type[LoractlError]) -> None:
    error = made(refusal)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.facts, back.message) == (refusal, error.facts, error.message)


@pytest.mark.parametrize("refusal", refusals())
def test_every_refusal_hangs_on_a_branch(refusal: type[LoractlError]) -> None:
    assert issubclass(refusal, BRANCHES) or refusal in OUTSIDE


def test_codes_are_kebab_case_and_sorted() -> None:
    codes = [refusal.code for refusal in refusals()]
    assert codes == sorted(set(codes))
    assert all(code == code.lower() and " " not in code and "_" not in code for code in codes)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    import registry.core.errors as module

    assert module.__doc__ is not None
    for branch in (*BRANCHES, BadFile, DoesNotFit):
        assert branch.__name__ in module.__doc__


def test_facts_are_attributes_and_more_may_be_given() -> None:
    error = PickleRefused(path="x.bin", size=3)
    assert (error.path, error.size) == ("x.bin", 3)
    assert not hasattr(error, "colour")


def test_a_missing_fact_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="needs the facts"):
        AliasMoved(alias="prod")


def test_two_refusals_cannot_share_a_code() -> None:
    with pytest.raises(TypeError, match="share the code"):
        type("Another", (BadFile,), {"code": "pickle-refused"})


@pytest.mark.parametrize(
    "problem", [{"code": "of-tomorrow", "detail": "No.", "hint": "Wait."}, {"code": "pickle-refused", "facts": {}}, {}]
)
def test_a_problem_of_a_newer_registry_is_shown_as_it_is(problem: dict[str, Any]) -> None:
    error = LoractlError.from_problem(problem)
    assert isinstance(error, UnknownProblem)
    assert str(problem.get("detail")) in error.message
