"""No sample is lost or changed: resume, signals, several workers, lack of memory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from causal import verifier_checkpoint
from mini import LLADA, ROOT, forked, gsm8k_dir

import eval as cli
import experiment.run
import harness
import models
from decoding.algorithms import ALGORITHMS, algorithms_of
from experiment import lmeval
from experiment.kept_model import KeptModel
from experiment.sample_cache import SampleCache
from experiment.signals import Signalled, signals_raise
from experiment.status import StatusFile, await_leader
from experiment.store import Store, process_start
from experiment.workers import LeaderGone, WorkerInfo, WorkerPool, worker_info

N = 6


@pytest.fixture
def data(tmp_path):
    return gsm8k_dir(tmp_path / "data", n=N)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model_alias",
        "llada",
        "--llada_ckpt",
        str(LLADA),
        "--task",
        "gsm8k",
        "--data_dir",
        str(data),
        "--output_dir",
        str(out),
        "--gen_length",
        "32",
        "--tokens_per_step",
        "2",
        "--dtype",
        "float32",
        *more,
    ]


def run(data, out, *more) -> tuple[int, dict | None]:
    """Exit code and result of a run in this process."""
    code = cli.main(arguments(data, out, "--device", "cpu", *more))
    found = sorted(out.glob("*.json"))
    return code, json.loads(found[-1].read_text()) if found else None


def drop_result(out: Path) -> None:
    for path in out.glob("*.json"):
        path.unlink()


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("cache/*/shard-*"))


# ---- resume


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(data, tmp_path, temperature):
    """In two parts, with other limits and batch sizes: the same result, nothing decoded twice."""
    more = ("--temperature", temperature)
    _, whole = run(data, tmp_path / "a", *more)
    _, part = run(data, tmp_path / "b", *more, "--limit", "4", "--batch_size", "3")
    drop_result(tmp_path / "b")
    code, resumed = run(data, tmp_path / "b", *more, "--batch_size", "2")
    assert code == 0 and part["n_samples"] == 4
    assert resumed["content_sha256"] == whole["content_sha256"]
    assert sum(len(p.read_text().splitlines()) - 1 for p in shards(tmp_path / "b")) == N
    assert [s["samples"] for s in resumed["meta"]["samples_made"]] == [4, 2]
    assert resumed["profile"]["tokens_returned"] == whole["profile"]["tokens_returned"]
    assert resumed["profile"]["seconds"] > 0


def test_all_samples_there_means_that_no_model_is_loaded(data, tmp_path, monkeypatch):
    _, first = run(data, tmp_path / "a")
    drop_result(tmp_path / "a")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, again = run(data, tmp_path / "a")
    assert code == 0 and again["content_sha256"] == first["content_sha256"]


def test_the_text_is_cut_anew_from_what_is_kept(data, tmp_path, monkeypatch):
    """A change of extraction re-scores in seconds: what is kept is the canvas, not the text."""
    run(data, tmp_path / "a")
    drop_result(tmp_path / "a")
    monkeypatch.setattr("experiment.text.text_of", lambda _, ids, **__: f"#### {len(ids)}")
    _, again = run(data, tmp_path / "a")
    assert all(s["text"].startswith("#### ") for s in again["samples"])


def test_a_mended_scorer_scores_the_kept_samples_anew(data, tmp_path, monkeypatch, capsys):
    """No mending of a scorer costs a forward pass or leaves a stale verdict."""
    _, first = run(data, tmp_path / "a")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run(data, tmp_path / "a")[1]["meta"] == first["meta"]  # finished already
    monkeypatch.setattr("experiment.config.SCORING_VERSION", 99)
    monkeypatch.setattr("experiment.text.text_of", lambda *_, **__: "#### 2")
    code, again = run(data, tmp_path / "a")
    assert code == 0 and "its samples are scored anew" in capsys.readouterr().err
    assert again["generation_id"] == first["generation_id"] and again["id"] != first["id"]
    assert {s["text"] for s in again["samples"]} == {"#### 2"}
    assert again["headline"]["value"] != first["headline"]["value"]
    assert again["profile"]["forward_passes"] == first["profile"]["forward_passes"]


def test_strict_exec_judges_a_finished_result_again(tmp_path, monkeypatch):
    words = ["--model_alias", "tiny-llada", "--task", "humaneval", "--dtype", "float32"]
    words += ["--data_dir", str(ROOT / "assets" / "benchmarks"), "--output_dir", str(tmp_path)]
    words += ["--limit", "2", "--batch_size", "2", "--device", "cpu"]
    assert cli.main(words) == 0
    [path] = tmp_path.glob("*.json")
    plain = json.loads(path.read_text())
    assert plain["strict"] is None and list(plain["metrics"]) == ["pass@1,create_test"]
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert cli.main([*words, "--strict_exec"]) == 0
    strict = json.loads(path.read_text())
    assert strict["strict"] == {"suspects": [], "unverifiable": []}
    assert set(strict["metrics"]) == {"pass@1,create_test", "pass@1_strict,create_test"}
    assert strict["generation_id"] == plain["generation_id"] and strict["id"] != plain["id"]


def test_a_result_file_stands_in_for_a_store_that_was_deleted(data, tmp_path, monkeypatch):
    """A mended scorer must not cost a second generation where the old result is there."""
    _, first = run(data, tmp_path / "a", "--temperature", "0.7", "--batch_size", "3")
    shutil.rmtree(tmp_path / "a" / "cache")
    monkeypatch.setattr("experiment.config.SCORING_VERSION", 99)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, again = run(data, tmp_path / "a", "--temperature", "0.7")
    assert code == 0 and again["samples"] == first["samples"] and again["id"] != first["id"]
    assert again["meta"]["samples_made"] == first["meta"]["samples_made"]
    assert again["profile"]["sample_seconds"] == first["profile"]["sample_seconds"]


@pytest.mark.slow
def test_another_configuration_shares_nothing(data, tmp_path):
    run(data, tmp_path / "a")
    for more in (
        ("--seed", "1"),
        ("--temperature", "0.5"),
        ("--tokens_per_step", "4"),
        ("--dtype", "bfloat16"),
    ):
        run(data, tmp_path / "a", *more, "--tag", "other" + more[1].replace(".", "_"))
    assert len(list((tmp_path / "a" / "cache").iterdir())) == 5
    assert [len(p.read_text().splitlines()) for p in shards(tmp_path / "a")] == [N + 1] * 5


def test_a_run_replaces_no_result_that_another_configuration_has_written_meanwhile(
    data, tmp_path, monkeypatch, capsys
):
    """--system is no part of the name: two runs at a time write the same file."""
    evaluate, out = lmeval.evaluate, tmp_path / "a"

    def slow(*arguments, **options):
        monkeypatch.setattr(lmeval, "evaluate", evaluate)
        assert run(data, out, "--system", "B")[0] == 0
        return evaluate(*arguments, **options)

    monkeypatch.setattr(lmeval, "evaluate", slow)
    code, result = run(data, out, "--system", "A")
    assert code == 2 and result["config"]["system"] == "B"
    assert "result of another configuration (system:" in capsys.readouterr().err
    monkeypatch.setattr(models, "load_model", None)  # its samples are kept
    code, _ = run(data, out, "--system", "A", "--tag", "A")
    assert code == 0 and len(list(out.glob("*.json"))) == 2


def test_data_that_changes_before_it_is_asked_ends_the_run(data, tmp_path, monkeypatch, capsys):
    """The result would have the checksum of the old file and the verdicts of the new one."""
    path, choose = data / "gsm8k" / "test.jsonl", experiment.run.choose_device

    def slow(*arguments):
        path.write_text(path.read_text().replace("#### 2", "#### 7"))
        return choose(*arguments)

    monkeypatch.setattr(experiment.run, "choose_device", slow)
    assert run(data, tmp_path / "a") == (4, None)
    assert "has changed since this run began" in capsys.readouterr().err


def test_overwrite_ignores_what_is_kept_and_says_so(data, tmp_path, caplog):
    run(data, tmp_path / "a")
    code, result = run(data, tmp_path / "a", "--overwrite")
    assert code == 0 and result["status"] == "complete"
    assert (
        len(shards(tmp_path / "a")) == 1
        and len(list(tmp_path.glob("a/cache/*/aside-1/shard-*"))) == 1
    )
    assert "set aside" in caplog.text


def test_results_deleted_between_runs(data, tmp_path):
    _, first = run(data, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert run(data, tmp_path / "a")[1]["content_sha256"] == first["content_sha256"]


def test_a_damaged_sample_alone_is_made_again(data, tmp_path, capsys):
    _, first = run(data, tmp_path / "a")
    drop_result(tmp_path / "a")
    [shard] = shards(tmp_path / "a")
    lines = shard.read_bytes().split(b"\n")
    lines[3] = lines[3][:60] + bytes([lines[3][60] ^ 1]) + lines[3][61:]
    shard.write_bytes(b"\n".join(lines))
    _, again = run(data, tmp_path / "a")
    assert (
        again["content_sha256"] == first["content_sha256"]
        and "1 damaged line in" in capsys.readouterr().err
    )
    assert [len(p.read_bytes().splitlines()) for p in shards(tmp_path / "a")].count(2) == 1


# ---- failures


def test_a_failed_sample_is_a_status_and_is_tried_again(data, tmp_path, monkeypatch):
    _, whole = run(data, tmp_path / "a")
    real = harness.decode_each
    bad = whole["samples"][2]["prompt"]

    def failing(model, prompts, *more, **options):
        texts = [models.load_tokenizer(LLADA).decode(p) for p in prompts]
        if bad in texts:
            raise RuntimeError("injected")
        return real(model, prompts, *more, **options)

    monkeypatch.setattr(harness, "decode_each", failing)
    code, result = run(data, tmp_path / "b", "--batch_size", "2")
    assert (
        code == 5
        and result["status"] == "incomplete"
        and result["n_failed"] == 1
        and result["headline"] is None
    )
    assert "injected" in result["samples"][2]["error"]
    monkeypatch.setattr(harness, "decode_each", real)
    code, again = run(data, tmp_path / "b")
    assert code == 0 and again["content_sha256"] == whole["content_sha256"]
    assert again["meta"]["samples_made"][0]["samples"] == N - 1, "the others were decoded once"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        *(
            pytest.param(error, marks=pytest.mark.slow)
            for error in (
                MemoryError(),
                torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel"),
                RuntimeError(
                    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
                ),
                RuntimeError("CUDA driver error: out of memory"),
            )
        ),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(data, tmp_path, monkeypatch, error):
    """The samples in flight are decoded again, none is lost; the result names the batch sizes."""
    _, whole = run(data, tmp_path / "a")
    real = models.Transformer.predict

    def small(self, tokens, spans, rows, cache=None):
        if len(spans) > 2:
            raise error
        return real(self, tokens, spans, rows, cache)

    monkeypatch.setattr(models.Transformer, "predict", small)
    code, result = run(data, tmp_path / "b", "--batch_size", "6")
    assert code == 0 and result["content_sha256"] == whole["content_sha256"]
    assert result["meta"]["batch_sizes_out_of_memory"] == [6, 3]


def test_out_of_memory_with_one_sample_in_flight_is_a_status(data, tmp_path, monkeypatch):
    def never(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models.Transformer, "predict", never)
    code, result = run(data, tmp_path / "b", "--limit", "2")
    assert (
        code == 5
        and result["n_failed"] == 2
        and result["metrics"] == {}
        and result["score_on_completed"] == {}
    )


# ---- two processes, signals


def test_a_second_process_exits_75_and_says_who_has_it(data, tmp_path, capsys):
    generation_id = run(data, tmp_path / "a")[1]["generation_id"]
    drop_result(tmp_path / "a")
    config = json.loads(next(tmp_path.glob("a/cache/*/config.json")).read_text())
    identity = {k: v for k, v in config.items() if k not in ("config_id", "store_version")}
    with Store.open(tmp_path / "a" / "cache", identity, generation_id):
        capsys.readouterr()
        assert run(data, tmp_path / "a")[0] == 75
    assert f"pid {os.getpid()}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_good_order(tmp_path, number, capfd):
    """Pre-emption: exit 128+n within seconds, no finished sample is lost, no result is written.

    SIGTERM to another process, SIGINT to this one.
    """
    big = gsm8k_dir(tmp_path / "big", n=200)
    more = ("--device", "cpu", "--gen_length", "64", "--tokens_per_step", "1", "--batch_size", "2")

    def send(pid: int) -> None:
        end = time.monotonic() + 300  # a busy machine takes its time to start
        while not any(p.stat().st_size > 3000 for p in shards(tmp_path / "a")):
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        os.kill(pid, number)

    if number == signal.SIGTERM:
        process = forked(lambda: cli.main(arguments(big, tmp_path / "a", *more)), tmp_path / "log")
        send(process.pid)
        process.join(20)
        code, err = process.exitcode, (tmp_path / "log").read_text()
    else:
        threading.Thread(target=send, args=(os.getpid(),), daemon=True).start()
        code, err = cli.main(arguments(big, tmp_path / "a", *more)), capfd.readouterr().err
    assert code == 128 + number and "Traceback" not in err
    kept = [line for line in err.splitlines() if "samples are kept in" in line]
    assert (
        len(kept) == 1
        and "run the same command again to go on" in kept[0]
        and not list((tmp_path / "a").glob("*.json"))
    )
    n = int(kept[0].split(" finished samples")[0].split()[-1])
    assert n == sum(len(p.read_text().splitlines()) - 1 for p in shards(tmp_path / "a")) > 0


# ---- several workers


def test_a_signal_is_not_lost_in_a_finalizer():
    """Python ignores an exception out of __del__: the run would go on until it is killed."""

    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))

    with signals_raise():
        with pytest.raises(Signalled):
            Slow()
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGHUP"])
def test_signals_that_announce_the_end_of_a_job_end_a_run_in_good_order(name, monkeypatch):
    """They killed it without a word."""
    number = getattr(signal, name)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # nohup ignores HUP
    with signals_raise(), pytest.raises(Signalled, match=str(int(number))):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_place_of_a_process():
    assert worker_info({}).leads and worker_info({}).size == 1
    place = worker_info({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"})
    assert (place.rank, place.size, place.local_rank, place.leads) == (3, 4, 1, False)


PARENT = f"pid-{os.getppid()}-{process_start(os.getppid())}"
TWO_NODES = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        (TWO_NODES, "n0-7"),
        (TWO_NODES | {"TORCHELASTIC_RUN_ID": "a", "SLURM_JOB_ID": "5"}, "n0-7-a"),
        ({"WORLD_SIZE": "2", "SLURM_JOB_ID": "5"}, "job-5"),
        (TWO_NODES | {"LOCAL_WORLD_SIZE": "2"}, f"n0-7-{PARENT}"),
        ({"WORLD_SIZE": "2"}, PARENT),
    ],
)
def test_a_launch_is_the_same_on_all_of_its_nodes(environ, launch):
    """The launcher's pid differs by node, and rank 1 waited for ever."""
    assert worker_info(environ | {"RANK": "1"}).launch == launch


def test_a_world_size_without_a_rank_is_ignored(data, tmp_path, monkeypatch, capsys, caplog):
    """It waited for ever for a process that nobody had started."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments(data, tmp_path / "a", "--limit", "1")) == 0
    assert "WORLD_SIZE=2 without RANK is ignored" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    "environ", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "0"}]
)
def test_a_place_that_cannot_be_is_named(environ, monkeypatch, data, tmp_path, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments(data, tmp_path / "a")) == 2
    assert "not valid; unset" in capsys.readouterr().err


@pytest.mark.slow
def test_two_nodes_share_one_experiment(data, tmp_path):
    """Two agents of torchrun, as on two nodes: rank 1 found no leader and said nothing."""
    _, whole = run(data, tmp_path / "a", "--temperature", "0.7")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "a"]
    agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    more = ("--device", "cpu", "--temperature", "0.7")
    command = [sys.executable, "-m", *agent, "eval.py", *arguments(data, tmp_path / "b", *more)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    nodes = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **quiet)
        for _ in range(2)
    ]
    errors = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert sorted(f"rank {i} of 2 on" in error for i in (0, 1) for error in errors) == [0, 0, 1, 1]
    [path] = (tmp_path / "b").glob("*.json")
    assert json.loads(path.read_text())["content_sha256"] == whole["content_sha256"]
    written = [len(p.read_text().splitlines()) - 1 for p in shards(tmp_path / "b")]
    assert len(written) == 2 and sum(written) == N


@pytest.mark.parametrize("came", [False, True])
def test_a_missing_rank_is_named_and_its_share_decoded(data, tmp_path, monkeypatch, caplog, came):
    """It has not started, or fell silent on its node: rank 0 waited for ever."""
    _, whole = run(data, tmp_path / "a")
    for name, value in (TWO_NODES | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("experiment.status.JOIN_S", 0)
    monkeypatch.setattr("experiment.status.TOUCH_S", 0.05)
    wait, text = SampleCache.arriving, "rank 1 of 2 has not joined"

    def rank_1_came(self, waiting):
        content = json.loads(self.status.path.read_text()) | {"rank": 1, "host": "node7"}
        path = self.status.path.with_name("status-1.json")
        path.write_text(json.dumps(content))
        os.utime(path, (0, 0))
        return wait(self, waiting)

    if came:
        monkeypatch.setattr(SampleCache, "arriving", rank_1_came)
        text = "rank 1 of 2 on node7 has ended early"
    assert cli.main(arguments(data, tmp_path / "b")) == 0
    assert text in caplog.text
    [path] = (tmp_path / "b").glob("*.json")
    assert json.loads(path.read_text())["content_sha256"] == whole["content_sha256"]


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(data, tmp_path):
    _, whole = run(data, tmp_path / "a", "--temperature", "0.7")
    more = ("--temperature", "0.7", "--devices", "cpu,cpu")
    assert cli.main(arguments(data, tmp_path / "b", *more)) == 0
    [path] = (tmp_path / "b").glob("*.json")
    assert json.loads(path.read_text())["content_sha256"] == whole["content_sha256"]
    written = [len(p.read_text().splitlines()) - 1 for p in shards(tmp_path / "b")]
    assert len(written) == 2 and sum(written) == N


def test_what_a_dead_worker_leaves_is_decoded_by_the_leader(data, tmp_path, monkeypatch):
    """A worker that cannot start, for lack of memory say, costs time and no sample."""
    _, whole = run(data, tmp_path / "a")

    class Stillborn(WorkerPool):
        def __init__(self, argv, devices, place):
            self.processes = [subprocess.Popen([sys.executable, "-c", "raise SystemExit(4)"])]

    monkeypatch.setattr("experiment.run.WorkerPool", Stillborn)
    assert cli.main(arguments(data, tmp_path / "b", "--devices", "cpu,cpu")) == 0
    [path] = (tmp_path / "b").glob("*.json")
    assert json.loads(path.read_text())["content_sha256"] == whole["content_sha256"]


def test_a_worker_does_not_outlive_its_leader(tmp_path):
    # no process is its own parent; a container's first process is 1
    place = WorkerInfo(rank=1, size=2, session="s", parent=os.getpid())
    with pytest.raises(LeaderGone, match="what it decoded is kept"):
        place.check()
    with pytest.raises(LeaderGone, match=r"waited 0\.1 s for rank 0.* same --output_dir"):
        await_leader(tmp_path, WorkerInfo(rank=1, size=2), timeout_s=0.1)


def test_a_rank_joins_the_run_of_its_own_launch(tmp_path, monkeypatch):
    """Not one that ended before this process started; one that has ended meanwhile needs it not."""
    store = Store.open(tmp_path, {}, "a" * 64)
    worker, leader = (WorkerInfo(rank, 2, launch="n0-7") for rank in (1, 0))

    def found(state: str, **more) -> str | None:
        with store, StatusFile(store, replace(leader, session="s", **more), tmp_path / "r") as file:
            file.say(state, "no room")
            return await_leader(store.directory, worker, timeout_s=0.1)

    assert found("generating") == "s" and found("done") is None
    with pytest.raises(LeaderGone, match="rank 0 on .* has ended: no room"):
        found("failed")
    with pytest.raises(LeaderGone, match="waited"):
        found("generating", launch="n0 8")
    monkeypatch.setattr("experiment.status.STARTED", time.time() + 9)
    with pytest.raises(LeaderGone, match="waited"):
        found("done")


def test_device_and_devices_are_not_given_together(data, tmp_path, capsys):
    assert cli.main(arguments(data, tmp_path, "--device", "cpu", "--devices", "0,1")) == 2
    assert "--device cpu and --devices 0,1" in capsys.readouterr().err


# ---- determinism of every algorithm, through the command line


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_algorithm_is_deterministic_under_batches_and_resume(tmp_path, family):
    """With drawn tokens; batch sizes 1 and 3; half of it resumed."""
    from mini import DREAM

    checkpoint = LLADA if family == "llada" else DREAM
    data, verifier = gsm8k_dir(tmp_path / "data", 4), verifier_checkpoint(tmp_path / "verifier")
    words = f"--model_alias {family} --task gsm8k --device cpu --dtype float32 --gen_length 16 "
    words += "--tokens_per_step 3 --temperature 0.7"
    common = [*words.split(), f"--{family}_ckpt", str(checkpoint), "--data_dir", str(data)]
    host = cli.Host(KeptModel().load)  # the checkpoints are loaded once
    for algorithm in algorithms_of(family):
        seen = set()
        for batch in ("1", "3"):
            out = tmp_path / f"{algorithm}-{batch}"
            more = [*common, "--output_dir", str(out), "--alg", algorithm, "--batch_size", batch]
            if ALGORITHMS[algorithm].blocks:
                more += ["--block_length", "8"]
            if ALGORITHMS[algorithm].verification:
                more += ["--verifier_ckpt", str(verifier)]
            if batch == "3":
                assert cli.main([*more, "--limit", "2"], host) == 0
            assert cli.main(more, host) == 0
            [path] = [p for p in out.glob("*.json") if "limit" not in p.name]
            seen.add(json.loads(path.read_text())["content_sha256"])
        assert len(seen) == 1, algorithm


@pytest.mark.slow
def test_kill_test_small(capsys):
    """SIGKILL while it writes and while it resumes: dev/kill_test.py in small."""
    from dev.kill_test import main

    assert main(["--kills", "2", "--samples", "8", "--seed", "14"]) == 0
    assert "lost 0, differing bytes 0" in capsys.readouterr().out
