"""A number belongs to its inputs: weights, logits, rows and results that must not be believed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import SHARDS, edit_tensors
from mini import gsm8k_dir
from test_decoding import Scripted, config

import eval as cli
from decoding.engine import decode
from decoding.sampling import NoFiniteLogits, Rules, propose
from experiment import identity
from experiment.identity import known_ids
from experiment.predictions import read_predictions
from experiment.result import VOLATILE, load_result
from models import digests
from suite.matrix import experiments
from suite.worker import KeptModel
from tasks import gsm8k, load_data
from utils import BadDataError, sha256


@pytest.fixture
def words(llada, tmp_path) -> str:
    """Arguments of a small run on a checkpoint that the test may change."""
    data = gsm8k_dir(tmp_path / "data")
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {llada} --data_dir {data} "
        f"--output_dir {tmp_path / 'out'} --device cpu --dtype float32 --gen_length 8 "
        "--block_length 8"
    )


def results(tmp_path) -> list[Path]:
    return sorted((tmp_path / "out").glob("*.json"))


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


# ---- weights


def test_changed_weights_are_another_experiment(run, words, llada, tmp_path):
    """Also where the bytes that differ are few: a result is never taken over for other weights."""
    assert run(words)[0] == 0
    assert "finished already" in run(words)[2]
    path = llada / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    code, _, err = run(words)
    assert code == 2 and f"fingerprint.shards.{SHARDS[0]}" in err


def test_a_plan_hashes_nothing_and_reads_what_a_run_has_kept(run, words, monkeypatch):
    [experiment] = experiments([shlex.split(words)])
    assert experiment.id is None
    assert "unknown until the first run has read the inputs" in run(words, "--dry_run")[1]
    assert run(words)[0] == 0
    monkeypatch.setattr(digests, "_hashed", lambda *_: pytest.fail("weights were hashed"))
    monkeypatch.setattr(digests, "_known", {})
    assert experiment.identified().id == known_ids(experiment.job)[0]
    assert experiment.identified().result_id[:16] in run(words, "--dry_run")[1]


def test_an_input_that_changes_while_it_is_checked_stops_the_run(run, words, monkeypatch, tmp_path):
    monkeypatch.setattr(digests, "_add", lambda *_: None)
    code, _, err = run(words)
    assert (code, errors(err), results(tmp_path)) == (
        4,
        ["error: an input changed while it was checked; start again"],
        [],
    )


def test_a_worker_loads_a_checkpoint_again_that_has_changed(llada):
    kept = KeptModel()
    first = kept.load(str(llada), "cpu", "float32")
    assert kept.load(str(llada), "cpu", "float32") is first and kept.loads == 1
    edit_tensors(llada / SHARDS[0], lambda t: t.update({n: -x for n, x in t.items()}))
    assert kept.load(str(llada), "cpu", "float32") is not first and kept.loads == 2


# ---- logits

WRONG = [float("nan"), float("inf")]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocabulary", [12, 5000])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_token_without_finite_logits_is_marked(wrong, vocabulary, temperature):
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf  # a token that is excluded
    expected = propose(logits, rules := Rules(temperature, top_p=0.9), frozenset(), noise(4))
    logits[1, 5], logits[2] = wrong, -torch.inf
    got = propose(logits, rules, frozenset({"confidence"}), noise(4))
    assert got.tokens[[1, 2]].tolist() == [-1, -1]
    assert torch.equal(got.tokens[[0, 3]], expected.tokens[[0, 3]])


def noise(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Broken(Scripted):
    """Predicts NaN where the prompt begins with token 6."""

    def predict(self, tokens, spans, rows, cache=None):
        logits = super().predict(tokens, spans, rows, cache)
        starts = [0]
        for lo, hi, _ in spans:
            starts.append(starts[-1] + hi - lo)
        for i, row in enumerate(rows.tolist()):
            begin = max(start for start in starts[:-1] if start <= row)
            if tokens[begin] == 6:
                logits[i] = torch.nan
        return logits


@pytest.mark.parametrize(
    "algorithm", ["low_confidence", "random", "threshold", "entropy_threshold"]
)
def test_no_algorithm_commits_a_token_without_finite_logits(algorithm):
    chosen, model = config(algorithm=algorithm, early_exit=False), Broken([1, 2] * 4)
    assert len(decode(model, [[5], [7]], chosen, [0, 1])) == 2
    with pytest.raises(NoFiniteLogits, match="no finite logits at") as some:
        decode(model, [[5], [6]], chosen, [0, 1])
    with pytest.raises(NoFiniteLogits) as all_of_them:
        decode(model, [[6], [6]], chosen, [0, 1])
    assert (some.value.everywhere, all_of_them.value.everywhere) == (False, True)


def test_a_sample_without_finite_logits_is_an_error_of_its_own(run, words, llada, tmp_path):
    """A NaN in the embedding of one token hits the prompts that have it."""
    from models import load_tokenizer

    data = tmp_path / "data" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["question"] += " Zq~"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode = load_tokenizer(llada).encode
    ids = set(encode(rows[1]["question"])) - set(encode(rows[0]["question"]))
    name = "model.transformer.wte.weight"

    def spoil(tensors):
        if name in tensors:
            tensors[name][sorted(ids)] = torch.nan

    for shard in SHARDS:
        edit_tensors(llada / shard, spoil)
    assert run(words)[0] == 5
    [path] = results(tmp_path)
    result = load_result(path)
    assert [s["status"] for s in result["samples"]] == ["ok", "error", "ok"]
    assert "the model gives no finite logits at" in result["samples"][1]["error"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_weights_that_are_nan_stop_the_run_at_once(run, words, llada, tmp_path, batch_size):
    def spoil(tensors):
        for tensor in tensors.values():
            tensor.fill_(torch.nan)

    edit_tensors(llada / SHARDS[1], spoil)
    code, _, err = run(words, "--batch_size", batch_size)
    [line] = errors(err)
    assert code == 4 and "the model gives no finite logits at" in line
    assert results(tmp_path) == []


# ---- results


def rewritten(path: Path, **change) -> None:
    """Change keys of a result, ... deletes; its checksum stays."""
    result = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in result.items() if v is not ...}))


@pytest.mark.parametrize(
    "change",
    [
        {"headline": {"metric": "m", "value": 0.999, "ci95": [0, 1], "stderr": 0, "n": 3}},
        {"metrics": ...},
        {"id": ...},
        {"content_sha256": ...},
        {"profile": ...},
        {"profile": 3},
        {"limit": float("nan")},
    ],
)
def test_an_edited_result_is_not_believed(run, words, tmp_path, change):
    assert run(words, "--limit", "1")[0] == 0
    [path] = results(tmp_path)
    rewritten(path, **change)
    code, _, err = run(words, "--limit", "1")
    [line] = errors(err)
    assert code == 4 and str(path) in line and "Delete it" in line and "overwrite" not in line
    path.unlink()
    code, _, err = run(words, "--limit", "1")
    assert code == 0 and "resuming: 1 finished sample in " in err


@pytest.mark.parametrize("content", ['{"schema_version": 3', "[" * 100_000, "[1]", "{}", "3"])
def test_a_file_that_is_no_result_is_one_line(run, words, tmp_path, content):
    assert run(words, "--limit", "1")[0] == 0
    [path] = results(tmp_path)
    path.write_text(content)
    code, _, err = run(words, "--limit", "1")
    assert code == 4 and len(errors(err)) == 1 and "Delete it" in err


def test_a_result_with_a_checksum_but_another_form_is_refused(run, words, tmp_path):
    assert run(words, "--limit", "1")[0] == 0
    [path] = results(tmp_path)
    result = json.loads(path.read_text()) | {"samples": 3}
    covered = {name: value for name, value in result.items() if name not in VOLATILE}
    path.write_text(json.dumps(result | {"content_sha256": sha256(covered)}))
    with pytest.raises(BadDataError, match="samples is no list"):
        load_result(path)


def test_predictions_from_an_edited_result_are_refused(run, words, tmp_path):
    assert run(words)[0] == 0
    [path] = results(tmp_path)
    taken = Path(shutil.copy(path, tmp_path / "taken.json"))
    score = f"{words} --tag scored --predictions {taken}"
    assert run(score)[0] == 0
    samples = json.loads(taken.read_text())["samples"]
    samples[0]["text"] = "#### 2"
    rewritten(taken, samples=samples)
    code, _, err = run(score, "--overwrite")
    assert code == 4 and "does not match its checksum" in err


def test_a_result_of_another_benchmark_is_noted(run, words, tmp_path):
    """TruthfulQA's answers, scored as GSM8K's, were a complete 0.0 without a word."""
    assert run(words)[0] == 0
    [path] = results(tmp_path)
    n_docs = json.loads(path.read_text())["n_samples"]
    for task, told in (("gsm8k", []), ("truthfulqa", ["has answers to gsm8k; each is scored"])):
        notes: list[str] = []
        assert len(read_predictions(path, n_docs, None, notes=notes, task=task)) == n_docs
        assert len(notes) == len(told) and all(t in n for t, n in zip(told, notes, strict=True))


# ---- data of the hub


def test_a_changed_gold_answer_of_the_hub_is_scored_anew(run, words, tmp_path, monkeypatch):
    """The rows are part of the result id; nothing is decoded again."""
    import datasets

    splits = load_data(gsm8k.SPEC, tmp_path / "data").splits
    splits["test"] *= 1319
    splits["test"] = splits["test"][:1319]

    def load(repo, name):
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = words.replace(f"--data_dir {tmp_path / 'data'}", "--limit 2")
    [experiment] = experiments([shlex.split(hub)])
    assert run(hub)[0] == 0
    assert "finished already" in run(hub)[2]
    ids = known_ids(experiment.job)
    assert ids is not None and ids[1] is not None
    splits["test"] = [dict(row) for row in splits["test"]]
    splits["test"][1]["answer"] = "another\n#### 99"
    code, _, err = run(hub)
    assert code == 0 and "scored in another way" in err and "resuming: 2 finished samples" in err
    identity.forget()
    changed = known_ids(experiment.job)
    assert changed[0] == ids[0] and changed[1] != ids[1]
    splits["train"] = [row | {"question": "Another?"} for row in splits["train"]]
    assert "finished already" not in run(hub)[2]  # worked examples may come from there


def test_changed_rows_of_lm_evals_own_task_are_another_result(run, words, tmp_path, monkeypatch):
    import datasets

    rows = [{"question": f"{i} + 1?", "answer": f"x\n#### {i + 1}"} for i in range(3)]

    def load(*_, **__):
        table = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(train=table, test=table)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = words.replace("--task gsm8k", "--task lm_eval:gsm8k_cot_zeroshot")
    [experiment] = experiments([shlex.split(task)])
    assert run(task)[0] == 0
    assert "finished already" in run(task)[2]
    ids = known_ids(experiment.job)
    assert ids is not None and ids[1] is not None
    rows[1]["answer"] = "x\n#### 99"
    code, _, err = run(task)
    assert code == 0 and "scored in another way" in err and "resuming: 3 finished samples" in err
    identity.forget()
    assert known_ids(experiment.job)[1] != ids[1]


# ---- defaults


def test_tiny_models_have_float32_and_a_cpu_a_batch(run, tmp_path):
    data = gsm8k_dir(tmp_path / "data")
    tiny = (
        f"--model_alias tiny-llada --task gsm8k --data_dir {data} --output_dir {tmp_path / 'out'}"
    )
    shown = run(tiny, "--dry_run")[1]
    assert "dtype                   float32" in shown and "override: dtype" not in shown
    assert "tiny-llada_gsm8k_low_confidence_tps1_mini.json" in shown
    shown = run(tiny, "--dry_run", "--dtype", "bfloat16")[1]
    assert "override: dtype bfloat16 (protocol uniform: float32)" in shown
    assert "tps1_bfloat16_mini.json" in shown
    assert run(tiny, "--device", "cpu", "--gen_length", "32")[0] == 0
    [path] = results(tmp_path)
    assert load_result(path)["meta"]["batch_size"] == 8
    assert (
        "finished already"
        in run(tiny, "--device", "cpu", "--gen_length", "32", "--batch_size", "1")[2]
    )


def test_an_entry_of_an_unknown_dtype_is_refused(run, monkeypatch):
    monkeypatch.setitem(cli.MODEL_DEFAULTS["llada"], "dtype", "int8")
    code, _, err = run("--model_alias llada --task gsm8k --dry_run")
    assert code == 2 and "dtype 'int8' is not known; there are: bfloat16" in err


def test_the_name_follows_the_manifest_alone(run, tmp_path):
    data = gsm8k_dir(tmp_path / "data")
    words = f"--model_alias llada --task gsm8k --data_dir {data} --print_output_path"
    assert run(words)[1] == "results/llada_gsm8k_low_confidence_tps1_mini.json\n"
    (data / "manifest.json").write_text("not good")
    assert run(words)[1] == "results/llada_gsm8k_low_confidence_tps1.json\n"
    assert run(words, "--protocol", "official")[1].endswith("_official.json\n")
