"""Rows of datasets and suites: one JSON object a line.

    {"prompt": "2+2=", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2=", "choices": [" 3", " 4"], "answer": 1}            only in suites

In a dataset, what is only read and never learnt from (retained inputs, the pool of a gate) may lack its answer:

    {"prompt": "2+2="}
    {"prompt": "2+2=", "choices": [" 3", " 4"]}

Rows of the first two forms may hold "references": other texts that are right, too. What a model writes is compared
with the completion and with each of them; training and likelihood look at the completion alone.
"""

import json
from typing import Any

from .errors import BadDataset

MAX_LINE_BYTES = 16 << 20


def parse_row(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The row in one line; `BadDataset` says what is wrong with it."""
    value = parse_value(line, path, number)
    if problem := row_problem(value):
        raise BadDataset(path=path, line=number, reason=problem)
    row: dict[str, Any] = value
    return row


def parse_input(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The row in one line, which may lack its answer; `BadDataset` says what is wrong with it."""
    value = parse_value(line, path, number)
    row: dict[str, Any] = value
    if problem := row_problem(_answered(value)):
        raise BadDataset(path=path, line=number, reason=problem)
    return row


def _answered(value: Any) -> Any:
    """The value with an answer where it is an input that lacks one, so that the rest of it can be looked at."""
    match value:
        case {"prompt": str(), "choices": list()} if "answer" not in value:
            return {**value, "answer": 0}
        case {"prompt": str()} if "completion" not in value and "choices" not in value:
            return {**value, "completion": "?"}
    return value


def input_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row asks, without any answer: rows that ask the same are one input."""
    if "messages" in row:
        return {"messages": row["messages"][:-1]}
    return {name: row[name] for name in ("prompt", "choices") if name in row}


def parse_object(line: bytes, path: str, number: int) -> dict[str, Any]:
    """The JSON object in one line, of whatever form: what a task of lm-eval makes its questions of."""
    value = parse_value(line, path, number)
    if not isinstance(value, dict):
        raise BadDataset(path=path, line=number, reason="not a JSON object")
    return value


def parse_value(line: bytes, path: str, number: int) -> Any:
    """What one line says as JSON; `BadDataset` when it is none, or too long."""
    if len(line) > MAX_LINE_BYTES:
        raise BadDataset(path=path, line=number, reason=f"{len(line)} bytes; at most {MAX_LINE_BYTES} are allowed")
    try:
        return json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadDataset(path=path, line=number, reason=f"not JSON: {error}") from error


def row_problem(value: Any) -> str | None:
    """Why ``value`` is not a row; None when it is one."""
    match value:
        case {"messages": list(messages)}:
            return _messages_problem(messages) or _references_problem(value)
        case {"prompt": str(), "completion": str(completion)}:
            return _references_problem(value) if completion else "the completion is empty"
        case {"prompt": str(), "choices": list(choices), "answer": answer}:
            if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
                return "'choices' must be two or more texts, none of them empty"
            if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
                return f"'answer' is {json.dumps(answer)}; allowed are 0 to {len(choices) - 1}"
            return None
        case dict():
            return "expected the texts 'prompt' and 'completion', or 'messages', or 'prompt', 'choices' and 'answer'"
        case _:
            return "not a JSON object"


def _references_problem(value: dict[str, Any]) -> str | None:
    found = value.get("references", [])
    if isinstance(found, list) and all(isinstance(text, str) and text.strip() for text in found):
        return None
    return "'references' must be a list of texts, none of them empty"


def _messages_problem(messages: list[Any]) -> str | None:
    turns = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not turns or len(messages) < 2:
        return "'messages' must be two or more objects with the texts 'role' and 'content'"
    if messages[-1]["role"] != "assistant":
        return f"the last message is by '{messages[-1]['role']}'; it must be the assistant's"
    return None if messages[-1]["content"] else "the completion is empty"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
