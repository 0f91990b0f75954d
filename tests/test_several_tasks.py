"""--task a,b,c: several benchmarks in one process, the model loaded once, one result each."""

import json
import shutil
import signal

import pytest
from mini import ROOT

import eval as cli
from experiment.run import Host, load_weights

TINY = "--model_alias tiny-llada --device cpu --limit 2"


@pytest.fixture
def mini(tmp_path):
    """Arguments of runs on the embedded checkpoint and two documents of each mini benchmark."""
    data = shutil.copytree(ROOT / "assets" / "benchmarks", tmp_path / "data")
    return f"{TINY} --data_dir {data} --output_dir {tmp_path / 'out'}"


def results(tmp_path) -> dict[str, dict]:
    """Task -> result."""
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    return {result["config"]["task"]: result for result in found}


@pytest.mark.slow
def test_two_tasks_have_the_results_of_two_runs_and_one_model(run, mini, tmp_path, monkeypatch):
    monkeypatch.delenv("DLLMEXP_DATA_DIR", raising=False)
    loads = []

    def load(*asked):
        loads.append(asked)
        return load_weights(*asked)

    assert cli.main([*mini.split(), "--task", "gsm8k,lines"], Host(load)) == 0
    assert len(loads) == 1
    together = results(tmp_path)
    shutil.rmtree(tmp_path / "out")
    for task in ("gsm8k", "lines"):
        assert run(mini, "--task", task)[0] == 0
    alone = results(tmp_path)
    assert together.keys() == alone.keys() == {"gsm8k", "lines"}
    for task, result in alone.items():
        assert together[task]["content_sha256"] == result["content_sha256"]


def test_each_task_has_a_line_of_its_own_where_paths_are_printed(run):
    code, out, _ = run(f"{TINY} --task mbpp,gsm8k,mbpp --print_output_path")
    assert (code, out.splitlines()) == (
        0,
        [
            "results/tiny-llada_mbpp_low_confidence_tps1_limit2.json",
            "results/tiny-llada_gsm8k_low_confidence_tps1_limit2.json",
        ],
    )
    code, out, _ = run(f"{TINY} --task mbpp,gsm8k --dry_run")
    assert code == 0 and out.count("config:") == out.count("output: ") == 2


def test_all_bad_names_are_one_error_before_anything_runs(run, mini, tmp_path):
    code, out, err = run(mini, "--task", "gsm8k,gsm9k,,what")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(
        "error: --task 'gsm9k', '', 'what': not known; did you mean 'gsm8k'?; there are: humaneval,"
    )
    assert not (tmp_path / "out").exists()


def test_a_problem_of_all_tasks_is_said_once(run, mini):
    code, _, err = run(mini, "--task", "gsm8k,lines,x", "--num_fewshot", "-1", "--bach_size", "2")
    lines = err.splitlines()
    assert code == 2 and [line.split(":")[1].split()[0] for line in lines] == [
        "--num_fewshot",
        "unknown",
        "--task",
    ]


def test_given_answers_are_of_one_benchmark(run, mini, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"doc_id": 0, "text": "4"}\n')
    code, _, err = run(mini, "--task", "gsm8k,lines", "--predictions", texts)
    assert (code, err) == (
        2,
        "error: --predictions: its texts answer one benchmark; give one --task\n",
    )


def test_a_task_that_fails_loses_no_other(run, mini, tmp_path):
    """The data of the first are missing; the others run, and the exit code says what failed."""
    (tmp_path / "data" / "mbpp.jsonl").unlink()
    code, out, err = run(mini, "--task", "mbpp,gsm8k")
    assert code == 4 and results(tmp_path).keys() == {"gsm8k"}
    assert "error: mbpp: " in err and "mbpp.jsonl" in err
    assert err.endswith("1 of 2 tasks without a complete result: mbpp\n")
    assert out.count("result: ") == 1


@pytest.mark.slow
def test_the_exit_code_is_the_greatest_one(run, mini, tmp_path):
    """5, some samples failed, after 4, bad data: both are in the lines above the last."""
    (tmp_path / "data" / "mbpp.jsonl").unlink()
    code, _, err = run(f"{mini} --no_exec --task mbpp,humaneval,gsm8k")
    assert code == 5 and "2 of 3 tasks without a complete result: mbpp, humaneval" in err


def test_a_signal_ends_all_tasks(run, mini, tmp_path):
    def load(*asked):
        signal.raise_signal(signal.SIGTERM)

    code = cli.main([*mini.split(), "--task", "gsm8k,lines"], Host(load))
    assert code == 128 + signal.SIGTERM and not results(tmp_path)


def test_a_launcher_runs_one_task(run, mini, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(mini, "--task", "gsm8k,lines")
    assert (code, err) == (
        2,
        "error: --task gsm8k,lines: a launcher has started 2 processes, which run one task; "
        "give one, or let --devices start the processes\n",
    )
