from typing import Any

import pytest

from cli.following import succeeded
from cli.jobs import told_event
from cli.results import told_rows, tried
from registry.core.errors import LoractlError, UnknownModel, WorkFailed
from registry.schemas import JobInfo


def test_what_became_of_rows_is_told_in_words() -> None:
    counted = {"trained": 1200, "held_out": 0, "cut": 0, "dropped": 0, "max_length": 512}
    assert told_rows({}) == ""
    assert told_rows(counted) == "1,200 trained on"
    more = counted | {"held_out": 30, "cut": 7}
    assert told_rows(more) == "1,200 trained on, 30 held out, 7 cut (longer than 512 tokens)"
    assert told_rows(counted | {"dropped": 2}) == "1,200 trained on, 2 dropped (longer than 512 tokens)"


def test_a_rebase_tells_of_its_starts_and_candidates_and_which_was_taken() -> None:
    result = {
        "starts": {"align": {"refused": "no shape"}, "carry": {"score": -0.5}},
        "candidates": {
            "carry": {"steps": 20, "learning_rate": 1e-3, "score": -0.25, "over_scratch": [0.5, 0.25, 0.75]},
            "scratch": {"dropped": "no number"},
        },
        "candidate": "carry",
    }
    rows = tried(result)
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("align", "0", "no shape"), ("carry", "0", ""), ("carry", "20", "taken"), ("scratch", "", "no number"),
    ]  # fmt: skip
    assert rows[2][4] == "0.5 (0.25 to 0.75)"


def ended(error: LoractlError, state: str) -> JobInfo:
    facts = dict.fromkeys(JobInfo.model_fields) | dict.fromkeys(("kind", "queue", "namespace"), "cpu")
    facts |= {"id": "j1", "state": state, "error": error.problem(), "recipe": {}, "output": {}, "names": {}}
    facts |= {"attempt": 1, "max_attempts": 3, "cancel_requested": False, "reused": False}
    facts |= {"created_at": "2026-01-01T00:00:00Z"}
    return JobInfo.model_validate(facts)


def test_a_job_that_failed_tells_what_helps_against_the_refusal() -> None:
    refused = UnknownModel(path="base", kind="new", version="5")
    with pytest.raises(WorkFailed, match="j1 failed") as raised:
        succeeded(ended(refused, "failed"))
    assert refused.message in raised.value.message
    assert refused.hint in raised.value.message


def test_a_cancelled_job_says_so_once() -> None:
    with pytest.raises(WorkFailed) as raised:
        succeeded(ended(WorkFailed(id="j1", reason="cancelled"), "cancelled"))
    assert raised.value.message == "Job j1 failed: cancelled"


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        ("log", {"kind": "log", "line": "Loading weights:  12%|█▎        | 3/25 [00:00<00:01, 20.1it/s]"}, None),
        ("log", {"kind": "log", "line": "0it [00:00, ?it/s]"}, None),
        ("log", {"kind": "log", "line": "  5%|5 |\rthe last word"}, "the last word"),
        ("log", {"kind": "log", "line": "\x1b[31mred\x1b[0m 100% sure"}, "red 100% sure"),
        ("progress", {"kind": "progress", "step": 3, "loss": 0.123456, "rates": {"a": 0.5}, "task": 0, "eta": None},
         "step 3  loss 0.1235  rates a 0.5"),
        ("succeeded", {"made": [{"ref": "team/bot@v1", "digest": "sha256:" + "0" * 64}]}, "made team/bot@v1"),
        ("failed", {"code": "work-failed", "detail": "Job j1 failed: x", "hint": "", "facts": {"id": "j1"}},
         "work-failed  Job j1 failed: x"),
        ("queued", {"by": "ada"}, "by ada"),
    ],
)  # fmt: skip
def test_what_happened_to_a_job_is_told_without_bars_and_braces(
    kind: str, data: dict[str, Any], told: str | None
) -> None:
    assert told_event(kind, data) == told
