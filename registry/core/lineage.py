"""Lineage: what a version was made from, and what was made from it.

Edges point from child to parent. Pure graph questions; the rows are read by `registry.db.queries`.
"""

from collections.abc import Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)
Edges = Iterable[tuple[Node, Node]]
"""(child, parent) pairs."""


def ancestors(node: Node, edges: Edges[Node]) -> tuple[Node, ...]:
    """Everything ``node`` was made from, nearest first, each once; ``node`` itself is not among them."""
    return _reached(node, [(child, parent) for child, parent in edges])


def descendants(node: Node, edges: Edges[Node]) -> tuple[Node, ...]:
    """Everything made from ``node``, nearest first, each once; ``node`` itself is not among them."""
    return _reached(node, [(parent, child) for child, parent in edges])


def cycle(edges: Edges[Node]) -> tuple[Node, ...]:
    """A cycle in ``edges`` as the nodes along it, or () when there is none."""
    following = _following(list(edges))
    done: set[Node] = set()
    for root in following:
        path: list[Node] = []
        on_path: set[Node] = set()
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                on_path.discard(path.pop())
                done.add(node)
            elif node in on_path:
                return tuple(path[path.index(node) :])
            elif node not in done:
                path.append(node)
                on_path.add(node)
                stack.append((node, True))
                stack.extend((after, False) for after in following.get(node, ()))
    return ()


def acyclic(edges: Edges[Node]) -> bool:
    """Whether no version is its own ancestor."""
    return not cycle(edges)


def _following(pairs: list[tuple[Node, Node]]) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    for start, end in pairs:
        found.setdefault(start, []).append(end)
    return found


def _reached(node: Node, pairs: list[tuple[Node, Node]]) -> tuple[Node, ...]:
    following = _following(pairs)
    found: dict[Node, None] = {}
    ring = [node]
    while ring:
        ring = [after for start in ring for after in following.get(start, ())]
        ring = [after for after in dict.fromkeys(ring) if after not in found and after != node]
        found |= dict.fromkeys(ring)
    return tuple(found)
