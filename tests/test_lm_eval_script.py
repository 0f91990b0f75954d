"""scripts/lm_eval.py: lm-eval's own command line on the models of eval.py."""

import importlib.util
import json
import subprocess
import sys
from functools import partial

import pytest
import yaml
from mini import LLADA, ROOT, write_lines

ARC = [
    {
        "id": str(i),
        "question": f"What is {i} and {i}?",
        "choices": {"text": [str(2 * i), str(2 * i + 1), "seven"], "label": ["A", "B", "C"]},
        "answerKey": "AB"[i % 2],
    }
    for i in range(3)
]
SUMS_YAML = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer.split('#### ')[-1]}}",
    "generation_kwargs": {"until": [], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ARC_YAML = {
    "output_type": "multiple_choice",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "lm_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lm_eval_run(script, tmp_path, monkeypatch):
    """Call lm-eval's main on one task of this test; its results, and its samples in order."""
    import datasets
    import lm_eval.__main__ as command

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # the index of all installed tasks takes many seconds
    own = partial(command.TaskManager, include_defaults=False)
    monkeypatch.setattr(command, "TaskManager", own)

    def call(name: str, config: dict, rows, arguments: str, *more: str):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        config = config | {"task": name, "dataset_path": "json", "test_split": "test"}
        config |= {"dataset_kwargs": {"data_files": {"test": str(rows)}}, "num_fewshot": 0}
        config |= {"doc_to_text": "Question: {{question}}\nAnswer:"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        out = tmp_path / name
        words = ["--model", "dllmexp", "--model_args", arguments, "--tasks", name, "--limit", "3"]
        words += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
        words += ["--device", "cpu", "--batch_size", "4"]
        monkeypatch.setattr(sys, "argv", ["lm_eval.py", *words, *more])
        assert script.main() == 0
        (path,) = out.rglob("results_*.json")
        (lines,) = out.rglob("samples_*.jsonl")
        samples = [json.loads(line) for line in lines.read_text().splitlines()]
        return json.loads(path.read_text())["results"][name], samples

    return call


def ours(folder) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_texts_are_those_of_eval_py(run, lm_eval_run, tmp_path):
    data = ROOT / "assets" / "benchmarks"
    words = f"--model_alias tiny-llada --task gsm8k --data_dir {data} --limit 3 --device cpu"
    assert run(words, "--output_dir", tmp_path / "ours")[0] == 0
    _, samples = lm_eval_run(
        "own_sums",
        SUMS_YAML,
        data / "gsm8k" / "test.jsonl",
        "alias=tiny-llada,task=gsm8k",
        "--apply_chat_template",
    )
    expected = [s["text"] for s in ours(tmp_path / "ours")["samples"]]
    assert [s["resps"][0][0] for s in samples] == expected and all(expected)


@pytest.mark.slow
def test_likelihoods_are_those_of_eval_py(run, lm_eval_run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = write_lines(data / "arc_easy.jsonl", ARC)
    manifest = {"name": "mini", "counts": {"arc_easy.jsonl": len(ARC)}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    words = f"--model_alias tiny-llada --task arc_easy --data_dir {data} --device cpu --mc_num 4"
    code, _, err = run(words, "--output_dir", tmp_path / "ours")
    assert code == 0, err
    results, samples = lm_eval_run("own_arc", ARC_YAML, rows, "alias=tiny-llada,mc_num=4")
    result = ours(tmp_path / "ours")
    assert {k: e["value"] for k, e in result["metrics"].items()} == {
        k: results[k] for k in ("acc,none", "acc_norm,none")
    }
    for row, sample in zip(result["samples"], samples, strict=True):
        found = [o["loglikelihood"] for o in row["options"]]
        assert [float(r[0][0]) for r in sample["resps"]] == found


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ("task=gsm8k", "--model_args: alias is required: llada, llada1.5, dream"),
        ("alias=llada,fast", "--model_args 'fast': expected NAME=VALUE, such as alias=llada"),
        ("alias=tiny-llada,task=what", "--model_args task=what: there are: humaneval, mbpp"),
        ("alias=tiny-llada,repeats=3", "--model_args repeats=3: lm-eval's task decides how many"),
        ("alias=tiny-llada,bach_size=2", "unknown argument '--bach_size'"),
    ],
)
def test_bad_model_args_are_one_line(script, arguments, problem):
    with pytest.raises(script.DllmexpError) as error:
        script.model(arguments, {})
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(problem)


def test_a_benchmarks_protocol_is_that_of_eval_py(script):
    words = f"alias=llada-base,pretrained={LLADA},protocol=official,dtype=float32"
    lm = script.model(f"{words},task=mbpp,gen_length=64,block_length=64", {"device": "cpu"})
    assert lm.decode_config.schedule.num_steps == 64
    assert (lm.likelihood.mc_num, lm.likelihood.official, lm.batch_size) == (128, False, 1)
    lm = script.model(f"{words},task=hellaswag", {"device": "cpu", "batch_size": "auto"})
    asked = lm.likelihood
    assert (asked.mc_num, asked.cfg_scale, asked.official) == (128, 0.5, True)
    assert lm.batch_size == "auto"


def test_decoding_is_set_in_model_args(script, monkeypatch, capsys):
    words = ["--model", "dllmexp", "--model_args", "alias=tiny-llada", "--tasks", "gsm8k"]
    monkeypatch.setattr(sys, "argv", ["lm_eval.py", *words, "--gen_kwargs", "temperature=1"])
    assert script.main() == 2
    assert capsys.readouterr().err.startswith("error: --gen_kwargs temperature=1: decoding is set")


@pytest.mark.parametrize("name", ["doctor", "report", "sweep", "trace"])
def test_no_script_takes_this_one_for_lm_eval(name):
    """It lies in the folder that Python puts first, under the package's name."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); "
        f"runpy.run_path({str(ROOT / 'scripts' / name)!r} + '.py', run_name='x'); "
        "from importlib.util import find_spec; "
        "print(bool(find_spec('lm_eval').submodule_search_locations))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "True", found.stderr
