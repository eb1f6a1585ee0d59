from cli.jobs import told_rows


def test_what_became_of_rows_is_told_in_words() -> None:
    counted = {"trained": 1200, "held_out": 0, "cut": 0, "dropped": 0, "max_length": 512}
    assert told_rows({}) == ""
    assert told_rows(counted) == "1,200 trained on"
    more = counted | {"held_out": 30, "cut": 7}
    assert told_rows(more) == "1,200 trained on, 30 held out, 7 cut (longer than 512 tokens)"
    assert told_rows(counted | {"dropped": 2}) == "1,200 trained on, 2 dropped (longer than 512 tokens)"
