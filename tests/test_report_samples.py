"""What the answer should have been: in each sample of a result, in the page, and in JSON lines."""

import json
from types import SimpleNamespace

import datasets
import pandas
import pytest
from crafted import craft, save
from mini import LLADA, ROOT, write_lines

import eval as cli
from experiment.sample import Request, Sample
from experiment.text import token_texts
from scripts import report

MINI = ROOT / "assets" / "benchmarks"
ROWS = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(3)]


def result_of_run(tmp_path, *words) -> dict:
    out = tmp_path / "out"
    cli.main(["--output_dir", str(out), *map(str, words)])
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


def samples_of_run(tmp_path, *words) -> list[dict]:
    return result_of_run(tmp_path, *words)["samples"]


def mbpp_tests() -> str:
    rows = map(json.loads, (MINI / "mbpp.jsonl").read_text().splitlines())
    return "\n".join(next(row for row in rows if row["task_id"] == 11)["test_list"])


@pytest.mark.parametrize("task", ["gsm8k", "mbpp", "humaneval", "truthfulqa"])
def test_a_sample_has_its_target(tmp_path, task):
    """The gold number, the tests, or the reference answers."""
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": 0, "text": "1"}])
    words = f"--model_alias tiny-llada --task {task} --data_dir {MINI} --limit 1 --no_exec".split()
    (sample,) = samples_of_run(tmp_path, *words, "--predictions", texts)
    found = sample["target"]
    if task == "truthfulqa":
        assert found.keys() == {"correct", "incorrect"} and all(found.values())
        assert all(isinstance(text, str) for texts in found.values() for text in texts)
    elif task == "humaneval":
        assert "def check(candidate)" in found and found.splitlines()[-1].startswith("check(")
    else:
        assert found == ("38" if task == "gsm8k" else mbpp_tests())


def test_a_task_of_lm_evals_has_lm_evals_target(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, test=rows)
    )
    words = f"--model_alias llada --llada_ckpt {LLADA} --task lm_eval:gsm8k_cot_zeroshot --limit 2"
    words += " --device cpu --dtype float32 --gen_length 32 --tokens_per_step 16"
    assert [s["target"] for s in samples_of_run(tmp_path, *words.split())] == [
        row["answer"] for row in ROWS[:2]
    ]


def test_a_result_has_the_texts_of_its_tokens(tmp_path):
    """A page without the checkpoint shows what each token id is."""
    words = f"--model_alias tiny-llada --task gsm8k --data_dir {MINI} --limit 1 --dtype float32"
    result = result_of_run(tmp_path, *words.split())
    (sample,) = result["samples"]
    texts = [result["token_texts"][str(token)] for token in sample["token_ids"]]
    end = texts.index("<|eot_id|>")
    assert "".join(texts[:end]) == sample["text"] != ""
    assert len(result["token_texts"]) == len({*sample["token_ids"]})


def test_a_likelihood_has_no_tokens():
    sample = Sample(Request({}, 0), completion=SimpleNamespace(loglikelihood=-0.5))
    assert token_texts(None, [sample]) == {}


def test_samples_are_written_as_json_lines(tmp_path):
    folder, file = tmp_path / "results", tmp_path / "samples.jsonl"
    save(folder, k=1, n=4)
    save(folder, k=2, n=4)
    save(folder, k=2, n=4, predictions="abc", tag="texts")
    assert report.main([str(folder), "--out", str(tmp_path / "r"), "--samples", str(file)]) == 0
    table = pandas.read_json(file, lines=True)
    assert len(table) == 12 and table["result"].nunique() == 3
    wanted = {"result", "doc_id", "text", "extracted", "target", "metrics", "tokens_per_step"}
    assert wanted <= {*table.columns}
    first = table[table["result"] == "llada_gsm8k_low_confidence_tps1"].iloc[3]
    (sample,) = [s for s in craft(k=1, n=4)[0]["samples"] if s["doc_id"] == 3]
    assert first["text"] == sample["text"] and first["target"] == "target 3"
    assert first["metrics"] == sample["metrics"] and first["extracted"] == {"flexible-extract": "3"}


def test_json_lines_that_cannot_be_written_are_an_error(tmp_path, capsys):
    save(tmp_path, k=1, n=3)
    words = [str(tmp_path), "--out", str(tmp_path / "r"), "--samples", "/dev/null/x.jsonl"]
    assert report.main(words) == 74
    assert "cannot write --samples /dev/null/x.jsonl" in capsys.readouterr().err
