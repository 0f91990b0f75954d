"""--export lm_eval: the files of lm-eval's own command line, beside the result."""

import json
from pathlib import Path

import pytest
from lm_eval.utils import make_table
from mini import LLADA, gsm8k_dir, write_lines

import eval as cli
from experiment.run import Host

# what lm-eval 0.4.8 writes of each sample
KEYS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
KEYS |= {"doc_hash", "prompt_hash", "target_hash", "exact_match"}


@pytest.fixture
def mini(tmp_path):
    data = gsm8k_dir(tmp_path / "data")
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {LLADA} --data_dir {data} --device cpu "
        f"--output_dir {tmp_path / 'out'} --export lm_eval"
    )


def exported(folder: Path) -> tuple[dict, list[dict], dict]:
    """lm-eval's results, its samples, and our result."""
    (ours,) = (folder / "out").glob("*.json")
    (path,) = ours.with_suffix("").glob("*/results_*.json")
    (lines,) = path.parent.glob("samples_*.jsonl")
    assert lines.name == f"samples_gsm8k_{path.stem.removeprefix('results_')}.jsonl"
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    return json.loads(path.read_text()), samples, json.loads(ours.read_text())


def test_lm_eval_reads_what_is_written(run, mini, tmp_path):
    """Two of three answers are right: 0.6667, with lm-eval's standard error 0.3333."""
    texts = [{"doc_id": i, "text": t} for i, t in enumerate(["The answer is 2", "3", "seven: 7"])]
    path = write_lines(tmp_path / "texts.jsonl", texts)
    code, _, err = run(mini, "--predictions", path)
    assert code == 0 and f"lm-eval's files: {tmp_path / 'out'}" in err
    results, samples, ours = exported(tmp_path)
    for key, e in ours["metrics"].items():
        assert results["results"]["gsm8k"][key] == e["value"]
    row = next(r for r in make_table(results).splitlines() if "flexible-extract" in r)
    assert "0.6667" in row and "0.3333" in row
    assert (results["config"]["model"], results["model_source"]) == ("dllmexp", "dllmexp")
    assert results["n-samples"]["gsm8k"] == {"original": 3, "effective": 3}
    assert {"git_hash", "date", "pretty_env_info", "task_hashes"} <= results.keys()
    assert len(samples) == 9 and {s["filter"] for s in samples} == {
        "strict-match",
        "flexible-extract",
        "numeric",
    }
    assert all(KEYS <= s.keys() for s in samples)
    assert [s["resps"] for s in samples[:3]] == [[["The answer is 2"]], [["3"]], [["seven: 7"]]]
    assert samples[0]["arguments"]["gen_args_0"]["arg_0"].endswith("Answer:")


@pytest.mark.slow
def test_a_finished_result_is_exported_without_decoding(run, mini, tmp_path):
    words = f"{mini} --dtype float32 --gen_length 8 --block_length 8"
    plain = words.replace("--export lm_eval", "")
    assert run(plain)[0] == 0
    (ours,) = (tmp_path / "out").glob("*.json")
    before = json.loads(ours.read_text())["content_sha256"]

    def refuse(*asked):
        raise AssertionError("nothing is decoded")

    assert cli.main(words.split(), Host(refuse)) == 0
    results, samples, result = exported(tmp_path)
    assert result["content_sha256"] == before
    assert results["config"]["model_args"].startswith("pretrained=llada-tiny,alias=llada,")
    assert results["chat_template"].startswith("{%") and len(samples) == 9
    assert [s["resps"][0][0] for s in samples[:3]] == [s["text"] for s in result["samples"]]


def test_samples_that_failed_are_not_exported_as_a_score(run, mini, tmp_path):
    """lm-eval's files have no status: a mean over the others would look like the score."""
    texts = write_lines(tmp_path / "texts.jsonl", [{"doc_id": i, "text": "1"} for i in range(3)])
    words = mini.replace("--task gsm8k", "--task humaneval --no_exec").split("--data_dir")[0]
    data = Path(__file__).parent.parent / "assets" / "benchmarks"
    more = f"--limit 3 --data_dir {data} --output_dir {tmp_path / 'out'} --export lm_eval"
    code, _, err = run(f"{words} {more}", "--predictions", texts)
    assert code == 5 and "--export lm_eval: nothing is written, the result is unscored" in err
    assert not [p for p in (tmp_path / "out").rglob("results_*")]
