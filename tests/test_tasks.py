"""The four benchmarks through lm-eval: data, prompts and scores.

Tests on the original files use the fixture `benchmarks`; the others make small sets of their own.
"""

import ast
import errno
import gzip
import json
import os
import random
import re
import socket
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import eval as command
from experiment.lmeval import scorer
from sandbox import judge_many
from tasks import (
    DataError,
    build_task,
    check_data,
    data_checksums,
    gsm8k,
    humaneval,
    load_data,
    mbpp,
    truthfulqa,
)
from tasks.base import installed_config
from tasks.code import add_strict, opencompass, use_extraction
from tasks.installed import spec_of
from tasks.programs import called_names
from utils import GSM8K_NUMBER, UsageError, humaneval_program, mbpp_program

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape")  # in MBPP's own code
SPECS = {m.SPEC.name: m.SPEC for m in (humaneval, mbpp, gsm8k, truthfulqa)}
FENCE = "```"
PASS = "pass@1,create_test"
STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"
NUMERIC = "exact_match,numeric"


def wrapped(code: str) -> str:
    return (
        f"Sure! Here is the function:\n\n{FENCE}python\n{code}\n{FENCE}\n\n"
        "It works as follows.<|im_end|>junk"
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing may be asked of any host: every connection is an error that says so."""

    def refuse(self, address):
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    """A set of its own with a manifest: two or three rows per benchmark."""
    folder = tmp_path_factory.mktemp("mini")
    write_mini(folder)
    return folder


def write_mini(folder: Path) -> None:
    def jsonl(rows: list[dict]) -> bytes:
        return "".join(json.dumps(r) + "\n" for r in rows).encode()

    (folder / "gsm8k").mkdir()
    row = {
        "task_id": "Mini/0",
        "entry_point": "double",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    other = row | {
        "task_id": "Mini/1",
        "test": "def check(candidate):\n    assert candidate('a') == 'aa'\n",
    }
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(jsonl([row, other])))
    code = (
        "class Node:\r\n    def __init__(self, x):\r\n        self.x = x\r\n"
        "def get(node):\r\n    return node.x\r\n"
    )
    row = {
        "text": "Write a function to get x.",
        "code": code,
        "task_id": 11,
        "challenge_test_list": [],
        "test_list": [
            "assert get(root) == 1",
            "assert get(Node(2)) == 2",
            "assert get(Node(3)) == 3",
        ],
        "test_setup_code": "root = Node(1)",
    }
    (folder / "mbpp.jsonl").write_bytes(jsonl([row | {"task_id": i} for i in (2, 11, 12)]))
    rows = [
        {"question": f"What is 999 plus {i}?", "answer": f"It is {999 + i:,}.\n#### {999 + i:,}"}
        for i in range(11)
    ]
    (folder / "gsm8k/test.jsonl").write_bytes(jsonl(rows[:3]))
    (folder / "gsm8k/train.jsonl").write_bytes(jsonl(rows[3:]))
    columns = ",".join(truthfulqa.COLUMNS)
    line = (
        "Adversarial,Birds,Do pigs fly?,No they do not,No they do not; Pigs cannot fly,"
        "Yes; They fly at night,none"
    )
    (folder / "TruthfulQA.csv").write_text(f"\ufeff{columns}\n{line}\n", encoding="utf-8")
    counts = {
        "HumanEval.jsonl.gz": 2,
        "mbpp.jsonl": 3,
        "gsm8k/test.jsonl": 3,
        "gsm8k/train.jsonl": 8,
        "TruthfulQA.csv": 1,
    }
    (folder / "manifest.json").write_text(json.dumps({"name": "mini", "counts": counts}))


@cache
def answering_lm():
    from lm_eval.api.model import LM

    class AnsweringLM(LM):
        """Answers by a function of the document; renders chats so that a test can read them."""

        tokenizer_name = "none"

        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def generate_until(self, requests):
            return [self.answer(r.doc) for r in requests]

        def apply_chat_template(self, chat, add_generation_prompt=True):
            # LLaDA's template would trim a prefill that it renders
            assert add_generation_prompt
            return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat) + "<assistant>"

        def loglikelihood(self, requests):
            raise AssertionError("these benchmarks generate")

        loglikelihood_rolling = loglikelihood

    return AnsweringLM


def evaluate(task, answer, *, chat=True, limit=None) -> tuple[dict, list[dict]]:
    """(metrics, samples) of lm-eval's evaluator."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        # it runs a dozen commands, for seconds
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        results = evaluator.simple_evaluate(
            answering_lm()(answer),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=False,
            limit=limit,
        )
    return results["results"][task.task_name], results["samples"][task.task_name]


# ---------------------------------------------------------------- a set of one's own


@pytest.mark.parametrize(
    ("spec", "form"), [(s, f) for s in (gsm8k.SPEC, truthfulqa.SPEC) for f in s.forms]
)
@pytest.mark.parametrize("text", ["#### 1,000", "No, pigs do not fly.", "Yes, pigs can fly.", ""])
def test_an_answer_scored_alone_counts_what_it_counts_in_the_end(mini, spec, form, text):
    """What progress shows of a run that goes on is what its result will say."""
    task = build_task(spec, mini, form)
    metric, _, chain = spec.headline.partition(",")
    whole = {
        s["doc_id"]: s[metric] for s in evaluate(task, lambda doc: text)[1] if s["filter"] == chain
    }
    score = scorer(task, spec.headline)
    assert {i: score(doc, text) for i, doc in enumerate(task.eval_docs)} == whole


@pytest.mark.parametrize("form", humaneval.FORMS)
def test_humaneval_scores_each_form(mini, form):
    task = build_task(humaneval.SPEC, mini, form)
    metrics, samples = evaluate(task, lambda doc: doc["canonical_solution"], chat=form != "lm_eval")
    assert metrics[PASS] == 1.0
    (verdict,) = samples[0]["filtered_resps"]
    assert set(verdict) == {
        "program",
        "candidate",
        "how",
        "why_cut",
        "passed",
        "reason",
        "detail",
        "tier",
        "seconds",
        "cpu_seconds",
    }
    assert (
        verdict["program"].startswith(verdict["candidate"].rstrip())
        and "check(double)" in verdict["program"]
    )
    task = build_task(humaneval.SPEC, mini, form)
    metrics, samples = evaluate(
        task, lambda doc: wrapped("def double(x):\n    return 4\n"), chat=form != "lm_eval"
    )
    assert metrics[PASS] == 0.5
    assert [s["filtered_resps"][0]["reason"] for s in samples] == ["passed", "assertion"]


def test_the_strict_metric_is_there_only_where_it_was_asked_for(mini):
    forged = "class Equal:\n    __eq__ = lambda *_: True\ndef double(x):\n    return Equal()\n"
    plain, _ = evaluate(build_task(humaneval.SPEC, mini, "chat"), lambda doc: forged)
    strict, samples = evaluate(
        add_strict(build_task(humaneval.SPEC, mini, "chat")), lambda doc: forged
    )
    assert plain[PASS] == strict[PASS] == 1.0 and strict["pass@1_strict,create_test"] == 0.0
    assert [s["filtered_resps"][0]["strict"]["reason"] for s in samples] == ["opaque", "opaque"]
    assert not any("strict" in key for key in plain)


CODE = "def get(my_node):\n    # between [BEGIN] and [DONE]\n    return my_node.x"


@pytest.mark.parametrize(
    "answer",
    [
        "[BEGIN]\n 'CODE' \n[DONE] \n\n ",
        "[BEGIN]\n 'CODE \n[DONE]",
        "[BEGIN]\n CODE' \n[DONE]",
        "BEGIN\n 'CODE' \nDONE",
        "[BEGIN]\n 'CODE' \nDONE]",
        "[BEGIN]\n 'CODE",
        f"{FENCE}python\nCODE\n{FENCE}",
        f"So:\n{FENCE}\nCODE",
    ],
)
def test_opencompass_reads_mbpps_answers(answer):
    code = CODE.replace("    # between [BEGIN] and [DONE]\n", "")
    assert opencompass({}, answer.replace("CODE", code)) == code
    assert opencompass({}, answer.replace("CODE", code.replace("_", "\\_"))) == code


def test_an_official_score_is_by_the_authors_extraction(mini):
    """OpenCompass's does not read a body, an open fence, or prose around unfenced code."""
    good = "def double(x):\n    return 2 * x\n"
    answers = {f"{FENCE}python\n{good}{FENCE}": 1.0, "    return 2 * x\n": 0.0, f"So\n{good}": 0.0}
    for answer, value in answers.items():
        task = use_extraction(build_task(humaneval.SPEC, mini, "opencompass"), "opencompass")
        (sample, _), key = evaluate(task, lambda doc, answer=answer: answer)[1], "pass@1"
        assert (sample[key], sample["pass@1_ours"]) == (value, 1.0)
        (verdict,) = sample["filtered_resps"]
        assert verdict["how"] == "opencompass" and verdict["ours"]["passed"]


def test_an_official_run_is_scored_by_the_authors_extraction(mini, tmp_path):
    """With our extraction's score beside it; a uniform run has ours alone."""
    rows = [json.dumps({"doc_id": i, "text": "    return 2 * x\n"}) for i in (0, 1)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    words = f"--model_alias llada --task humaneval --data_dir {mini} --output_dir {tmp_path}"
    for protocol in ("official", "uniform"):
        more = f" --predictions {tmp_path}/texts.jsonl --protocol {protocol} --overwrite"
        assert command.main((words + more).split()) == 0
    found = {}
    for path in tmp_path.glob("llada_humaneval_*.json"):
        result = json.loads(path.read_text())
        found[result["protocol"]["name"]] = {k: v["value"] for k, v in result["metrics"].items()}
    ours = "pass@1_ours,create_test"
    assert found == {"official": {PASS: 0.0, ours: 1.0}, "uniform": {PASS: 1.0}}


@pytest.mark.parametrize("form", mbpp.FORMS)
def test_mbpp_runs_the_set_up_code_after_the_program(mini, form):
    """lm-eval leaves test_setup_code out, so that task 367 cannot be solved."""
    task = build_task(mbpp.SPEC, mini, form)
    for answer in (lambda doc: doc["code"], lambda doc: wrapped(doc["code"])):
        metrics, samples = evaluate(
            build_task(mbpp.SPEC, mini, form), answer, chat=form != "lm_eval"
        )
        assert metrics[PASS] == 1.0 and len(samples) == 2
    assert [doc["task_id"] for doc in task.eval_docs] == [11, 12]


@pytest.mark.parametrize(
    "text, strict, flexible, numeric",
    [
        ("It is 999.\n#### 999", True, True, True),
        ("#### 0999", False, False, True),
        ("#### 999.00", False, False, True),
        ("So the answer is $999.", False, True, True),
        ("The answer is 999 eggs. 3 are white.", False, False, True),
        ("Question: How much?\n\nAnswer: 111*9 = 999.", False, True, True),
        ("999, no wait, 1000", False, False, False),
        ("", False, False, False),
    ],
)
def test_gsm8k_reads_the_last_number(mini, text, strict, flexible, numeric):
    task = build_task(gsm8k.SPEC, mini, "chat")
    metrics, _ = evaluate(task, lambda doc: text, limit=1)
    assert (metrics[STRICT], metrics[FLEXIBLE], metrics[NUMERIC]) == (strict, flexible, numeric)


def test_chat_forms_have_no_stop_strings(mini):
    """A chat answer may begin with "Question:", or with a lead-in and a blank line."""
    for spec in SPECS.values():
        assert build_task(spec, mini, "chat").config.generation_kwargs["until"] == []


@pytest.mark.parametrize("form", gsm8k.FORMS)
def test_gsm8k_numbers_are_read_by_lm_evals_pattern(form):
    """With another pattern a score is no longer comparable with published ones."""
    (chain,) = [
        chain
        for chain in installed_config(gsm8k.FORMS[form].yaml)["filter_list"]
        if chain["name"] == "flexible-extract"
    ]
    assert chain["filter"][0]["regex_pattern"] == GSM8K_NUMBER


@pytest.mark.parametrize("text", ["#### 1,000", "#### 1000", "#### $1,000", "#### 1000."])
def test_thousands_are_read_with_and_without_a_comma(mini, text):
    metrics, samples = evaluate(build_task(gsm8k.SPEC, mini, "chat"), lambda doc: text)
    scores = [s["exact_match"] for s in samples if s["filter"] == "flexible-extract"]
    assert scores == [0.0, 1.0, 0.0]  # the answers are 999, 1,000 and 1,001


def test_truthfulqa_drops_a_leading_a_and_later_questions(mini):
    answer = "\n\nA: No they do not\n\nQ: Do cows?\nA: Yes"
    cleaned, samples = evaluate(build_task(truthfulqa.SPEC, mini, "chat"), lambda doc: answer)
    assert samples[0]["filtered_resps"] == ["No they do not"]
    assert cleaned["bleu_acc,none"] == cleaned["rougeL_acc,none"] == 1.0
    assert samples[0]["doc"]["correct_answers"] == [
        "No they do not.",
        "Pigs cannot fly.",
        "I have no comment.",
    ]
    raw, samples = evaluate(build_task(truthfulqa.SPEC, mini, "lm_eval"), lambda doc: answer)
    assert (
        samples[0]["filtered_resps"] == [answer]
        and raw["rougeL_max,none"] < cleaned["rougeL_max,none"]
    )


def test_a_prefill_is_kept_out_of_the_prompt_and_ends_with_its_newline(mini):
    task = build_task(mbpp.SPEC, mini, "instruct")
    _, samples = evaluate(task, lambda doc: doc["code"])
    assert task.prefill(samples[0]["doc"]) == f"Here is the completed function:\n{FENCE}python\n"
    assert "completed function" not in samples[0]["arguments"][0][0]
    task = build_task(humaneval.SPEC, mini, "instruct")
    doc = task.eval_docs[0]
    assert task.prefill(doc) == f"Here is the completed function:\n{FENCE}python\n{doc['prompt']}\n"
    assert build_task(humaneval.SPEC, mini, "chat").prefill(doc) == ""


def test_examples_are_turns_where_the_form_says_so(mini):
    _, samples = evaluate(build_task(mbpp.SPEC, mini, "opencompass"), lambda doc: doc["code"])
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("<user>") == 4 and prompt.count("<assistant>") == 4
    assert "<assistant>[BEGIN]\n 'def similar_elements" in prompt
    _, samples = evaluate(build_task(gsm8k.SPEC, mini, "lm_eval", 2), lambda doc: "")
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("<user>") == 1 and prompt.count("Question:") == 3


def test_the_number_of_examples_can_be_set(mini):
    task = build_task(mbpp.SPEC, mini, "chat", 2)
    _, samples = evaluate(task, lambda doc: doc["code"])
    assert samples[0]["arguments"][0][0].count("You are an expert") == 3
    with pytest.raises(
        DataError, match="--num_fewshot 4: mbpp has 3 worked examples; give at most 3"
    ):
        build_task(mbpp.SPEC, mini, "chat", 4)
    with pytest.raises(ValueError, match="num_fewshot is -1"):
        build_task(mbpp.SPEC, mini, "chat", -1)


def test_the_task_never_decides_the_canvas(mini):
    """humaneval's definition says max_gen_toks 1024, which would win over any canvas."""
    for spec in SPECS.values():
        for form in spec.forms:
            assert set(build_task(spec, mini, form).config.generation_kwargs) == {
                "until",
                "do_sample",
            }


def test_an_unknown_form_lists_what_there_is(mini):
    with pytest.raises(
        ValueError, match="unknown prompt form 'chatty'; gsm8k has: chat, lm_eval, cot"
    ):
        build_task(gsm8k.SPEC, mini, "chatty")


# ---------------------------------------------------------------- data that is not as it should be


@pytest.fixture
def broken(tmp_path) -> Path:
    write_mini(tmp_path)
    return tmp_path


def rewrite(path: Path, line: int, text: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8")


def row(path: Path, line: int) -> dict:
    return json.loads(path.read_text(encoding="utf-8").split("\n")[line - 1])


@pytest.mark.parametrize("name", SPECS)
def test_a_good_set_has_no_problems(mini, name):
    assert check_data(SPECS[name], mini) == []
    assert check_data(SPECS[name], None) == []
    assert load_data(SPECS[name], mini).name == "mini"
    assert set(data_checksums(SPECS[name], mini)) == {*SPECS[name].files, "manifest.json"}
    assert data_checksums(SPECS[name], None) == {}


@pytest.mark.parametrize("name", SPECS)
def test_without_a_manifest_it_must_be_the_originals(broken, name):
    (broken / "manifest.json").unlink()
    assert "rows, expected" in check_data(SPECS[name], broken)[0]


@pytest.mark.parametrize("name", SPECS)
def test_missing_files_are_all_named(tmp_path, name):
    spec = SPECS[name]
    assert check_data(spec, tmp_path) == [f"{tmp_path / f} does not exist" for f in spec.files]
    (problem,) = check_data(spec, tmp_path / "nowhere")
    assert "does not exist" in problem and spec.files[0] in problem
    with pytest.raises(DataError):
        build_task(spec, tmp_path, "chat")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: '{"task_id": 11,', "line 2: not JSON"),
        (lambda r: "[]", "line 2: not a JSON object"),
        (lambda r: '"text"', "line 2: not a JSON object"),
        (
            lambda r: json.dumps({k: v for k, v in r.items() if k != "test_list"}),
            "line 2: field 'test_list' is missing",
        ),
        (
            lambda r: json.dumps(r | {"task_id": "11"}),
            "line 2: field 'task_id': expected an integer, got '11'",
        ),
        (
            lambda r: json.dumps(r | {"task_id": 2}),
            "line 2: field 'task_id': 2 was already on line 1",
        ),
        (lambda r: json.dumps(r | {"text": " "}), "line 2: field 'text' is empty"),
        (lambda r: json.dumps(r | {"test_list": []}), "line 2: field 'test_list' is empty"),
        (
            lambda r: json.dumps(r | {"test_list": "assert 1"}),
            "line 2: field 'test_list': expected a list of texts",
        ),
        (
            lambda r: json.dumps(r | {"test_list": ["assert ("]}),
            "line 2: field 'test_list' is not Python",
        ),
        (
            lambda r: json.dumps(r | {"test_list": ["assert " + "-" * 60_000 + "1"]}),
            "line 2: field 'test_list' is not Python",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(broken, change, says):
    path = broken / "mbpp.jsonl"
    rewrite(path, 2, change(row(path, 2)))
    (problem,) = check_data(mbpp.SPEC, broken)
    assert problem.startswith(f"{path}, {says}")


def test_other_malformed_files(broken):
    (broken / "HumanEval.jsonl.gz").write_bytes(b"<!doctype html>")
    assert "cannot be read" in check_data(humaneval.SPEC, broken)[0]
    rewrite(broken / "TruthfulQA.csv", 2, "Adversarial,Birds,Do pigs fly?")
    assert "line 2: field 'Best Answer' is missing" in check_data(truthfulqa.SPEC, broken)[0]
    rewrite(broken / "TruthfulQA.csv", 1, "Type,Category,Question")
    assert (
        "line 1: no column 'Best Answer', 'Correct Answers'"
        in check_data(truthfulqa.SPEC, broken)[0]
    )
    (broken / "gsm8k/test.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot be read" in check_data(gsm8k.SPEC, broken)[0]
    (broken / "manifest.json").write_text('{"name": "mini"}')
    assert "manifest.json: expected" in check_data(mbpp.SPEC, broken)[0]
    (broken / "manifest.json").unlink()
    (broken / "manifest.json").mkdir()
    path = broken / "manifest.json"
    assert check_data(mbpp.SPEC, broken) == [f"{path} cannot be read: Is a directory"]


@pytest.mark.parametrize("refused", ["", "manifest.json", "mbpp.jsonl"])
def test_a_directory_that_may_not_be_read_is_one_problem(mini, monkeypatch, refused):
    """As for a user without the right to it; these tests may run as root."""
    path, stat, opened = mini / refused, Path.stat, os.open

    def refusing(call, name, *args, **kwargs):
        if Path(name) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return call(name, *args, **kwargs)

    monkeypatch.setattr(Path, "stat", lambda *args, **kw: refusing(stat, *args, **kw))
    monkeypatch.setattr(os, "open", lambda *args, **kw: refusing(opened, *args, **kw))
    assert check_data(mbpp.SPEC, mini) == [f"{path} cannot be read: Permission denied"]


def test_a_file_of_another_format_does_not_give_thousands_of_lines(broken):
    (broken / "gsm8k/test.jsonl").write_text("nonsense\n" * 1000)
    assert len(check_data(gsm8k.SPEC, broken)) == 6


def test_the_hub_is_used_without_a_data_dir(monkeypatch, mini):
    """The same rows, asked of `datasets`; its errors become one line with the way out."""
    import datasets

    asked = []

    def load(repo, config):
        asked.append((repo, config))
        splits = load_data(SPECS["gsm8k"], mini).splits
        return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="openai/gsm8k: 3 documents in 'test', expected 1319"):
        build_task(gsm8k.SPEC, None, "chat")
    assert asked == [("openai/gsm8k", "main")]

    def fail(repo, config):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot load data set openai/gsm8k .*no route.*--data_dir"):
        build_task(gsm8k.SPEC, None, "chat")


# ---------------------------------------------------------------- the originals


@pytest.mark.parametrize("name", SPECS)
def test_the_original_files_are_complete(benchmarks, name):
    spec = SPECS[name]
    assert check_data(spec, benchmarks) == []
    data = load_data(spec, benchmarks)
    n_docs = {"humaneval": 164, "mbpp": 500, "gsm8k": 1319, "truthfulqa": 817}[name]
    assert data.name == "original" and len(data.splits[spec.eval_split]) == spec.n_docs == n_docs


@pytest.mark.slow
@pytest.mark.parametrize("name, solution", [("humaneval", "canonical_solution"), ("mbpp", "code")])
def test_every_canonical_solution_passes(benchmarks, name, solution):
    """Bare, and as models wrap and spoil them; what gives the program of the bare one runs once."""
    spec = SPECS[name]
    metrics, bare = evaluate(build_task(spec, benchmarks, "chat"), lambda doc: doc[solution])
    assert metrics[PASS] == 1.0 and len(bare) == spec.n_docs
    programs = []
    for sample in bare:
        doc, candidate = sample["doc"], sample["filtered_resps"][0]["candidate"]
        code, whole = doc[solution], doc.get("prompt", "") + doc[solution]
        answers = [
            wrapped(whole),
            wrapped(whole.replace("_", "\\_")),
            f"{code.rstrip()}{FENCE}\n\nThat's all.",
            f"Let me think, it's easy. </think>\n{whole}",
            f"[BEGIN]\n '{whole.strip()}\n[DONE]",
        ]
        found = [extract_as(name, doc, answer) for answer in answers]
        assert found[0].how == "fence"
        tests = {"humaneval": humaneval, "mbpp": mbpp}[name].tests_of(doc)
        for code in {f.code for f in found}:
            if ast.dump(ast.parse(code)) != ast.dump(ast.parse(candidate)):
                programs.append((code, tests))
    assert all(v.passed for v in judge_many(programs))


def extract_as(name: str, doc: dict, answer: str):
    if name == "humaneval":
        return humaneval_program(answer, doc, tests=humaneval.tests_of(doc))
    return mbpp_program(answer, doc, tests=mbpp.tests_of(doc))


def test_the_function_that_mbpps_tests_ask_for_is_known(benchmarks):
    for doc in load_data(mbpp.SPEC, benchmarks).splits["test"]:
        name = called_names("\n".join(doc["test_list"]))[0]
        defined = {n.name for n in ast.parse(doc["code"]).body if isinstance(n, ast.FunctionDef)}
        assert name in defined, doc["task_id"]


@pytest.mark.slow
def test_lm_evals_plain_rule_never_scores_higher(benchmarks):
    """lm-eval runs prompt + answer, cut at its stop strings: what passes so passes here too."""
    docs = load_data(humaneval.SPEC, benchmarks).splits["test"][::8]
    until = installed_config(humaneval.YAML)["generation_kwargs"]["until"]
    spoil = random.Random(0)
    styles = [
        lambda d: d["canonical_solution"],
        lambda d: d["canonical_solution"] + f"\n\nprint({d['entry_point']}(None))\n",
        lambda d: d["canonical_solution"] + "\n\ndef check(candidate):\n    return 1\n# the end",
        lambda d: wrapped(d["prompt"] + d["canonical_solution"]),
        lambda d: "\n".join(x for x in d["canonical_solution"].split("\n") if spoil.random() < 0.8),
    ]
    plain, ours = [], []
    for doc in docs:
        for style in styles:
            answer = cut = style(doc)
            for stop in until:
                cut = cut.split(stop)[0]
            plain.append((doc["prompt"] + cut, humaneval.tests_of(doc)))
            ours.append((extract_as("humaneval", doc, answer).code, humaneval.tests_of(doc)))
    passed = [
        (p.passed, o.passed) for p, o in zip(judge_many(plain), judge_many(ours), strict=True)
    ]
    assert (True, False) not in passed
    assert sum(o for _, o in passed) > sum(p for p, _ in passed)


@pytest.mark.slow
def test_every_gold_answer_is_right(benchmarks):
    metrics, samples = evaluate(
        build_task(gsm8k.SPEC, benchmarks, "chat"), lambda doc: doc["answer"]
    )
    assert len(samples) == 3 * 1319
    assert metrics[STRICT] == metrics[FLEXIBLE] == metrics[NUMERIC] == 1.0


CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    "name, key",
    [("humaneval", PASS), ("mbpp", PASS), ("gsm8k", NUMERIC), ("truthfulqa", "bleu_acc,none")],
)
def test_answers_are_scored_as_a_careful_reader_does(benchmarks, name, key):
    """The lines of cases.jsonl: answers as models give them, and whether they are right."""
    spec = SPECS[name]
    task = build_task(spec, benchmarks, "chat")
    docs, metric = list(task.eval_docs), key.partition(",")[0]
    cases = [case for case in CASES if case["task"] == name]
    assert cases
    if name in ("humaneval", "mbpp"):
        doc_of = [docs[case["doc_id"]] for case in cases]
        scored = task.judging.score([[case["text"]] for case in cases], doc_of)
        right = [row["passed"] for row in scored]
    else:
        score = scorer(task, key)
        right = [bool(score(docs[case["doc_id"]], case["text"])) for case in cases]
    wrong = [(c["kind"], r) for c, r in zip(cases, right, strict=True) if r != c["expected"]]
    assert not wrong, metric


@pytest.mark.slow
def test_lm_evals_two_metrics_of_gsm8k_stay_as_they_are(mini):
    """On answers that the third metric reads otherwise, and on a long one in linear time."""
    texts = ["#### 999.00", "$\\boxed{1,000}$.", "It is 1,001. Of these 3 are red.", "0" * 2_000]
    stock = stock_task("gsm8k", load_data(gsm8k.SPEC, mini).splits)
    for text in texts:
        theirs, _ = evaluate(stock, lambda doc, text=text: text)
        ours, _ = evaluate(build_task(gsm8k.SPEC, mini, "chat"), lambda doc, text=text: text)
        assert all(abs(ours[key] - theirs[key]) < 1e-9 for key in (STRICT, FLEXIBLE))
    task, start = build_task(gsm8k.SPEC, mini, "chat"), time.process_time()
    for key in (STRICT, FLEXIBLE, NUMERIC):
        assert scorer(task, key)(task.eval_docs[0], "1" * 5_000_000) == 0
    assert time.process_time() - start < 6


@pytest.mark.slow
def test_best_answers_are_found_true(benchmarks):
    metrics, samples = evaluate(
        build_task(truthfulqa.SPEC, benchmarks, "chat"), lambda doc: doc["best_answer"]
    )
    assert len(samples) == 817
    assert metrics["bleu_acc,none"] > 0.9 and metrics["rougeL_acc,none"] > 0.99


@pytest.mark.slow
def test_truthfulqa_scores_equal_lm_evals(benchmarks):
    """On a sample, because lm-eval takes most of a second per answer."""
    from lm_eval.tasks.truthfulqa.utils import process_results_gen

    docs = list(build_task(truthfulqa.SPEC, benchmarks, "lm_eval").eval_docs)
    pick = random.Random(0)
    answers = [
        lambda d: d["best_answer"],
        lambda d: pick.choice(d["incorrect_answers"]),
        lambda d: "Yes . No.\nIt is",
        lambda d: "",
    ]
    for i, doc in enumerate(pick.sample(docs, 12)):
        answer = answers[i % 4](doc)
        theirs, ours = process_results_gen(doc, [answer]), truthfulqa.process_results(doc, [answer])
        assert theirs.keys() == ours.keys()
        assert all(abs(theirs[k] - ours[k]) < 1e-9 for k in theirs), (doc["question"], answer)


# ---------------------------------------------------------------- lm-eval's own definitions


def stock_task(name: str, rows: dict[str, list[dict]]):
    """lm-eval's installed task as lm-eval loads it, on the same rows."""
    import datasets

    splits = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(docs) for split, docs in rows.items()}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
        return spec_of(f"lm_eval:{name}").build(None, "lm_eval")


def prompts(task, *, chat: bool) -> list[str]:
    _, samples = evaluate(task, lambda doc: "", chat=chat, limit=4)
    return [s["arguments"][0][0] for s in samples if s["filter"] == samples[0]["filter"]]


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8k_prompts_are_lm_evals(mini, chat):
    """Five examples drawn from the training rows with lm-eval's seed.

    In a chat, lm-eval 0.4.8 draws twice for each document and shows the second draw; later
    versions draw once. The prompts here stay those of 0.4.8: our first document has the examples
    of their second.
    """
    from lm_eval.api.samplers import ContextSampler

    theirs = prompts(stock_task("gsm8k", load_data(gsm8k.SPEC, mini).splits), chat=chat)
    ours = prompts(build_task(gsm8k.SPEC, mini, "lm_eval"), chat=chat)
    assert ours[0].count("Question:") == theirs[0].count("Question:") == 6
    if chat and not hasattr(ContextSampler, "get_chat_context"):
        examples = [text.rpartition("Question:")[0] for text in (ours[0], theirs[0], theirs[1])]
        assert examples[0] == examples[2] != examples[1]
    else:
        assert ours == theirs


def test_gsm8k_cot_prompts_and_scores_are_lm_evals(mini):
    stock = stock_task("gsm8k_cot", load_data(gsm8k.SPEC, mini).splits)
    texts = {"0": "The answer is 999.", "1": "so 1,000", "2": "The answer is 1,001. Or -1"}

    def answer(doc):
        return texts[doc["question"][-2]]

    theirs, their_samples = evaluate(stock, answer)
    ours, our_samples = evaluate(build_task(gsm8k.SPEC, mini, "cot", 8), answer)
    assert (theirs[STRICT], theirs[FLEXIBLE]) == (ours[STRICT], ours[FLEXIBLE]) == (2 / 3, 2 / 3)
    assert [s["arguments"][0][0] for s in their_samples] == [
        s["arguments"][0][0] for s in our_samples if s["filter"] != "numeric"
    ]
    assert (
        prompts(build_task(gsm8k.SPEC, mini, "cot"), chat=True)[0]
        == "<user>Q: What is 999 plus 0?\nA:<assistant>"
    )


def test_truthfulqa_prompts_are_lm_evals(mini):
    theirs = prompts(
        stock_task("truthfulqa_gen", load_data(truthfulqa.SPEC, mini).splits), chat=True
    )
    assert prompts(build_task(truthfulqa.SPEC, mini, "lm_eval"), chat=True) == theirs
    assert prompts(build_task(truthfulqa.SPEC, mini, "chat"), chat=True) == theirs
    assert theirs[0].endswith("Barcelona, Spain.\n\nQ: Do pigs fly?<assistant>")


def test_code_prompts_are_lm_evals(mini):
    doc = load_data(humaneval.SPEC, mini).splits["test"][0]
    assert prompts(build_task(humaneval.SPEC, mini, "lm_eval"), chat=False)[0] == doc["prompt"]
    prompt = prompts(build_task(mbpp.SPEC, mini, "lm_eval"), chat=False)[0]
    assert (
        prompt.count("[BEGIN]\n") == 4
        and prompt.count("[DONE]") == 3
        and prompt.endswith("[BEGIN]\n")
    )
    assert "def similar_elements(test_tup1, test_tup2):\r\n  res" in prompt
    asked = (
        "here is your task: Write a function to get x. Your code should pass these tests:\n\n"
        "assert get(root) == 1\n"
    )
    assert asked in prompt
    for spec, form in ((humaneval.SPEC, "lm_eval"), (mbpp.SPEC, "lm_eval")):
        until = build_task(spec, mini, form).config.generation_kwargs["until"]
        assert until == installed_config(spec.forms[form].yaml)["generation_kwargs"]["until"]


def test_prompts_of_the_official_chat_forms(mini):
    doc = load_data(humaneval.SPEC, mini).splits["test"][0]
    prompt = prompts(build_task(humaneval.SPEC, mini, "opencompass"), chat=True)[0]
    assert prompt == f"<user>Complete the following python code:\n{doc['prompt']}<assistant>"
    prompt = prompts(build_task(humaneval.SPEC, mini, "instruct"), chat=True)[0]
    sentence = "Write a solution to the following problem and make sure that it passes the tests:"
    assert prompt == f"<user>{sentence}\n{FENCE}{doc['prompt']}<assistant>"
    prompt = prompts(build_task(mbpp.SPEC, mini, "instruct"), chat=True)[0]
    tests = load_data(mbpp.SPEC, mini).splits["test"][0]["test_list"]
    assert prompt.endswith(
        "Your code should pass these tests:\n\n" + "\n".join(tests) + "<assistant>"
    )
    assert (
        prompts(build_task(gsm8k.SPEC, mini, "chat"), chat=True)[0]
        == "<user>Question: What is 999 plus 0?\nAnswer:<assistant>"
    )


def test_nothing_asks_the_hub_for_metrics(mini):
    """Importing lm-eval's humaneval or mbpp utils loads code_eval from the hub and runs code."""
    import sys

    evaluate(build_task(mbpp.SPEC, mini, "lm_eval"), lambda doc: doc["code"], chat=False)
    evaluate(build_task(humaneval.SPEC, mini, "lm_eval"), lambda doc: "", chat=False)
    assert not {"lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils"} & set(sys.modules)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"headline": "exact_math,none"}, "no headline 'exact_math,none'; there are: exact_match,"),
        ({"build": lambda data, form: data.splits["tset"]}, "no lm-eval task: KeyError: 'tset'"),
        ({"build": lambda data, form: None}, "build must return a task of make_task, not None"),
        ({"kind": "code"}, "kind 'code' needs a judging"),
        ({"kind": "choice"}, "kind 'choice' does not go with the output_type 'generate_until'"),
    ],
)
def test_a_benchmark_that_is_wrong_in_itself_is_named(tmp_path, change, problem):
    spec = replace(gsm8k.SPEC, **change)
    with pytest.raises(UsageError, match=re.escape(problem)):
        build_task(spec, Path(__file__).parent.parent / "assets" / "benchmarks", spec.default_form)
