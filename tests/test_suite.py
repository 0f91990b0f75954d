"""The suite: its experiments, their states, and that running them loses and repeats nothing."""

import errno
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from causal import verifier_checkpoint
from mini import DREAM, LLADA, ROOT, gsm8k_dir

import eval as cli
from experiment import status
from experiment.result import VOLATILE
from experiment.sample_cache import SampleCache, ShareDone
from experiment.status import StatusFile, StatusRecord, Summary, Sums, counted, read_status
from experiment.store import HOST, Store, process_start
from experiment.workers import WorkerInfo
from scripts import report
from scripts.sweep import main, parse
from suite.cluster import shares
from suite.lease import Lease, read_records
from suite.local import LocalEngine, QueuedExperiment, Worker, make_workers
from suite.matrix import Experiment, Selection, arguments, experiments, select
from suite.preflight import _disk, _time, preflight
from suite.run import Bar, SuiteLog, progress_command
from suite.state import Status, Watcher, write_failure
from suite.table import Estimator, duration, progress_table, summary_line
from suite.worker import KeptModel, obey
from utils import BusyError, OutputError, UsageError, atomic_write_json, sha256

SWEEP = [sys.executable, str(ROOT / "scripts" / "sweep.py")]


def flags(data: Path, *more: str) -> tuple[str, ...]:
    return (
        "--llada_ckpt",
        str(LLADA),
        "--llada15_ckpt",
        str(LLADA),
        "--dream_ckpt",
        str(DREAM),
        "--data_dir",
        str(data),
        "--gen_length",
        "32",
        "--dtype",
        "float32",
        *more,
    )


def chosen(tmp_path: Path, n: int = 6, **selection) -> list:
    """Experiments on n word problems; by default one."""
    data = tmp_path / "data"
    if not data.exists():
        gsm8k_dir(data, n)
    more = selection.pop("extra", ())
    axes = {"models": ("llada",), "tasks": ("gsm8k",), "tps": (2,)} | selection
    return select(Selection(**axes, extra=flags(data, *more), output_dir=str(tmp_path / "out")))


def run_here(experiment) -> dict:
    assert cli.main([*experiment.argv, "--device", "cpu"]) == 0
    return json.loads(experiment.job.path.read_text())


# ---- which experiments


def test_the_matrix_is_48_experiments_with_48_results():
    found = select(Selection())
    assert len(found) == len({e.job.path for e in found}) == 48
    assert (
        found[0].command
        == "python eval.py --model_alias llada --task humaneval --tokens_per_step 1"
    )
    assert sum(e.n for e in found) == 12 * (164 + 500 + 1319 + 817)
    # those of one model stand together
    models = [e.model for e in found]
    assert sum(a != b for a, b in zip(models, models[1:])) == 3


def test_filters_and_extensions():
    names = [
        e.name
        for e in select(
            Selection(models=("dream",), tasks=("mbpp",), tps=(4, 8), extra=("--limit", "5"))
        )
    ]
    assert names == ["dream_mbpp_maskgit_plus_tps4_limit5", "dream_mbpp_maskgit_plus_tps8_limit5"]
    # an algorithm is for the models that have it
    found = select(Selection(tasks=("gsm8k",), tps=(1,), algs=("leftright", "entropy")))
    assert [e.name for e in found] == [
        "llada_gsm8k_leftright_tps1",
        "llada1.5_gsm8k_leftright_tps1",
        "dream_gsm8k_leftright_tps1",
        "dream_gsm8k_entropy_tps1",
        "diffucoder_gsm8k_leftright_tps1",
        "diffucoder_gsm8k_entropy_tps1",
    ]


def test_a_yaml_file_of_any_argument_sets(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        "- --model_alias llada --task gsm8k --tag a\n"
        "- [--model_alias, dream, --task, mbpp, --limit, 3]\n"
        "- {model_alias: [llada, dream], task: humaneval, tokens_per_step: [2, 4],\n"
        "   no_early_exit: true, tag: null}\n"
    )
    found = select(Selection(file=file))
    assert [e.name for e in found] == [
        "llada_gsm8k_low_confidence_tps1_a",
        "dream_mbpp_maskgit_plus_tps1_limit3",
        "llada_humaneval_low_confidence_tps2",
        "llada_humaneval_low_confidence_tps4",
        "dream_humaneval_maskgit_plus_tps2",
        "dream_humaneval_maskgit_plus_tps4",
    ]
    assert found[2].argv[-1] == "--no_early_exit"
    assert [e.name for e in select(Selection(file=file, models=("dream",), tps=(4,)))] == [
        "dream_humaneval_maskgit_plus_tps4"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c", "my.yaml, line 1: mapping values are not allowed here$"),
        ("- \0", "my.yaml is not YAML: [^\\n]*not allowed$"),
        ("- --model_alias llada --task gsm8k\n-", "entry 2 is empty$"),
        ("model_alias: llada", "expected a list"),
        ("- 3", "3 is no argument set"),
        ("- --model_alias llada --task gsm9k", "--task 'gsm9k' is not known"),
        (
            "- --model_alias llada --task gsm8k --block_length 64\n"
            "- --model_alias llada --task gsm8k",
            "two experiments would write",
        ),
        (
            "- model_alias: llada\n  task: gsm8k\n  task: mbpp",
            "my.yaml, line 3: 'task' is given twice$",
        ),
        ("- --model_alias 'llada --task gsm8k", "entry 1: .*No closing quotation"),
        *((f"- {e}", "cannot be given to an experiment") for e in ("--help", "[-h]", "help: true")),
        (f"- {{model_alias: llada, task: gsm8k, seed: {[*range(9000)]}}}", "to 9000 experiments"),
        (
            f"- {{model_alias: llada, limit: {'9' * 5000}}}",
            "an integer has more than 4300 digi",
        ),
        (f"- {{model_alias: llada, limit: 0x{'f' * 5000}}}", "limit: .*bits is too large"),
        ("- " + "[" * 2000 + "]" * 2000, "my.yaml is nested too deeply$"),
        ("- &a [*a]", "entry 1: a word must be a text or a number, not a list$"),
        (
            "- {model_alias: {a: b}}",
            "entry 1: model_alias must be a text or a number, not a mapping$",
        ),
        ("- {1: llada}", "1 is no flag"),
        ('- "--task a\\0b"', "entry 1: .* has a null character$"),
        ('- {task: "a\\0b"}', "entry 1: task has a null character$"),
        ("- {model_alias: llada, limit: 2024-13-45}", "is not YAML: month"),
    ],
)
def test_a_file_that_cannot_be_is_named(tmp_path, text, problem):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        select(Selection(file=tmp_path / "my.yaml"))


def test_wrong_options_are_reported_at_once(capsys, tmp_path):
    assert main(["plan", "--models", "lada", "--tasks", "gsm9k"]) == 2
    assert (
        "did you mean 'llada'" in (err := capsys.readouterr().err) and "did you mean 'gsm8k'" in err
    )
    assert (
        main(["run", "--extra", "--device cuda:1 --overwrite", "--output_dir", str(tmp_path)]) == 2
    )
    assert (
        "--device cannot be given" in (err := capsys.readouterr().err)
        and "--overwrite cannot be given" in err
    )
    assert main(["run", "--workers", "0"]) == 2 and main(["plan", "--nonsense"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_hints_repeat_the_output_directory():
    """progress showed 48 untouched rows of another directory."""
    assert progress_command(Path("results")) == "./scripts/progress.sh"
    assert progress_command(Path("a b")) == "./scripts/progress.sh --output_dir 'a b'"


def test_true_is_a_switch_and_false_leaves_it_out():
    assert arguments({"task": "mbpp", "no_early_exit": True, "debug": False}) == [
        ["--task", "mbpp", "--no_early_exit"]
    ]


def test_without_tmux_the_way_out_is_named(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    run = subprocess.run(
        ["bash", ROOT / "scripts" / "exp.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3 and "--no_tmux" in run.stderr and "not installed" in run.stderr


# ---- status files


def sample(i: int) -> tuple[dict, dict]:
    """(result, meta) of a sample as the harness keeps it; every other one is right."""
    meta = {"cost_seconds": 0.5, "doc_id": i, "seconds": 1.0, "tokens_returned": 10 + i}
    return {"committed_at": [1, 2], "nfe": 7, "token_ids": [3]}, meta


ALONE = WorkerInfo()


def started(folder: Path, place: WorkerInfo = ALONE, **more) -> tuple[Store, SampleCache]:
    """The store and the samples of a run that has just started."""
    store = Store.open(folder, {}, "a" * 64, alone=place.leads)
    file = StatusFile(store, place, folder / "result.json", **more)
    return store, SampleCache("a" * 64, store, place, status=file)


def test_sums_are_those_of_the_store(tmp_path):
    """Failed samples that succeed later, documents above the limit, damage: counted as they are."""
    with Store.open(tmp_path, {}, "a" * 64) as store:
        for i in range(5):
            result, meta = sample(i)
            store.put(f"{i:064x}", {"status": "ok", "result": result, "meta": meta})
        store.put("f" * 64, {"status": "error", "result": {}, "meta": {"error": "x"}})
        store.put(f"{0:064x}", {"status": "error", "result": {}, "meta": {}})
        assert counted(Store.read(store.directory, "a" * 64), None) == Sums(5, 0, 60, 35, 2.5)
        assert counted(Store.read(store.directory, "a" * 64), 2) == Sums(2, 0, 21, 14, 1.0)
        assert len(Store.read(store.directory, "a" * 64).errors()) == 1
        assert counted(Store.read(tmp_path / "absent", "a" * 64), None) == Sums()
        before = {path: path.stat().st_mtime_ns for path in store.directory.iterdir()}
        Store.read(store.directory, "a" * 64)
        assert before == {path: path.stat().st_mtime_ns for path in store.directory.iterdir()}


def test_the_interval_of_merged_sums_is_that_of_the_samples():
    from experiment.statistics import estimate

    for values in ([1, 0, 1, 1], [0, 0], [0.2, 0.7, 0.4, 1.0], [0.3]):
        parts = [Sums(scored=1, score=v, squares=v * v) for v in values]
        found, wanted = sum(parts, Sums()).estimate(), estimate(values)
        assert found == pytest.approx((wanted.value, wanted.low, wanted.high, len(values)))
    assert Sums(n=3).estimate() is None


def test_a_status_file_is_written_at_most_every_two_seconds_and_at_the_end(tmp_path, monkeypatch):
    """Also for the last sample of a batch: one write counts all that finish together."""
    monkeypatch.setattr(status, "WRITE_S", 0.3)
    store, samples = started(tmp_path)
    seen = []
    monkeypatch.setattr(
        samples.status, "write", lambda write=samples.status.write: seen.append(write())
    )
    with store:
        for i in range(4):
            samples.remember(f"{i:064x}", *sample(i), i % 2)
        [record] = read_status(store.directory)
        assert (record.state, record.sums, len(seen)) == ("generating", Sums(), 0)
        wait_for(lambda: read_status(store.directory)[0].sums.n == 4, 5)
        assert len(seen) == 1
        samples.failed("f" * 64, "x")
        with pytest.raises(KeyboardInterrupt), samples.status:
            raise KeyboardInterrupt
    [record] = read_status(store.directory)
    assert record.state == "stopped"
    assert record.sums == Sums(4, 1, 46, 28, 2.0, scored=4, score=2, squares=2)


def test_a_resumed_run_counts_what_is_kept_with_its_scores(tmp_path):
    for first in (0, 3):
        store, samples = started(tmp_path, limit=5)
        with store, samples.status:
            for i in range(first, first + 3):
                samples.remember(f"{i:064x}", *sample(i), i % 2)
    [record] = read_status(store.directory)
    assert record.sums == replace(counted(store, None), failed=0)
    assert (record.sums.n, record.sums.scored, record.sums.score) == (6, 6, 3)
    store, samples = started(tmp_path, limit=5)
    assert samples.status.record.sums.n == 5
    store.close()


def test_a_score_of_another_scoring_version_is_not_shown(tmp_path, monkeypatch):
    store, samples = started(tmp_path)
    with store, samples.status:
        samples.remember("1" * 64, *sample(1), 1)
    assert counted(store, None).scored == 1
    monkeypatch.setattr(status, "SCORING_VERSION", 99)
    assert counted(store, None) == Sums(1, 0, 11, 7, 0.5)


def test_the_files_of_several_workers_add_up_and_those_of_an_earlier_run_do_not(tmp_path):
    """Rank 2 is of a run with three workers, which has ended; its file goes with the next run."""
    old = WorkerInfo(0, 3, session="old"), WorkerInfo(2, 3, session="old")
    for place in old:
        store, samples = started(tmp_path, place)
        with store, samples.status:
            samples.remember(f"{place.rank:064x}", *sample(place.rank))
    assert sum(r.sums.n for r in read_status(store.directory)) == 2
    leader, first = started(tmp_path, WorkerInfo(0, 2, session="new"))
    assert [r.rank for r in read_status(store.directory)] == [0]
    worker, second = started(tmp_path, WorkerInfo(1, 2, session="new"))
    with leader, worker, first.status, second.status:
        first.remember(f"{5:064x}", *sample(5))
        second.remember(f"{6:064x}", *sample(6))
        with pytest.raises(ShareDone):
            second.share_done()
        first.share_done()
        found = read_status(store.directory)
        assert [(r.state, r.sums.n) for r in found] == [("scoring", 3), ("done", 1)]
        assert not (store.directory / "status-2.json").exists()
    # a rank without its leader says nothing
    (store.directory / "status-0.json").unlink()
    assert read_status(store.directory) == []


def test_how_a_run_ends_is_in_its_status_file(tmp_path):
    class Broken(Exception):
        pass

    for error, found in [
        (UsageError(["a", "b"]), ("failed", "a; b")),
        (Broken("no"), ("failed", "Broken: no")),
        (KeyboardInterrupt(), ("stopped", "")),
        (None, ("stopped", "")),
    ]:
        store, samples = started(tmp_path)
        with store:
            try:
                with samples.status:
                    if error:
                        raise error
            except type(error):
                pass
        [record] = read_status(store.directory)
        assert (record.state, record.error) == found


def test_a_status_file_cannot_end_a_run(tmp_path):
    """A full disk, a deleted directory: the samples count, the status is shown where it can be."""
    store, samples = started(tmp_path)
    (store.directory / "status-0.tmp").mkdir()
    samples.remember("7" * 64, *sample(7))
    samples.status.say("scoring")
    [record] = read_status(store.directory)
    assert (record.state, record.sums.n) == ("generating", 0)
    (store.directory / "status-0.tmp").rmdir()
    samples.status.say("scoring")
    assert read_status(store.directory)[0].sums.n == 1
    store.close()
    shutil.rmtree(store.directory)
    samples.status.say("done")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"rank": 0', '{"sums": {"n": 1}}'])
def test_a_damaged_status_file_is_no_status_file(tmp_path, text):
    """The store is counted then."""
    [experiment] = chosen(tmp_path, extra=("--limit", "2"))
    run_here(experiment)
    experiment.path.unlink()
    whole = Watcher(experiment).status()
    assert (whole.state, whole.n, whole.of) == ("partial", 2, 2) and whole.sums.scored == 2
    (experiment.store / "status-0.json").write_text(text)
    assert Watcher(experiment).status() == whole
    (experiment.store / "status-0.json").unlink()
    assert Watcher(experiment).status() == whole


# ---- where an experiment stands


def running(experiment: Experiment, **more) -> StatusRecord:
    """Write the status file of a run of this process, or of another one; its record."""
    experiment.store.mkdir(parents=True, exist_ok=True)
    own = {"rank": 0, "session": "s", "pid": os.getpid(), "host": HOST}
    own |= {"start": process_start(os.getpid()), "result": str(experiment.path.resolve())}
    record = StatusRecord(**own | {"time": time.time()} | more)
    atomic_write_json(experiment.store / "status-0.json", asdict(record))
    return record


def test_states_from_the_first_sample_to_the_result(tmp_path):
    """Waiting, partial, running, failed as the suite noted it, done."""
    [experiment] = chosen(tmp_path)
    [limited] = chosen(tmp_path, extra=("--limit", "2"))
    assert experiment.store == limited.store
    watcher = Watcher(experiment)
    assert watcher.status() == Status("waiting", 6)
    result = run_here(limited)
    assert (experiment.id, experiment.result_id) == (result["generation_id"], result["id"])
    assert Watcher(limited).status().state == "done"
    found = watcher.status()
    # of the samples that are there, which are those of an experiment with another --limit
    assert found.score == (result["headline"]["value"], *result["headline"]["ci95"], 2)
    assert (found.state, found.n, found.of, found.sums.forwards) == ("partial", 2, 6, 32)
    running(experiment, sums=Sums(n=3))
    assert (watcher.status().state, watcher.status().n) == ("running", 3)
    assert watcher.status().note == f"generating by pid {os.getpid()} on {HOST}"
    assert Watcher(limited).status().state == "done"
    running(experiment, state="stopped")
    assert watcher.status().state == "waiting"
    running(experiment, state="failed", error="no room")
    assert (watcher.status().state, watcher.status().note) == ("failed", "no room")
    experiment.log.parent.mkdir()
    write_failure(experiment, "no memory", None)
    assert (watcher.status().state, watcher.status().note) == ("failed", "no memory")
    running(experiment, state="stopped", time=time.time() + 1)  # a later attempt
    assert watcher.status().state == "waiting"
    run_here(experiment)
    found = watcher.status()
    assert (found.state, found.n, found.score[0], found.score[3]) == ("done", 6, 0.0, 6)
    assert found.sums.seconds > 0 and found.sums.tokens > 0


def test_a_run_that_was_killed_is_not_running(tmp_path):
    """On this host the process says so, on another one the age of its file."""
    [experiment] = chosen(tmp_path)
    running(experiment, start="99")
    assert Watcher(experiment).status().state == "waiting"
    running(experiment, host="node7", pid=1, state="scoring", sums=Sums(n=4))
    assert Watcher(experiment).status().note == "scoring by pid 1 on node7"
    os.utime(experiment.store / "status-0.json", (0, 0))
    assert Watcher(experiment).status().state == "partial"
    running(experiment, start=None, sums=Sums(n=4))  # macOS has no start times
    assert Watcher(experiment).status().state == "running"


def test_the_summary_in_a_status_file_is_that_of_the_result(tmp_path, monkeypatch):
    """So no result is read; one that is replaced is."""
    [experiment] = chosen(tmp_path)
    result = run_here(experiment)
    read = Summary.of_result(experiment.path, result, experiment.metric)
    assert read_status(experiment.store)[0].summary == read and read.sums.n == read.of == 6
    with monkeypatch.context() as patch:
        patch.setattr("suite.state.load_result", lambda path: pytest.fail("the result was read"))
        done = Watcher(experiment).status()
    assert (done.state, done.n, done.of) == ("done", 6, 6)
    assert done.score == (result["headline"]["value"], *result["headline"]["ci95"], 6)
    for file in experiment.store.glob("status-*"):
        file.unlink()
    assert Watcher(experiment).status() == done
    experiment.path.unlink()
    assert Watcher(experiment).status().state == "partial"


def test_a_result_of_another_scoring_is_to_be_scored_again(tmp_path):
    """Its samples are all there, so it needs no device, and its old score is not shown."""
    [experiment] = chosen(tmp_path)
    run_here(experiment)
    found = Watcher(replace(experiment, result_id="0" * 64)).status()
    assert (found.state, found.n, found.of, found.score) == ("partial", 6, 6, None)
    assert "scored again" in found.note
    engine = LocalEngine(
        Lease(tmp_path / "out", [experiment], 1), [(experiment, found)], [Worker("cpu", {})], print
    )
    assert engine.tasks[0].stage == "score"


def test_a_result_with_failed_samples_is_no_final_one(tmp_path):
    [experiment] = chosen(tmp_path)
    result = run_here(experiment)
    failed = result | {"status": "incomplete", "n_failed": 2, "headline": None}
    failed["score_on_completed"] = {experiment.metric: result["headline"]}
    covered = {name: value for name, value in failed.items() if name not in VOLATILE}
    failed["content_sha256"] = sha256(covered)
    experiment.path.write_text(json.dumps(failed))
    found = Watcher(experiment).status()
    assert (found.state, found.n, found.note) == ("failed", 4, "2 samples failed")
    assert found.score[0] == result["headline"]["value"]
    running(experiment)
    assert Watcher(experiment).status().state == "running"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "not json", '{\n "status": 3\n}\n', '{\n "status": "complete",\n "samples": [\n'],
)
def test_a_foreign_file_in_place_of_a_result_is_named(tmp_path, text):
    [experiment] = chosen(tmp_path)
    experiment.job.path.parent.mkdir()
    experiment.job.path.write_text(text)
    found = Watcher(experiment).status()
    assert found.state == "failed" and str(experiment.job.path) in found.note


def test_a_result_of_another_configuration_is_no_result_of_this_one(tmp_path):
    [experiment] = chosen(tmp_path)
    [other] = chosen(tmp_path, extra=("--confidence_dtype", "float32"))
    run_here(other)
    found = Watcher(experiment).status()
    assert found.state == "failed" and "of another configuration" in found.note


def test_time_left_goes_by_the_nearest_relative(tmp_path):
    one, two, other = chosen(tmp_path, tps=(1, 2)) + chosen(tmp_path, models=("dream",), tps=(1,))
    fresh, begun = Status("waiting", 6), Status("partial", 6, Sums(2, 0, 40, 64, 4.0))
    assert Estimator([(one, fresh)]).left_s(one, fresh) is None
    estimator = Estimator([(one, begun), (two, fresh), (other, fresh)])
    assert estimator.left_s(one, begun) == 8.0
    assert estimator.left_s(two, fresh) == pytest.approx(6.0)  # half the forward passes
    # 31 of its 32 steps commit something
    assert estimator.left_s(other, fresh) == pytest.approx(12.0 * 31 / 32)
    text = progress_table([(one, begun), (two, fresh)], workers=2)
    assert "about 7 s left with 2 workers" in text
    assert (
        "2 experiments: 1 begun, 1 not begun; 2 of 12 samples; about 7 s left with 2 workers"
        in text
    )
    assert [duration(s) for s in (None, 40, 600, 7500, 200000)] == [
        "-",
        "40 s",
        "10 m",
        "2 h 5 m",
        "2 d 7 h",
    ]


def test_tables_fit_a_terminal_of_80_columns(monkeypatch, capsys):
    """Every row wrapped, and `--watch` scrolled its header away."""
    found = select(Selection())
    rows = [(e, Status("waiting", e.n)) for e in found]
    score = (0.5, 0.4, 0.6, 1200)
    rows[30] = found[30], Status("running", 1319, Sums(1200, 0, 200_000, 400_000, 33333.0), score)
    rows[31] = found[31], Status("failed", 1319, note="a long reason " * 20)
    text = progress_table(rows, 2, (80, 22))
    lines = text.splitlines()
    assert len(lines) <= 22 and max(map(len, lines)) <= 80 and lines[0].startswith("experiment ")
    assert f"{found[30].name} " in text and "50.0*" in text and f"{found[31].name} " in text
    assert "not shown: 30 not begun" in text
    assert "48 experiments: 1 running, 46 not begun, 1 failed" in text
    text = progress_table(rows, 2, (80, 0))
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{e.name} " in text for e in found), "no name wraps"
    assert "50.0 [40.0, 60.0] of 1200" in progress_table(rows, 2)  # of a file, as wide as it gets
    long = select(Selection(suite="parallel"))
    text = progress_table([(e, Status("waiting", e.n)) for e in long], 2, (80, 0))
    assert max(map(len, text.splitlines())) <= 80 and text.count("_dllmexp-mini") == 1
    lines = progress_table(long_rows := [(e, Status("waiting", e.n)) for e in long], 2, (80, 22))
    assert len(lines.splitlines()) <= 22 and len(long_rows) == 72, "names that wrap take room"
    monkeypatch.setattr("suite.table.terminal_columns", lambda: 80)
    assert main(["plan", "--suite", "parallel"]) == 0
    plan = capsys.readouterr().out
    assert all(len(line) <= 80 or " " not in line[4:-2] for line in plan.splitlines())
    commands = [shlex.split(c.replace("\\\n", " ")) for c in plan.split("python ")[1:]]
    assert commands[0][: 1 + len(long[0].argv)] == ["eval.py", *long[0].argv], "still to be copied"


def test_columns_of_progress_fold_in_a_stated_order():
    """TPF, the interval, the border, tok/s."""
    found = select(Selection())
    score = (0.5, 0.4, 0.6, 1200)
    rows = [(e, Status("waiting", e.n)) for e in found]
    rows[30] = found[30], Status("running", 1319, Sums(1200, 0, 9, 9, 9.0), score)
    for columns, has in (
        (140, {"TPF", "[40.0, 60.0]", "---+", "tok/s"}),
        (115, {"[40.0, 60.0]", "---+", "tok/s"}),
        (100, {"---+", "tok/s"}),
        (86, {"tok/s"}),
        (76, set()),
    ):
        text = progress_table(rows, 2, (columns, 0))
        assert max(map(len, text.splitlines())) <= columns
        assert {name for name in ("TPF", "[40.0, 60.0]", "---+", "tok/s") if name in text} == has
        assert "50.0" in text and "score %" in text


def test_a_state_says_what_is_waited_for(tmp_path):
    """ "waiting" and "partial" did not."""
    [one] = chosen(tmp_path)
    some, full = Sums(2, 0, 40, 64, 4.0), Sums(6, 0, 40, 64, 4.0)
    for found, word, wait in [
        (Status("waiting", 6), "not begun", "no suite is running it"),
        (Status("waiting", 6, queued=True), "queued", "waits for a worker of its suite"),
        (Status("partial", 6, some), "begun", "has samples, and no suite is running it"),
        (Status("partial", 6, some, queued=True), "queued", "waits for a worker of its suite"),
        (Status("running", 6, full), "to score", "has every answer and waits to be scored"),
    ]:
        text = progress_table([(one, found)], 1)
        assert f"\n{word}: {wait}\n" in text and f"1 experiment: 1 {word};" in text


def test_a_mean_that_is_no_share_is_not_in_percent(tmp_path):
    [one] = chosen(tmp_path)
    text = progress_table([(one, Status("done", 6, Sums(6), (37.25, None, None, 6)))], 1)
    assert "| 37.250 (no %) |" in text


def test_watch_keeps_header_and_totals_in_view_to_its_end(monkeypatch):
    """Its last table had every row and scrolled the header away."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    found, screen, slept = select(Selection()), Terminal(), []
    states = iter(["running", "done"])

    def statuses(watchers):
        state = next(states)
        return [(e, Status(state, 9, Sums(9 if state == "done" else 3))) for e in found]

    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    monkeypatch.setattr("scripts.sweep.watched", lambda args: ([], 1))
    monkeypatch.setattr("scripts.sweep.read_records", lambda folder: [])
    monkeypatch.setattr("scripts.sweep.statuses", statuses)
    monkeypatch.setattr("time.sleep", slept.append)
    assert main(["progress", "--watch"]) == 0
    first, last = screen.getvalue().split("score %")[1:]
    assert "48 experiments: 48 running" in first and "48 experiments: 48 done" in last
    assert len(last.splitlines()) < 24 and "not shown: " in last and slept == [5.0]


def test_a_plan_says_what_its_suite_needs(tmp_path, capsys, monkeypatch):
    """An absent checkpoint showed after hours; memory, disk and time were left to the user."""
    data, out = gsm8k_dir(tmp_path / "data", 6), tmp_path / "out"
    common = ["--data_dir", data, "--gen_length", "32", "--dtype", "float32"]

    def needs(model: str, checkpoint: str, *more: str) -> str:
        extra = shlex.join(map(str, [*common, f"--{model}_ckpt", checkpoint, *more]))
        words = ["--models", model, "--tasks", "gsm8k", "--tps", "2", "--extra", extra]
        assert main(["plan", *words, "--output_dir", str(out)]) == 0
        return capsys.readouterr().out

    assert "checkpoint /nowhere: ABSENT, does not exist" in needs("llada", "/nowhere")
    text = needs("llada", "no/where")
    assert "checkpoint no/where: ABSENT, not here, and HF_HUB_OFFLINE=1" in text
    monkeypatch.setattr("models.hub.offline", lambda: False)
    assert "the first run downloads it. Its size is unknown yet" in needs("llada", "no/where")
    broken = shutil.copytree(LLADA, tmp_path / "broken")
    for shard in broken.glob("*.safetensors"):
        shard.unlink()
    assert f"checkpoint {broken}: INCOMPLETE, " in needs("llada", str(broken))
    text = needs("llada", str(LLADA))
    size = sum(path.stat().st_size for path in LLADA.glob("*.safetensors"))
    assert f"{LLADA}: here, {size / 1000:.3g} KB; memory (estimated): weights " in text, text
    assert " in float32, plus " in text and " per sample, plus its prompt" in text
    assert (
        "size of the samples is known after the first ones" in text
        and "at most 96 forward passes" in text
    )
    assert "the hours are unknown until an experiment has run" in text
    run_here(chosen(tmp_path, extra=("--limit", "2"))[0])
    text = needs("llada", str(LLADA))
    assert "at most 64 forward passes; about " in text and "by 2 samples so far" in text
    assert "disk: samples and results take about " in text
    run_here(chosen(tmp_path)[0])
    assert needs("llada", str(LLADA)).endswith("1 experiment: 1 done; 6 of 6 samples\n")


def test_an_unknown_number_of_samples_is_not_zero(tmp_path):
    one, two = chosen(tmp_path, tps=(1, 2))
    unknown, failed = Status("waiting", None), Status("failed", 6, Sums(2, 0, 40, 64, 4.0))
    assert "0 of ? samples" in summary_line([(one, unknown)], 1)
    assert _time([(one, unknown)]).startswith("time: unknown for 1 experiment;")
    rows = [(one, unknown), (two, Status("waiting", 6))]
    assert "0 of at least 6 samples" in summary_line(rows, 1)
    assert "at most 96 forward passes, unknown for 1 experiment;" in _time(rows)
    rows = [(one, Status("waiting", 6)), (two, failed)]
    assert "at most 192 forward passes, without 1 failed;" in _time(rows)
    text = progress_table([(two, failed)], 1)
    assert text.endswith("2 of 6 samples"), "an ended suite has no time left"
    assert " 0 s" not in text and " 8 s" not in text


def test_a_plan_reckons_hours_and_disk_from_the_samples_so_far(tmp_path):
    """4 samples of 2,000 s each, and 6 of half the forward passes: 8,000 s and 6,000 s."""
    one, two = chosen(tmp_path, tps=(1, 2))
    rows = [(one, Status("partial", 2, Sums(2, 0, 40, 64, 4000.0))), (two, Status("waiting", 0))]
    rows = [(e, replace(status, of=6)) for e, status in rows]
    assert "at most 224 forward passes; about 3 h 53 m of one device, by 2 samples" in _time(rows)
    one.store.mkdir(parents=True)
    (one.store / "shard-0").write_bytes(b"x" * 30_000)
    assert "samples and results take about 150 KB more; " in _disk(rows, tmp_path / "out")


def test_a_plan_names_an_output_directory_that_cannot_be_written(tmp_path, monkeypatch):
    [one] = chosen(tmp_path)
    monkeypatch.setattr("suite.preflight.output_problem", lambda at: f"no room in {at}")
    lines = preflight([(one, Status("waiting", 6))], tmp_path / "out")
    assert f"disk: no room in {tmp_path}" in lines and not (tmp_path / "out").exists()


def test_all_answers_without_a_score_are_no_running_experiment(tmp_path):
    """`150/150 running, ETA 0 s` meant that it waits to be scored."""
    [one] = chosen(tmp_path)
    full = Sums(6, 0, 40, 64, 4.0)
    for found, word in [
        (Status("running", 6, full, note="scoring by pid 1 on here"), "scoring"),
        (Status("running", 6, full, note="generating by pid 1 on here"), "to score"),
        (Status("partial", 6, full), "to score"),
    ]:
        text = progress_table([(one, found)], 1)
        assert f"1 experiment: 1 {word}; 6 of 6 samples" in text and " 0 s" not in text


def test_watch_ends_with_the_suites(tmp_path, capsys):
    """It went on showing 48 of 48 for ever."""
    [one] = chosen(tmp_path)
    lease = Lease(tmp_path / "out", [one], workers=1)
    run_here(one)
    lease.release()
    assert main(["progress", "--watch", "--output_dir", str(tmp_path / "out")]) == 0
    assert "1 experiment: 1 done" in capsys.readouterr().out


def test_an_unknown_flag_of_a_suite_gets_a_suggestion(capsys):
    assert main(["run", "--modle", "llada"]) == 2
    assert main(["plan", "--limit", "5"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown argument '--modle'; did you mean '--models'?",
        "error: unknown argument '--limit'; it is one of eval.py: "
        '--extra "--limit ..." gives it to every experiment',
    ]
    assert main(["plan", "--dry_run", "--device"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown argument '--dry_run'; `sweep.py plan` shows what would run",
        "error: unknown argument '--device'; the engine chooses the device: "
        "CUDA_VISIBLE_DEVICES and --workers",
    ]


def test_extra_takes_a_single_flag(capsys):
    """What the line above recommends: "expected one argument"."""
    assert parse(["plan", "--extra", "--no_chat_template", "--tps", "1"]).extra == [
        "--no_chat_template"
    ]
    words = ["run", "--extra", "--limit 5", "--slurm-extra", "--exclusive"]
    args = parse(words)
    assert (args.extra, args.slurm_extra) == (["--limit 5"], "--exclusive")
    for words in (["--extra"], ["--extra", "--tps", "1"]):
        assert main(["plan", *words]) == 2
        assert capsys.readouterr().err == "error: --extra: expected one argument\n"


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "0", "1e9", "soon"])
def test_watch_takes_seconds_that_can_be_waited(seconds, capsys):
    assert main(["progress", f"--watch={seconds}"]) == 2
    assert f"error: --watch {seconds}: must be seconds, above 0" in capsys.readouterr().err


def refusing(monkeypatch, folder: Path) -> None:
    """listdir has no permission in `folder`; root's has it everywhere."""
    real = os.listdir

    def listdir(path="."):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)


def test_a_directory_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch, capsys):
    """progress showed the matrix instead of the suites in it; plan ended in a traceback."""
    [one] = chosen(tmp_path)
    (tmp_path / "out" / "logs").mkdir(parents=True)
    one.store.mkdir(parents=True)
    for folder, ask in [
        (tmp_path / "out" / "logs", lambda: main(["progress", "--output_dir", f"{tmp_path}/out"])),
        (one.store, lambda: Watcher(one).status()),
        (tmp_path / "out", lambda: report.main([str(tmp_path / "out")])),
    ]:
        with monkeypatch.context() as patch:
            refusing(patch, folder)
            try:
                assert ask() == 74
                told = capsys.readouterr().err
            except OutputError as error:
                told = f"error: {error.problems[0]}\n"
        assert told == f"error: {folder}: no permission to read it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        words = ["plan", "--models", "tiny-llada", "--tasks", "gsm8k", "--tps", "1"]
        run = subprocess.run([*SWEEP, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (74, "error: cannot write: No space left on device\n")


def test_a_failure_is_told_once_and_stands_below_the_table(tmp_path):
    found, said = chosen(tmp_path), []
    rows = [(found[0], Status("waiting", 6))]
    engine = LocalEngine(Lease(tmp_path / "out", found, 1), rows, [Worker("cpu", {})], said.append)
    found[0].log.write_text("error: no room\n")
    for _ in range(3):
        engine._answered(engine.tasks[0], 1)
    assert [text.partition(": ")[2] for text in said] == [
        "no room; tried again",
        "the same again; tried again",
        "failed",
    ]
    assert Watcher(found[0]).status().note == "no room"


def test_a_result_of_another_user_is_no_damaged_one(tmp_path, monkeypatch, capsys):
    """ "move it away" was the way out; it is another output directory."""
    [one] = chosen(tmp_path)
    run_here(one)
    for file in one.store.glob("status-*"):
        file.unlink()

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("experiment.result.file_bytes", refuse)
    found = Watcher(one).status()
    assert found.state == "failed" and "no permission to read it" in found.note
    assert cli.main([*one.argv, "--device", "cpu"]) == 74
    assert "give another --output_dir" in capsys.readouterr().err


def test_a_name_that_the_locale_cannot_print_ends_no_suite(tmp_path):
    out = str(tmp_path / "r\u00e9sultats")
    words = ["--models", "tiny-llada", "--tasks", "gsm8k", "--tps", "1", "--output_dir", out]
    environ = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    for command in ("plan", "progress"):
        run = subprocess.run([*SWEEP, command, *words], env=environ, capture_output=True)
        assert run.returncode == 0, run.stderr
    SuiteLog(Path(out))("logs: \udce9")
    assert b"logs: " in (Path(out) / "logs" / "sweep.log").read_bytes()


@pytest.mark.parametrize(
    ("n", "files", "limit_s"),
    [(48, True, 1.5), pytest.param(6, False, 4, marks=pytest.mark.slow)],
)
def test_progress_over_stores_of_1319_samples_is_quick(tmp_path, n, files, limit_s):
    """The stores are links to one shard: each is read as if it were its own."""
    out, data = tmp_path / "out", gsm8k_dir(tmp_path / "data", 1319)
    [one] = select(Selection(tasks=("gsm8k",)))[:1]
    words = [*one.argv, *flags(data), "--output_dir", str(out)]
    found = experiments([*words, "--tag", f"t{i}", "--seed", str(i)] for i in range(n))
    ids = list(range(100_000, 100_512))
    store, samples = started(tmp_path / "one")
    samples.provenance = {"device_name": "x" * 300}
    with store, samples.status:
        for i in range(1319):
            meta = {"doc_id": i, "cost_seconds": 1.5, "seconds": 12.0, "tokens_returned": 200}
            result = {"committed_at": ids, "nfe": 300, "token_ids": ids, "finish_reason": "length"}
            result |= {"forwards_saved": 0, "positions_computed": 300}
            samples.remember(f"{i:064x}", result, meta, i % 2)
    shard, record = store.shard, samples.status.record
    for experiment in found:
        experiment.store.mkdir(parents=True)
        os.link(shard, experiment.store / shard.name)
        if files:
            record.result = str(experiment.path)
            atomic_write_json(experiment.store / "status-0.json", asdict(record))
    lease = Lease(out, found, workers=4)
    lease.release()
    text = lease.path.read_text()
    for experiment in found:
        text = text.replace(f'"{experiment.id}"', f'"{"a" * 64}"')  # that of the shard
    lease.path.write_text(text)
    before = os.times()
    code = (
        "import sys; from scripts.sweep import main; main(sys.argv[1:]); "
        "assert not {'torch', 'lm_eval'} & sys.modules.keys()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "progress", "--output_dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert run.returncode == 0, run.stderr
    took = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    line = f"{n} experiments: {n} to score; {n * 1319} of {n * 1319} samples"
    assert line in run.stdout, run.stdout
    assert "50.0 [47.3, 52.7] of 1319" in run.stdout
    print(f"{n * shard.stat().st_size / 1e6:.0f} MB in {took:.2f} s of a core")
    assert took < limit_s


# ---- which suite has which experiments, what a worker does next


def test_a_claimed_experiment_is_not_taken_by_a_second_suite(tmp_path):
    one, two = chosen(tmp_path, tps=(1, 2))
    out = tmp_path / "out"
    first = Lease(out, [one], workers=1)
    living = first.path.with_name("sweep-here-1.json")  # as if of another process of this host
    first.path.rename(living)
    second = Lease(out, [one, two], workers=1)
    assert (second.mine, second.elsewhere) == ([two], [one])
    with pytest.raises(BusyError, match=f"the suite of pid {os.getpid()} on"):
        Lease(out, [one], workers=1)
    first.path = living
    first.release()
    assert [r.alive for r in read_records(out)] == [False, True]
    assert Lease(out, [one], workers=1).mine == [one] and not living.exists()
    # suites that share a run have them in common
    assert Lease(out, [one], workers=1, run="r").mine == [one]


def test_a_directory_that_another_user_wrote_to_keeps_its_records(tmp_path, monkeypatch):
    """In a directory with the sticky bit every suite of a second user ended with an error."""
    [one], out = chosen(tmp_path), tmp_path / "out"
    first = Lease(out, [one], workers=1)
    first.release()
    old = first.path.rename(first.path.with_name("sweep-here-1.json"))

    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert Lease(out, [one], workers=1).mine == [one] and old.exists()
    (out / "logs" / "sweep.log").mkdir()  # cannot be written, not even by root
    with pytest.raises(OutputError, match="sweep.log: Is a directory; give another --output_dir"):
        SuiteLog(out)("text")


def test_the_experiments_of_a_suite_that_fell_silent_on_another_node_are_free(tmp_path):
    experiment = chosen(tmp_path)
    first = Lease(tmp_path / "out", experiment, workers=1)
    there = first.path.rename(first.path.with_name("sweep-node7-1.json"))
    there.write_text(there.read_text().replace(f'"host": "{HOST}"', '"host": "node7"'))
    with pytest.raises(BusyError, match="on node7"):
        Lease(tmp_path / "out", experiment, workers=1)
    os.utime(there, (0, 0))
    assert Lease(tmp_path / "out", experiment, workers=1).mine == experiment and not there.exists()


def test_the_record_of_a_suite_is_enough_for_progress(tmp_path, capsys, monkeypatch):
    """No argument is parsed: an experiment of a plugin that is not imported is shown, too."""
    one, two = chosen(tmp_path, tps=(1, 2))
    run_here(one)
    lease = Lease(tmp_path / "out", [one, two], workers=2)
    monkeypatch.setattr("scripts.sweep.select", lambda selection: pytest.fail("parsed"))
    monkeypatch.setattr("suite.matrix.experiments", lambda sets: pytest.fail("parsed"))
    assert main(["progress", "--output_dir", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "2 experiments: 1 done, 1 queued; 6 of 12 samples; about" in text
    assert "queued: waits for a worker of its suite\n" in text
    assert "left with 2 workers" in text
    [record] = read_records(tmp_path / "out")
    planned = record.experiments[1]
    assert (planned.id, planned.store, planned.n) == (two.id, two.store.resolve(), 6)
    assert (planned.command, planned.log, planned.path) == (two.command, two.log, two.path)
    assert (planned.model, planned.forward_passes) == (f"{LLADA} in float32", 16)
    lease.release()


RULE = """
from decoding.algorithms import ALGORITHMS, FAMILIES, Algorithm, top_k
def first(view):
    return top_k(view.confidence, view.masked, view.quota)
reads = frozenset({"confidence"})
ALGORITHMS["mine"] = Algorithm(first, FAMILIES, "adaptive", blocks=True, reads=reads)
"""


@pytest.mark.slow
def test_a_plugin_reaches_workers_and_tasks_and_progress_does_not_import_it(tmp_path, capsys):
    """With the bytes that were planned: a task that finds others ends with 4."""
    (plugin := tmp_path / "rule.py").write_text(RULE)
    extra = " ".join(flags(gsm8k_dir(tmp_path / "data", 2)))
    out = str(tmp_path / "out")
    words = ["--models", "llada", "--tasks", "gsm8k", "--tps", "2", "--algs", "mine"]
    words += ["--plugin", str(plugin), "--extra", extra, "--output_dir", out]

    run = subprocess.run([*SWEEP, "run", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "ended: 1 done" in run.stdout, run.stdout + run.stderr
    [result] = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json"))
    assert result["config"]["plugins"][0]["path"] == str(plugin)
    plugin.write_text("raise SystemExit(9)")
    assert main(["progress", "--output_dir", out]) == 0
    assert "1 experiment: 1 done" in capsys.readouterr().out
    plugged = (["--extra", f"--plugin {plugin}"], ["--plugin", str(plugin)])
    for filters in (*plugged, ["--file", str(tmp_path / "my.yaml")]):
        (tmp_path / "my.yaml").write_text(f"- --model_alias llada --task gsm8k --plugin {plugin}")
        assert main(["progress", "--output_dir", out, *filters]) == 2
        assert "progress imports no --plugin" in capsys.readouterr().err
    argv = ["--model_alias", "llada", "--task", "gsm8k", "--alg", "mine", "--plugin", str(plugin)]
    plan = {"run": "r", "output_dir": out, "workers": 1, "gpus": 0, "shares": [[argv]]}
    plan["plugins"] = {str(plugin): hashlib.sha256(RULE.encode()).hexdigest()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert main(["share", "--plan", str(tmp_path / "plan.json")]) == 4
    assert "has changed since the run was planned" in capsys.readouterr().err


def test_an_id_that_becomes_known_enters_the_record(tmp_path, monkeypatch):
    """A checkpoint of the hub is downloaded by the first run of it."""
    found = chosen(tmp_path)[0]
    monkeypatch.setattr("suite.matrix.known_ids", lambda job: None)
    lease = Lease(tmp_path / "out", [replace(found, id=None, store=None)], workers=1)
    assert read_records(tmp_path / "out")[0].experiments[0].id is None
    lease.touch()
    monkeypatch.setattr("suite.matrix.known_ids", lambda job: (found.id, found.result_id))
    assert read_records(tmp_path / "out")[0].experiments[0].id is None, "touched a moment ago"
    monkeypatch.setattr("suite.lease.TOUCH_S", 0)
    lease.touch()
    [planned] = read_records(tmp_path / "out")[0].experiments
    assert (planned.id, planned.store) == (found.id, found.store.resolve())


def test_devices_follow_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [w.environ["CUDA_VISIBLE_DEVICES"] for w in make_workers(None)] == ["2", "3"]
    assert [w.device for w in make_workers(3)] == ["cuda 2", "cuda 3", "cuda 2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [w.device for w in make_workers(None)] == ["cpu"] and len(make_workers(2)) == 2


def test_a_worker_stays_with_its_model_and_no_device_idles(tmp_path):
    """Four models of three experiments on two workers: each model is loaded by one worker."""
    lease = Lease(tmp_path, [], workers=2)
    found = select(Selection(tasks=("gsm8k",)))
    engine = LocalEngine(
        lease,
        [(e, Status("waiting", 1319)) for e in found],
        [Worker("cpu", {}), Worker("cpu", {})],
        print,
    )
    order = {0: [], 1: []}
    for turn in range(12):
        worker = engine.workers[turn % 2]
        worker.task = None
        task: QueuedExperiment = engine._next(worker)
        worker.task, worker.model, task.stage = task, task.experiment.model, "score"
        order[turn % 2].append(task.experiment.job.config.model_alias)
    assert order == {0: ["llada"] * 3 + ["dream"] * 3, 1: ["llada1.5"] * 3 + ["diffucoder"] * 3}


@pytest.mark.parametrize(
    ("codes", "outcome", "attempts"),
    [
        ([1, 137, 5], "failed", 3),
        ([137, 0, 0], "done", 1),
        ([0, 1, 0, 0], "done", 1),
        ([2], "failed", 1),
        ([4], "failed", 1),
        ([75, 75, 0, 0], "done", 0),
        ([75] * 4, "elsewhere", 0),
    ],
)
def test_what_an_exit_code_leads_to(tmp_path, codes, outcome, attempts):
    """A crash is tried twice more, a bad configuration never, a busy store later.

    A scoring that fails generates again.
    """
    found = chosen(tmp_path)
    engine = LocalEngine(
        Lease(tmp_path / "out", found, workers=1),
        [(found[0], Status("waiting", 6))],
        [Worker("cpu", {})],
        print,
    )
    [task] = engine.tasks
    for code in codes:
        assert task.stage != "ended"
        engine._answered(task, code)
    assert (task.stage, task.outcome, task.attempts) == ("ended", outcome, attempts)


def quick(engine: LocalEngine) -> LocalEngine:
    """The engine with a clock in which every wait is over."""
    for task in engine.tasks:
        task.not_before = 0.0
    return engine


def test_a_busy_experiment_is_left_only_once_all_else_is_over(tmp_path):
    """While there is other work its holder may die; after that the waits are bounded."""
    one, two = chosen(tmp_path, tps=(1, 2))
    rows = [(e, Status("waiting", 6)) for e in (one, two)]
    worker = Worker("cpu", {})
    engine = LocalEngine(Lease(tmp_path / "out", [one, two], 1), rows, [worker], print)
    first, second = engine.tasks
    worker.task = second
    for _ in range(6):
        engine._answered(first, 75)
        assert first.stage == "generate" and 0 < first.not_before - time.monotonic() <= 60
    engine._end(second, "done")
    worker.task = None
    assert quick(engine)._next(worker) is first
    engine._answered(first, 75)
    assert (first.stage, first.outcome) == ("ended", "elsewhere")


def test_shares_keep_models_together_and_costs_alike():
    """The longest model first; more tasks than models divide the longest."""

    def models(n: int) -> list[set[str]]:
        divided = shares(found, n)
        assert sorted(e.name for share in divided for e in share) == sorted(e.name for e in found)
        return [{e.job.config.model_alias for e in share} for share in divided]

    found = select(Selection(models=("dream", "llada"), tps=(1, 2)))
    assert models(1) == [{"llada", "dream"}]
    assert models(2) == [{"llada"}, {"dream"}]
    assert models(3) == [{"dream"}, {"llada"}, {"llada"}]
    assert [len(share) for share in shares(found, 16)] == [1] * 16
    costs = [sum(e.cost for e in share) for share in shares(found, 4)]
    assert max(costs) < 1.1 * min(costs)
    found = select(Selection(tasks=("truthfulqa", "gsm8k"), tps=(1,)))
    assert models(3) == [{"llada"}, {"llada1.5"}, {"dream", "diffucoder"}]


def test_suites_that_share_a_run_begin_with_their_share_and_walk_the_others(tmp_path):
    """What is done or has failed in the run is skipped; what failed in another run is not."""
    found = chosen(tmp_path, models=("llada", "dream"), tps=(1, 2))
    rows = [(e, Status("waiting", 6)) for e in found]
    lease, worker = Lease(tmp_path / "out", found, 1, run="r"), Worker("cpu", {})
    own = {found[3].name}
    engine = LocalEngine(lease, rows, [worker], print, own=own)
    assert engine._next(worker).experiment == found[3]
    worker.model = found[3].model
    engine._end(engine.tasks[3], "done")
    assert engine._next(worker).experiment == found[2], "of the model that is loaded"
    found[2].log.parent.mkdir(exist_ok=True)
    write_failure(found[2], "no memory", "r")
    write_failure(found[0], "no memory", "another run")
    assert engine._next(worker).experiment == found[0]
    run_here(found[0])
    assert engine._next(worker).experiment == found[1]
    assert [t.outcome for t in engine.tasks] == ["skipped", "stopped", "skipped", "done"]
    assert not engine.last
    engine._end(engine.tasks[1], "failed", "no memory")
    assert engine.last
    other = LocalEngine(lease, rows, [worker], print)
    other._end(other.tasks[3], "done")
    assert other.last, "it had the last one"
    found[0].path.unlink()
    other._end(other.tasks[3], "done")
    assert not other.last, "one is open"


@pytest.mark.slow
def test_a_worker_holds_one_model_at_a_time(tmp_path, monkeypatch):
    """A harness is in a reference cycle: without a collection two models of 16 GB would be held."""
    found = chosen(tmp_path, models=("llada", "dream"), tps=(2, 4), extra=("--limit", "1"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    kept, held, loads = KeptModel(), [], []
    for experiment in found:
        order = {
            "argv": [*experiment.argv, "--device", "cpu"],
            "log": str(tmp_path / "log"),
            "score": False,
            "title": "",
        }
        assert obey(order, kept) == 0
        held.append(weakref.ref(kept._kept[False][1]))
        loads.append(kept.loads)
        assert Watcher(experiment).status().state == "partial"  # generated, not scored
    assert loads == [1, 1, 2, 2]
    assert [ref() is None for ref in held] == [True, True, False, False]


def test_a_verifier_is_kept_beside_its_model(tmp_path):
    """Another experiment's verifier must not make the model load again, nor the other way round."""
    kept, verifier = KeptModel(), verifier_checkpoint(tmp_path / "verifier")
    first = kept.load(str(DREAM), "cpu", "float32"), kept.load(str(verifier), "cpu", "float32")
    assert (
        kept.load(str(DREAM), "cpu", "float32"),
        kept.load(str(verifier), "cpu", "float32"),
    ) == first
    assert kept.loads == 2 and first[1].config.causal


def test_a_scorer_never_loads_a_model(tmp_path, monkeypatch, capsys):
    [experiment] = chosen(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    order = {
        "argv": [*experiment.argv, "--device", "cpu"],
        "log": str(tmp_path / "log"),
        "score": True,
        "title": "",
    }
    assert obey(order, KeptModel()) == 1
    assert "they are generated again" in capsys.readouterr().err


def test_the_device_memory_of_a_run_is_in_the_result_of_the_process_that_scores_it(
    tmp_path, monkeypatch
):
    [experiment] = chosen(tmp_path)
    run_here(experiment)
    experiment.job.path.unlink()
    recall = SampleCache.recall

    def with_peak(self, key):
        kept = recall(self, key)
        return kept | {"meta": kept["meta"] | {"peak_bytes": 123}}

    monkeypatch.setattr(SampleCache, "recall", with_peak)
    assert run_here(experiment)["profile"]["peak_memory_bytes"]["device"] == 123


# ---- whole runs


@pytest.mark.slow
def test_a_sweep_of_two_workers_one_failure_and_a_second_start(tmp_path, capfd):
    """One model is missing: its experiments fail at once, the others are done.

    No worker loads a model twice.
    """
    good = chosen(tmp_path, n=2, models=("llada", "dream"), tps=(2, 4))
    [bad] = chosen(
        tmp_path,
        models=("diffucoder",),
        tps=(2,),
        extra=("--diffucoder_ckpt", str(tmp_path / "absent")),
    )
    lease = Lease(tmp_path / "out", [*good, bad], workers=2)
    rows = [(e, Watcher(e).status()) for e in lease.mine]
    workers = [
        Worker("cpu", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}) for _ in range(2)
    ]
    tasks = LocalEngine(lease, rows, workers, print).run()
    lease.release()
    assert [t.outcome for t in tasks] == ["done"] * 4 + ["failed"]
    assert "absent does not exist" in tasks[-1].error and tasks[-1].attempts == 1
    assert Watcher(bad).status().state == "failed"
    # two models; an idle worker may take the other's
    assert all(w.loads <= 2 and w.process is None for w in workers)
    assert [Watcher(e).status().state for e in good] == ["done"] * 4
    result = json.loads(good[0].job.path.read_text())
    assert (
        result["meta"]["environment"]["command"][0] == "eval.py"
        and "scoring on cpu" in good[0].log.read_text()
    )
    stamps = {e.name: e.job.path.stat().st_mtime_ns for e in good}
    extra = " ".join(flags(tmp_path / "data"))
    words = [
        "--models",
        "llada",
        "dream",
        "--tasks",
        "gsm8k",
        "--tps",
        "2",
        "4",
        "--extra",
        extra,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    capfd.readouterr()
    assert main(["run", *words]) == 0
    assert "ended: 4 done" in capfd.readouterr().out
    assert {e.name: e.job.path.stat().st_mtime_ns for e in good} == stamps
    assert main(["plan", *words]) == 0
    assert capfd.readouterr().out.startswith("done ")


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def kept(experiment: Experiment) -> int:
    """Lines of its store that are samples."""
    shards = experiment.store.glob("shard-*")
    return sum(len(path.read_bytes().splitlines()) - 1 for path in shards)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_killed_workers_killed_suites_and_second_starts_lose_and_repeat_nothing(tmp_path):
    [experiment] = chosen(
        tmp_path, n=60, extra=("--gen_length", "96", "--batch_size", "2"), tps=(1,)
    )
    argv = [
        "--models",
        "llada",
        "--tasks",
        "gsm8k",
        "--tps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--extra",
        " ".join([*flags(tmp_path / "data"), "--gen_length 96 --batch_size 2"]),
    ]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    watcher = Watcher(experiment)

    def start() -> subprocess.Popen:
        quiet = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "stdin": subprocess.DEVNULL,
            "text": True,
        }
        return subprocess.Popen([*SWEEP, "run", *argv], env=environ, cwd=ROOT, **quiet)

    def more_samples(suite: subprocess.Popen) -> None:
        before = kept(experiment)
        wait_for(lambda: suite.poll() is not None or kept(experiment) > before + 1)
        assert suite.poll() is None, suite.communicate()[0]

    suite = start()
    more_samples(suite)
    second = start()  # while the first runs
    assert second.wait(120) == 75 and "already" in second.communicate()[0]
    assert watcher.status().state == "running"
    os.kill(children(suite.pid)[0], signal.SIGKILL)  # its worker
    more_samples(suite)
    [worker] = children(suite.pid)
    suite.kill()  # the suite itself; its worker must not keep the device
    suite.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 20)
    assert watcher.status().state == "partial"
    suite = start()
    more_samples(suite)
    suite.send_signal(signal.SIGINT)
    assert suite.wait(120) == 130
    text = suite.communicate()[0]
    assert "Traceback" not in text, text
    assert "| running |" not in text and "| begun |" in text, "the table of what is kept"
    log = (tmp_path / "out" / "logs" / "sweep.log").read_text()
    assert "stopped: 1 begun; the same command resumes\n" in log
    assert "a report of" not in log, "nothing is done"
    assert log[-300:] in text, "and on the terminal"
    assert watcher.status().state == "partial"
    suite = start()
    text = suite.communicate(timeout=600)[0]
    assert suite.returncode == 0 and "ended: 1 done" in text
    assert kept(experiment) == 60
    assert "ended by signal 9; tried again" in (tmp_path / "out" / "logs" / "sweep.log").read_text()
    assert "Traceback" not in experiment.log.read_text()


@pytest.mark.slow
def test_the_share_of_a_task_that_was_killed_for_good_is_completed_by_another(
    tmp_path, monkeypatch, capfd
):
    """Task 0 of an array dies in the middle of its first experiment, and nobody requeues it."""
    big = ("--gen_length", "96", "--batch_size", "2")
    llada = chosen(tmp_path, n=8, extra=big, tps=(2, 8))
    dream = chosen(tmp_path, models=("dream",), extra=("--limit", "1"), tps=(2, 4))
    plan = tmp_path / "plan.json"
    parts = [[list(e.argv) for e in part] for part in (llada, dream)]
    fields = {
        "run": "r",
        "output_dir": str(tmp_path / "out"),
        "workers": 1,
        "gpus": 0,
        "plugins": {},
    }
    plan.write_text(json.dumps(fields | {"shares": parts}))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")

    def share(task: str) -> str:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        capfd.readouterr()
        assert main(["share", "--plan", str(plan)]) == 0
        return capfd.readouterr().out

    first = subprocess.Popen(
        [*SWEEP, "share", "--plan", str(plan)],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"},
        cwd=ROOT,
    )
    wait_for(lambda: first.poll() is not None or kept(llada[0]))
    first.kill()
    assert first.wait() == -signal.SIGKILL and kept(llada[0]) < 8
    text = share("1")
    assert [Watcher(e).status().state for e in [*llada, *dream]] == ["done"] * 4
    assert [kept(e) for e in llada] == [8] * 2
    begun = [line.split()[3] for line in text.splitlines() if "generating on cpu" in line]
    assert begun[:2] == [f"{dream[0].name}:", f"{dream[1].name}:"], "its own share first"
    assert text.count("[7_1] report:") == 1
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    text = share("0")  # were it requeued in the end
    assert "[7_0]" in text and "generating" not in text and "[7_0] report:" not in text


@pytest.mark.parametrize("terminal, shown", [(True, "6/20"), (False, "")])
def test_a_terminal_gets_a_bar_over_all_samples(monkeypatch, terminal, shown):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("suite.run.Watcher", lambda experiment: experiment)
    monkeypatch.setattr(
        "suite.run.statuses",
        lambda watchers: [(w, Status("partial", 10, Sums(3))) for w in watchers],
    )
    Bar(["one", "two"]).close()
    assert shown in stream.getvalue() and bool(stream.getvalue()) == terminal
