"""experiment/diagnostics.py: shares of samples whose format looks wrong."""

from experiment.diagnostics import diagnostics


def sample(text="a", reason="end_token", committed=(0, 1), status="ok", code=None):
    extracted = {} if code is None else {"extracted": {"create_test": code}}
    return {
        "status": status,
        "text": text,
        "finish_reason": reason,
        "committed_at": list(committed),
    } | extracted


def test_shares_and_warnings():
    samples = [sample() for _ in range(7)] + [
        sample(" \n"),
        sample(reason="length"),
        sample(reason="stop_string"),
    ]
    found = diagnostics(samples, code=False)
    assert found["empty"] == {"n": 1, "of": 10, "share": 0.1} and found["warnings"] == []
    found = diagnostics([*samples, sample(""), sample(reason="length")], code=False)
    assert found["warnings"] == [
        "2 of 12 answers are empty",
        "2 of 12 answers fill the canvas without an end token: a longer --gen_length may be needed",
    ]


def test_open_positions_after_the_end_are_no_residual_masks():
    samples = [
        sample(committed=(0, -1)),
        sample(reason="length", committed=(0, -1)),
        sample(reason="length"),
    ]
    assert diagnostics(samples, code=False)["residual_masks"]["n"] == 1


def test_code_that_does_not_parse_or_is_missing():
    samples = [
        sample(code="x = 1"),
        sample(code="x ="),
        sample(code=""),
        sample(code="# only a comment"),
        sample(),
    ]
    assert diagnostics(samples, code=True)["unparseable_code"] == {"n": 4, "of": 5, "share": 0.8}


def test_failed_samples_and_given_texts_are_left_out():
    samples = [sample(status="error", text=""), sample(reason=None)]
    assert diagnostics(samples, code=False) == {
        "empty": {"n": 0, "of": 1, "share": 0.0},
        "warnings": [],
    }
    assert diagnostics([], code=True) == {"warnings": []}


def test_an_end_token_that_is_committed_before_any_other_position_is_counted():
    """Dream over the whole canvas at temperature 0 does so, and ends answers early."""

    def ended(ids, committed):
        return sample(committed=committed) | {"token_ids": ids, "cut": "end token 9"}

    samples = [
        ended([5, 9, 9], [1, 0, 2]),
        ended([5, 9, 8], [1, 2, 0]),  # a second end token
        ended([5, 9, 9], [0, 0, 1]),
        ended([5, 9, 0], [0, 1, -1]),
        sample(reason="length", committed=(0, 1)) | {"token_ids": [5, 9], "cut": None},
    ]
    found = diagnostics(samples, code=False)
    assert found["end_token_first"] == {"n": 2, "of": 5, "share": 0.4}
    text = "2 of 5 answers have an end token that was committed before any other position"
    assert text in found["warnings"]
