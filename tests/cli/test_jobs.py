from cli.jobs import told_rows, tried


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
