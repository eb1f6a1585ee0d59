"""References of a row: other texts that are right."""

import json

import pytest

from registry.core.errors import BadDataset
from registry.core.rows import parse_row


@pytest.mark.parametrize("references", [[], ["b"], ["b", "c d"]])
def test_references_stand_beside_a_completion_or_messages(references: list[str]) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"prompt": "a", "completion": "b"}, {"messages": chat}):
        line = json.dumps(row | {"references": references}).encode()
        assert parse_row(line, "x.jsonl", 1)["references"] == references


@pytest.mark.parametrize("references", ["b", [1], [""], [" "], {"0": "b"}, None])
def test_references_that_are_no_texts_are_refused(references: object) -> None:
    line = json.dumps({"prompt": "a", "completion": "b", "references": references}).encode()
    with pytest.raises(BadDataset, match=r"'x.jsonl', line 3: 'references' must be a list of texts"):
        parse_row(line, "x.jsonl", 3)
