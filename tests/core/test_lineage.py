from hypothesis import given
from hypothesis import strategies as st

from registry.core.lineage import acyclic, ancestors, cycle, descendants

FAMILY = [("child", "mother"), ("child", "father"), ("mother", "grandmother"), ("sibling", "mother")]
EDGES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20)


def test_ancestors_are_nearest_first() -> None:
    assert ancestors("child", FAMILY) == ("mother", "father", "grandmother")


def test_descendants_are_nearest_first() -> None:
    assert descendants("grandmother", FAMILY) == ("mother", "child", "sibling")


@given(EDGES)
def test_one_is_an_ancestor_of_its_descendants(edges: list[tuple[int, int]]) -> None:
    for node in range(9):
        assert all(node in ancestors(below, edges) for below in descendants(node, edges))
        assert node not in ancestors(node, edges)


@given(EDGES)
def test_edges_to_smaller_numbers_have_no_cycle(edges: list[tuple[int, int]]) -> None:
    assert acyclic([(max(a, b) + 1, min(a, b)) for a, b in edges])


@given(EDGES)
def test_a_cycle_that_is_named_is_there(edges: list[tuple[int, int]]) -> None:
    found = cycle(edges)
    assert all(pair in edges for pair in zip(found, (*found[1:], *found[:1]), strict=True))
    assert bool(found) == any(
        a == b or (any(b == x for x, _ in edges) and a in ancestors(b, edges)) for a, b in edges
    )


def test_a_version_made_from_itself_is_a_cycle() -> None:
    assert cycle([("a", "a")]) == ("a",)


def test_a_long_chain_needs_no_deep_stack() -> None:
    chain = [(n, n + 1) for n in range(20_000)]
    assert acyclic(chain)
    assert cycle([*chain, (20_000, 0)])
    assert len(ancestors(0, chain)) == 20_000
