"""The benchmark of waiting lines: every right line counts, and no other."""

import hashlib
import json
import time
from collections import Counter

import pytest
from mini import ROOT, write_lines

import eval as cli
from dev import make_benchmarks
from experiment.lmeval import scorer
from tasks import DataError, build_task
from tasks.lines import IN_WORDS, RIGHT, SPEC, right_lines, target
from utils import lines_names

FOLDER = ROOT / "assets" / "benchmarks"
DOCS = [json.loads(line) for line in (FOLDER / "lines.jsonl").read_text().splitlines()]
LINE = {"line": "Ada, Ben, Cleo, Dan", "name": "", "place": 0, "request": "-", "answer": "-"}


@pytest.fixture(scope="module")
def score():
    """(document, answer) -> 0 or 1, by the task's own filter."""
    return scorer(build_task(SPEC, FOLDER, "chat"), SPEC.headline)


@pytest.mark.parametrize(
    "kind, name, place, n_right, right, wrong",
    [
        ("reverse", "", 0, 1, ["Dan, Cleo, Ben, Ada"], ["Ada, Ben, Cleo, Dan", "Dan, Cleo, Ben"]),
        (
            "shuffle",
            "",
            0,
            23,
            ["Cleo, Ada, Dan, Ben", "Ada, Ben, Dan, Cleo"],
            [
                "Ada, Ben, Cleo, Dan",
                "Ada, Ada, Cleo, Dan",
                "Ada, Ben, Cleo",
                "Ada, Ben, Cleo, Dan, Eve",
            ],
        ),
        (
            "insert",
            "Eve",
            0,
            5,
            ["Eve, Ada, Ben, Cleo, Dan", "Ada, Ben, Eve, Cleo, Dan", "Ada, Ben, Cleo, Dan, Eve"],
            ["Ada, Ben, Cleo, Dan", "Eve, Ada, Ben, Cleo, Dan, Eve", "Ada, Eve, Cleo, Ben, Dan"],
        ),
        (
            "insert_at",
            "Eve",
            3,
            1,
            ["Ada, Ben, Eve, Cleo, Dan"],
            ["Ada, Eve, Ben, Cleo, Dan", "Ada, Ben, Eve, Dan"],
        ),
        (
            "replace",
            "Eve",
            3,
            1,
            ["Ada, Ben, Eve, Dan"],
            ["Ada, Eve, Cleo, Dan", "Ada, Ben, Cleo, Eve, Dan"],
        ),
        (
            "replace_any",
            "Eve",
            0,
            4,
            ["Eve, Ben, Cleo, Dan", "Ada, Ben, Cleo, Eve"],
            ["Eve, Eve, Cleo, Dan", "Ada, Ben, Cleo, Dan", "Eve, Ada, Cleo, Dan"],
        ),
        (
            "first_or_last_two",
            "",
            0,
            2,
            ["Ben, Ada, Cleo, Dan", "Ada, Ben, Dan, Cleo"],
            ["Ada, Ben, Cleo, Dan", "Ada, Ada, Cleo, Dan", "Ben, Ada, Dan, Cleo"],
        ),
        (
            "first_three",
            "",
            0,
            5,
            ["Cleo, Ada, Ben, Dan", "Ada, Cleo, Ben, Dan"],
            ["Ada, Ben, Cleo, Dan", "Ben, Ada, Ben, Dan", "Dan, Ada, Ben, Cleo"],
        ),
    ],
)
def test_every_right_line_of_a_kind_counts_and_no_other(
    score, kind, name, place, n_right, right, wrong
):
    doc = LINE | {"kind": kind, "name": name, "place": place}
    assert len(set(right_lines(doc))) == n_right
    assert [score(doc, text) for text in right] == [1.0] * len(right)
    malformed = ["", "Ada Ben Cleo Dan", ", ".join(["Ada"] * 4), "I cannot do that.", "Eve"]
    malformed += [right[0].replace(", ", ", , ", 1), right[0].replace(", ", " ", 1)]
    assert [score(doc, text) for text in wrong + malformed] == [0.0] * len(wrong + malformed)


@pytest.mark.parametrize(
    "answer",
    [
        "Ada, Ben, Cleo.",
        "Ada,Ben,Cleo<|im_end|>junk",
        "Ada, Ben, and Cleo",
        "The new line is Ada, Ben and Cleo.",
        "**New line:** Ada, Ben, Cleo",
        "Sure! Here it is:\n\nAda, Ben, Cleo\n\nI hope that this helps.",
        "The line: Cleo, Ben, Ada\nReversed: Ada, Ben, Cleo",
        "```\nAda, Ben, Cleo\n```",
        '["Ada", "Ben", "Cleo"]',
        "['Ada', 'Ben', 'Cleo']",
        "1. Ada\n2. Ben\n3. Cleo",
        "The line:\n- Ada\n\n- Ben\n\n- Cleo",
        "Ada\nBen\nCleo",
        "Ada -> Ben -> Cleo",
        "1. Ada, 2. Ben, 3. Cleo",
        "<think>Cleo, Ben, Ada</think>\nAda, Ben, Cleo",
    ],
)
def test_the_names_are_read_as_a_careful_reader_does(answer):
    assert lines_names(answer) == ["Ada", "Ben", "Cleo"]


@pytest.mark.parametrize(
    "answer", ["Ada Ada, Ben, Cleo", "Ada, , Ben", ", Ada, Ben", "Ada, Ben, 3", "ada, ben", ""]
)
def test_a_line_that_is_no_list_is_not_read_in_part(answer):
    """A part of "Ada Ada, Ben" may be right, and hide what parallel decoding has broken."""
    assert lines_names(answer) == []


def test_a_name_on_a_line_of_its_own_counts():
    assert lines_names("Ada, Ben, Cleo\nDan") == ["Dan"]


def test_a_long_answer_is_read_in_linear_time():
    start = time.process_time()
    for text in ("Ada, " * 200_000, "is " * 300_000, "\n" * 1_000_000, "Ada" + " " * 1_000_000):
        lines_names(text)
    assert time.process_time() - start < 2


def test_reference_answers_are_right_and_their_corruptions_wrong(score):
    """A double, a missing and an extra name at each place."""
    for doc in DOCS:
        names = doc["answer"].split(", ")
        assert score(doc, doc["answer"]) == 1.0
        stranger = next(n for n in make_benchmarks.NAMES if n not in (*names, doc["name"]))
        for i in range(len(names)):
            corrupted = [[*names[:i], *names[i + 1 :]], [*names[:i], stranger, *names[i:]]]
            corrupted += [[*names[:i], names[i - 1], *names[i + 1 :]]]
            corrupted += [[*names[:i], names[i], *names[i:]]]
            for wrong in corrupted:
                text = ", ".join(wrong)
                assert score(doc, text) == 0.0, (doc, text)


def test_a_copy_gains_nothing_and_a_choice_remains(score):
    for doc in DOCS:
        assert score(doc, doc["line"]) == 0.0, doc
        assert (len(set(right_lines(doc))) > 1) == (doc["kind"] in IN_WORDS), doc


def test_an_unchanged_line_is_wrong_where_names_repeat():
    doc = LINE | {"line": "Ada, Ada, Ben, Cleo", "kind": "shuffle"}
    assert doc["line"] not in right_lines(doc)


def test_the_kinds_take_turns():
    """So that --limit keeps them in equal parts."""
    assert [doc["kind"] for doc in DOCS] == [list(RIGHT)[i % 8] for i in range(150)]
    assert set(make_benchmarks.REQUESTS) == set(RIGHT)
    assert max(Counter(doc["answer"] for doc in DOCS).values()) == 1


def test_the_committed_file_is_the_original():
    assert hashlib.sha256((FOLDER / "lines.jsonl").read_bytes()).hexdigest() == (
        SPEC.sources[0].sha256
    )


@pytest.mark.parametrize(
    "kind, name, told",
    [
        ("shuffle", "", "any other order of Ada, Ben, Cleo, Dan"),
        ("insert", "Eve", "Ada, Ben, Cleo, Dan, with Eve at any place"),
        ("reverse", "", "Dan, Cleo, Ben, Ada"),
    ],
)
def test_a_target_says_what_is_right(kind, name, told):
    doc = LINE | {"kind": kind, "name": name}
    doc["answer"] = right_lines(doc)[0]
    assert target(doc) == {"kind": kind, "right": told}


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"kind": "sort"}, "line 1: field 'kind' does not match"),
        ({"line": "Ada, Ben"}, "line 1: field 'line' does not match"),
        ({"answer": "Ada, Ben, Cleo, Dan"}, "the answer 'Ada, Ben, Cleo, Dan' is not right"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, problem):
    row = LINE | {"kind": "reverse", "answer": "Dan, Cleo, Ben, Ada"} | change
    write_lines(tmp_path / "lines.jsonl", [row])
    counts = {"name": "own", "counts": {"lines.jsonl": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps(counts))
    with pytest.raises(DataError, match=problem.replace("(", "\\(")):
        build_task(SPEC, tmp_path, "chat")


def run(tmp_path, *options: str) -> int:
    argv = ["--model_alias", "tiny-llada", "--task", "lines", "--output_dir", str(tmp_path / "out")]
    return cli.main([*argv, "--device", "cpu", *options])


def test_predictions_are_scored_with_kind_and_target_in_each_sample(tmp_path):
    """Accuracy by kind can be read from the result."""
    texts = [{"doc_id": i, "text": DOCS[i]["answer"] if i % 2 else "Ada"} for i in range(16)]
    file = write_lines(tmp_path / "texts.jsonl", texts)
    options = ["--data_dir", str(FOLDER), "--limit", "16", "--predictions", str(file)]
    assert run(tmp_path, *options) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert (result["headline"]["metric"], result["headline"]["value"]) == ("acc,names", 0.5)
    assert result["headline"]["ci95"][0] == pytest.approx(0.28, abs=0.01)  # Wilson's
    sample = result["samples"][9]
    assert sample["target"] == target(DOCS[9]) and sample["target"]["kind"] == "shuffle"
    assert sample["extracted"] == {"names": DOCS[9]["answer"]}


def test_the_embedded_checkpoints_run_it(tmp_path):
    assert run(tmp_path, "--data_dir", str(FOLDER), "--limit", "2") == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["status"] == "complete"


def test_one_line_says_where_the_data_are(tmp_path, capsys, monkeypatch):
    """Without --data_dir, and with the directory of the other benchmarks' original files."""
    monkeypatch.delenv("DLLMEXP_DATA_DIR", raising=False)
    assert run(tmp_path) == 4
    assert run(tmp_path, "--data_dir", str(tmp_path)) == 4
    errors = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert errors == [
        "error: lines has no data set on the hub; --data_dir DIR reads lines.jsonl; "
        f"{FOLDER} has it",
        f"error: {tmp_path / 'lines.jsonl'} does not exist; {FOLDER} has it",
    ]


def test_worked_examples_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--data_dir", str(FOLDER), "--num_fewshot", "1") == 2
    assert "--num_fewshot 1: lines has no documents for worked" in capsys.readouterr().err
