"""The suite: which experiments there are, where each stands, and that running them loses, repeats and hides nothing."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from causal import verifier_checkpoint
from mini import DREAM, LLADA, ROOT, gsm8k_dir

import eval as cli
from experiment.briefs import brief_path
from experiment.identity import known_id
from experiment.sample_cache import SampleCache
from experiment.store import Store
from scripts.sweep import main
from suite.lease import Lease, read_claims
from suite.local import LocalEngine, Task, Worker, make_workers
from suite.matrix import Selection, arguments, experiments, select
from suite.run import Bar
from suite.state import HOST, Status, Watcher, read_summary, write_note
from suite.table import Estimator, duration, progress_table
from suite.tally import Sums, Tally
from suite.worker import KeptModel, import_everything, obey
from utils import BusyError, UsageError

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
    told = {"models": ("llada",), "tasks": ("gsm8k",), "tps": (2,)} | selection
    return select(Selection(**told, extra=flags(data, *more), output_dir=str(tmp_path / "out")))


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
        "- {model_alias: [llada, dream], task: humaneval, tokens_per_step: [2, 4], no_early_exit: true, tag: null}\n"
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
    ("text", "told"),
    [
        ("a: b: c", "is not YAML"),
        ("model_alias: llada", "expected a list"),
        ("- 3", "3 is no argument set"),
        ("- --model_alias llada --task gsm9k", "--task 'gsm9k' is not known"),
        (
            "- --model_alias llada --task gsm8k --seed 1\n- --model_alias llada --task gsm8k",
            "two experiments would write",
        ),
    ],
)
def test_a_file_that_cannot_be_is_named(tmp_path, text, told):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        select(Selection(file=tmp_path / "my.yaml"))


def test_wrong_options_are_said_at_once(capsys, tmp_path):
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


def test_true_is_a_switch_and_false_leaves_it_out():
    assert arguments({"task": "mbpp", "no_early_exit": True, "debug": False}) == [
        ["--task", "mbpp", "--no_early_exit"]
    ]


def test_without_tmux_the_way_out_is_named(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    told = subprocess.run(
        ["bash", ROOT / "scripts" / "exp.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 3 and "--no_tmux" in told.stderr and "not installed" in told.stderr


# ---- where an experiment stands


def test_a_tally_is_what_the_store_says(tmp_path):
    with Store.open(tmp_path, {}, "a" * 64) as store:
        for i in range(5):
            meta = {
                "cost_seconds": 0.5,
                "doc_id": i,
                "seconds": 1.0,
                "tokens_returned": 10 + i,
                "provenance": {"cpu": '"nfe":'},
            }
            result = {"committed_at": [1, 2], "nfe": 7, "token_ids": [3]}
            store.put(f"{i:064x}", {"status": "ok", "result": result, "meta": meta})
        store.put("f" * 64, {"status": "error", "result": {}, "meta": {"error": "x"}})
        store.put(f"{0:064x}", {"status": "error", "result": {}, "meta": {}})
        tally = Tally(store.directory)
        tally.update()
        assert tally.sums() == Sums(5, 60, 35, 2.5, failed=1)
        assert tally.sums(limit=2) == Sums(2, 21, 14, 1.0, failed=1)
        [shard] = store.directory.glob("shard-*")
        with open(shard, "ab") as file:  # torn, damaged, and nothing of it counted
            file.write(b"xx\n00000000 {not json\n1234")
        tally.update()
        assert tally.sums().n == 5
        shard.rename(shard.with_name("elsewhere"))
        tally.update()
        assert tally.sums() == Sums()


def briefed(folder: Path, n: int) -> tuple[Store, Path]:
    """A store of n samples and one failure, written through the ledger, which is left open; its one shard."""
    store = Store.open(folder, {}, "a" * 64)
    ledger = SampleCache("a" * 64, store)
    for i in range(n):
        meta = {"cost_seconds": 0.5, "doc_id": i, "seconds": 1.0, "tokens_returned": 10 + i}
        ledger.remember(
            f"{i:064x}", {"committed_at": [1, 2], "nfe": 7, "token_ids": [3]}, meta, i % 2
        )
        if i == 2:
            ledger.failed("f" * 64, "x")
    return store, store.shard


def sums_of(directory: Path) -> Sums:
    tally = Tally(directory)
    tally.update()
    return tally.sums()


def test_the_lines_beside_a_shard_say_what_the_shard_says(tmp_path):
    """Whole, torn, damaged, of another shard, behind it, or gone: the numbers stay; scores stand in them only."""
    store, shard = briefed(tmp_path, 6)
    with store:
        brief = brief_path(shard)
        lines, plain = brief.read_bytes(), Sums(6, 75, 42, 3.0, failed=1)
        assert sums_of(store.directory) == replace(plain, scores=(0, 1, 0, 1, 0, 1))
        for text, scored in [
            (lines[:-3], 5),
            (lines.replace(b"[", b"[x", 4).replace(b"[x", b"[", 3), 3),
            (b"[999999999,1]\n" + lines, 0),
            (lines.replace(b",2,12,", b",null,12,"), 2),
            (b"", 0),
            (b"\n\n", 0),
            (b"{}\n", 0),
            (b"[]\n", 0),
        ]:
            brief.write_bytes(text)
            found = sums_of(store.directory)
            assert replace(found, scores=()) == plain and len(found.scores) == scored, text
        brief.write_bytes(
            lines[: lines.index(b"\n") + 1]
        )  # as if the process had been killed between the two writes
        tally = Tally(store.directory)
        tally.update()
        brief.write_bytes(lines)
        tally.update()
        assert tally.sums() == replace(plain, scores=(0, 1, 0, 1, 0, 1))
        brief.unlink()
        assert sums_of(store.directory) == plain


def test_lines_beside_a_shard_cannot_end_a_run(tmp_path):
    """A disk that is full for them, say: what follows would have a gap, so nothing follows."""
    store, shard = briefed(tmp_path, 2)
    with store:
        ledger = SampleCache("a" * 64, store)
        brief_path(shard).unlink()
        brief_path(shard).mkdir()
        meta = {"cost_seconds": 0.5, "doc_id": 7, "seconds": 1.0, "tokens_returned": 1}
        ledger.remember("7" * 64, {"nfe": 1}, meta)
        brief_path(shard).rmdir()
        ledger.remember("8" * 64, {"nfe": 1}, meta)
        assert not brief_path(shard).exists() and sums_of(store.directory).n == 4


def test_states_from_the_first_sample_to_the_result(tmp_path):
    """Waiting, partial, running while another process has the store, failed as the suite noted it, done."""
    [experiment] = chosen(tmp_path)
    [limited] = chosen(tmp_path, extra=("--limit", "2"))
    watcher = Watcher(experiment)
    assert watcher.standing() == Status("waiting", 0, 6)
    result = run_here(limited)
    assert watcher.id == result["id"] and Watcher(limited).standing().state == "done"
    standing = watcher.standing()
    assert standing.score == (
        result["headline"]["value"],
        *result["headline"]["ci95"],
        2,
    )  # of what is there
    assert (standing.state, standing.n, standing.of) == (
        "partial",
        2,
        6,
    ) and standing.sums.forwards == 32
    config = json.loads(next((tmp_path / "out" / "cache").glob("*/config.json")).read_text())
    identity = {k: v for k, v in config.items() if k not in ("config_id", "store_version")}
    with Store.open(tmp_path / "out" / "cache", identity, watcher.id):
        assert (
            watcher.standing().state == "running"
            and f"pid {os.getpid()}" in watcher.standing().note
        )
    experiment.log.parent.mkdir()
    write_note(experiment, "failed", 3, "no memory")
    assert (watcher.standing().state, watcher.standing().note) == ("failed", "no memory")
    run_here(experiment)
    standing = watcher.standing()
    assert (standing.state, standing.n, standing.score[0], standing.score[3]) == ("done", 6, 0.0, 6)
    assert standing.sums.seconds > 0 and standing.sums.tokens > 0


def test_a_holder_that_was_killed_is_not_running(tmp_path):
    [experiment] = chosen(tmp_path)
    folder = tmp_path / "out" / "cache" / known_id(experiment.job, experiment.spec)[:16]
    folder.mkdir(parents=True)
    (folder / "LOCK").write_text(
        f"pid 1 on {os.uname().nodename} since 2026-01-01T00:00:00+0000 (process start 99)"
    )
    assert Watcher(experiment).standing().state == "waiting"
    (folder / "LOCK").write_text("pid 1 on node7 since 2026-01-01T00:00:00+0000 (process start 99)")
    assert (
        Watcher(experiment).standing().note == "pid 1 on node7"
    )  # another node: its file is fresh
    os.utime(folder / "LOCK", (0, 0))
    assert Watcher(experiment).standing().state == "waiting"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "not json", '{\n "status": 3\n}\n', '{\n "status": "complete",\n "samples": [\n'],
)
def test_a_foreign_file_in_place_of_a_result_is_named(tmp_path, text):
    [experiment] = chosen(tmp_path)
    experiment.job.path.parent.mkdir()
    experiment.job.path.write_text(text)
    standing = Watcher(experiment).standing()
    assert standing.state == "failed" and str(experiment.job.path) in standing.note


def test_a_result_of_another_configuration_is_no_result_of_this_one(tmp_path):
    [experiment] = chosen(tmp_path)
    [other] = chosen(tmp_path, extra=("--seed", "1"))
    run_here(other)
    standing = Watcher(experiment).standing()
    assert standing.state == "failed" and "of another configuration" in standing.note


def test_the_summary_of_a_result_is_the_result_without_its_samples(tmp_path):
    [experiment] = chosen(tmp_path)
    whole = run_here(experiment)
    summary = read_summary(experiment.job.path)
    profile = whole.pop("profile")
    assert profile.pop("sample_seconds") and summary.pop("profile") == profile
    assert summary == {
        k: v for k, v in whole.items() if k not in ("samples", "content_sha256", "meta")
    }


def test_time_left_goes_by_the_nearest_relative(tmp_path):
    one, two, other = chosen(tmp_path, tps=(1, 2)) + chosen(tmp_path, models=("dream",), tps=(1,))
    fresh, begun = Status("waiting", 0, 6), Status("partial", 2, 6, Sums(2, 40, 64, 4.0))
    assert Estimator([(one, fresh)]).left_s(one, fresh) is None
    estimator = Estimator([(one, begun), (two, fresh), (other, fresh)])
    assert estimator.left_s(one, begun) == 8.0
    assert estimator.left_s(two, fresh) == pytest.approx(6.0)  # half the forward passes
    assert estimator.left_s(other, fresh) == pytest.approx(
        12.0 * 31 / 32
    )  # 31 of its 32 steps commit something
    text = progress_table([(one, begun), (two, fresh)], workers=2)
    assert (
        "2 experiments: 1 partial, 1 waiting; 2 of 12 samples; about 7 s left with 2 workers"
        in text
    )
    assert [duration(s) for s in (None, 40, 600, 7500, 200000)] == [
        "-",
        "40 s",
        "10 m",
        "2 h 5 m",
        "2 d 7 h",
    ]


@pytest.mark.parametrize(("briefs", "limit_s"), [(True, 2), (False, 4)])
def test_progress_over_48_stores_of_1319_samples_is_quick(tmp_path, briefs, limit_s):
    """The stores are links to one shard: each is read as if it were its own."""
    out = tmp_path / "out"
    sets = [
        [*e.argv, *flags(gsm8k_dir(tmp_path / "data", 1319)), "--output_dir", str(out)]
        for e in select(Selection(tasks=("gsm8k",)))[:1]
    ]
    found = experiments([*sets[0], "--tag", f"t{i}", "--seed", str(i)] for i in range(48))
    ids = list(range(100_000, 100_512))
    meta = {"cost_seconds": 1.5, "seconds": 12.0, "tokens_returned": 200}
    with Store.open(tmp_path / "one", {}, "a" * 64) as store:
        ledger = SampleCache("a" * 64, store, provenance={"device_name": "x" * 300})
        for i in range(1319):
            ledger.remember(
                f"{i:064x}",
                {"committed_at": ids, "nfe": 300, "token_ids": ids},
                meta | {"doc_id": i},
                i % 2,
            )
        shard = store.shard
    for experiment in found:
        folder = out / "cache" / known_id(experiment.job, experiment.spec)[:16]
        folder.mkdir(parents=True)
        os.link(shard, folder / shard.name)
        if briefs:
            os.link(brief_path(shard), folder / brief_path(shard).name)
    Lease(out, found, workers=4).release()
    before = os.times()
    code = "import sys; from scripts.sweep import main; main(sys.argv[1:]); assert not {'torch', 'lm_eval'} & sys.modules.keys()"
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
    assert "48 experiments: 48 partial; 63312 of 63312 samples" in run.stdout, run.stderr
    assert ("0.500 [0.473, 0.527] of 1319" in run.stdout) is briefs
    print(f"{48 * shard.stat().st_size / 1e6:.0f} MB in {took:.2f} s of a core")
    assert took < limit_s


# ---- who has which experiments, who does what


def test_a_claimed_experiment_is_not_taken_by_a_second_suite(tmp_path):
    one, two = chosen(tmp_path, tps=(1, 2))
    out = tmp_path / "out"
    first = Lease(out, [one], workers=1)
    living = first.path.with_name("sweep-here-1.json")  # as if of another process of this host
    first.path.rename(living)
    second = Lease(out, [one, two], workers=1)
    assert (second.mine, second.elsewhere) == ([two], [one])
    with pytest.raises(BusyError, match=f"with the suite of pid {os.getpid()}"):
        Lease(out, [one], workers=1)
    first.path = living
    first.release()
    assert [c["alive"] for c in read_claims(out)] == [False, True]
    assert Lease(out, [one], workers=1).mine == [one] and not living.exists()


def test_the_experiments_of_a_suite_that_fell_silent_on_another_node_are_free(
    tmp_path, monkeypatch, capsys
):
    """A job that is killed and requeued starts on another node at once; what its first life claimed is its own."""
    experiment = chosen(tmp_path)
    first = Lease(tmp_path / "out", experiment, workers=1)
    first.path.rename(first.path.with_name("sweep-node7-1.json"))
    there = first.path.with_name("sweep-node7-1.json")
    there.write_text(there.read_text().replace(f'"host": "{HOST}"', '"host": "node7"'))
    monkeypatch.setattr("suite.lease.FRESH_S", 1.5)
    assert Lease(tmp_path / "out", experiment, workers=1).mine == experiment and not there.exists()
    assert "whether the suite on node7 lives" in capsys.readouterr().err


def test_suites_that_share_a_run_take_one_experiment_after_the_other(tmp_path):
    """An idle worker takes more of its model, else of one that nobody is at; what has failed in the run stays so."""
    found = chosen(tmp_path, models=("llada", "dream"), tps=(1, 2))
    out, worker = tmp_path / "out", Worker("cpu", {})
    one = Lease(out, found, workers=1, run="r")
    one.path = one.path.rename(
        one.path.with_name("sweep-here-1.json")
    )  # as if of another process of this host
    assert one.mine == one.elsewhere == []
    engine = LocalEngine(one, [], [worker], print)
    worker.task = engine._next(worker)
    assert worker.task.experiment == found[0]
    two = Lease(out, found, workers=1, run="r")
    other = Worker("cpu", {})
    second = LocalEngine(two, [], [other], print)
    other.task = second._next(other)
    assert other.task.experiment == found[2]
    worker.model, worker.task.stage, worker.task = (
        found[0].model,
        "score",
        None,
    )  # the scorer has it
    assert engine._next(worker).experiment == found[1]
    second._end(other.task, "failed", "no memory")
    write_note(found[3], "failed", 3, "no memory", one.told)
    other.task = None
    assert second._next(other) is None and second.claim.more(lambda free, at_it: free[0]) is None
    assert not two.release() and one.release()
    assert [c["mine"] for c in read_claims(out)] == [
        [str(e.job.path) for e in some] for some in (found[:2], found[2:3])
    ]
    again = Lease(out, found, workers=1, run="r")
    assert again.more(lambda free, at_it: free[-1]) == found[1]  # not finished, and free again
    again.release()
    assert Lease(out, found, workers=1, run="s").more(lambda free, at_it: free[-1]) == found[3]
    with pytest.raises(BusyError, match="already"):
        Lease(out, [found[3]], workers=1)


def test_devices_as_they_are_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [w.environ["CUDA_VISIBLE_DEVICES"] for w in make_workers(None)] == ["2", "3"]
    assert [w.device for w in make_workers(3)] == ["cuda 2", "cuda 3", "cuda 2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [w.device for w in make_workers(None)] == ["cpu"] and len(make_workers(2)) == 2


def test_a_worker_stays_with_its_model_and_no_device_idles(tmp_path):
    """Four models of three experiments on two workers: each model is loaded by one worker, until only one is left."""
    claim = Lease(tmp_path, [], workers=2)
    found = select(Selection(tasks=("gsm8k",)))
    engine = LocalEngine(
        claim,
        [(e, Status("waiting", 0, 1319)) for e in found],
        [Worker("cpu", {}), Worker("cpu", {})],
        print,
    )
    order = {0: [], 1: []}
    for turn in range(12):
        worker = engine.workers[turn % 2]
        worker.task = None
        task: Task = engine._next(worker)
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
    """A crash is tried twice more, a bad configuration never, a busy store later; a failed scoring generates again."""
    found = chosen(tmp_path)
    engine = LocalEngine(
        Lease(tmp_path / "out", found, workers=1),
        [(found[0], Status("waiting", 0, 6))],
        [Worker("cpu", {})],
        print,
    )
    [task] = engine.tasks
    for code in codes:
        assert task.stage != "ended"
        engine._answered(task, code)
    assert (task.stage, task.outcome, task.attempts) == ("ended", outcome, attempts)


def test_a_worker_holds_one_model_at_a_time(tmp_path, monkeypatch):
    """A harness is in a reference cycle, and the next run freezes what is there: two models of 16 GB would be held."""
    found = chosen(tmp_path, models=("llada", "dream"), tps=(2, 4), extra=("--limit", "1"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    import_everything()
    kept, held, loads = KeptModel(), [], []
    for experiment in found:
        order = {
            "argv": [*experiment.argv, "--device", "cpu"],
            "log": str(tmp_path / "log"),
            "score": False,
            "what": "",
        }
        assert obey(order, kept) == 0
        held.append(weakref.ref(kept._kept[False][1]))
        loads.append(kept.loads)
        assert Watcher(experiment).standing().state == "partial"  # generated, not scored
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
        "what": "",
    }
    assert obey(order, KeptModel()) == 1
    assert "they are generated again" in capsys.readouterr().err


def test_the_device_memory_of_a_run_is_told_by_the_process_that_scores_it(tmp_path, monkeypatch):
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
    """One model is not there: its experiments fail at once, the others are done, no worker loads a model twice."""
    good = chosen(tmp_path, models=("llada", "dream"), tps=(2, 4))
    [bad] = chosen(
        tmp_path,
        models=("diffucoder",),
        tps=(2,),
        extra=("--diffucoder_ckpt", str(tmp_path / "absent")),
    )
    claim = Lease(tmp_path / "out", [*good, bad], workers=2)
    rows = [(e, Watcher(e).standing()) for e in claim.mine]
    workers = [
        Worker("cpu", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}) for _ in range(2)
    ]
    tasks = LocalEngine(claim, rows, workers, print).run()
    claim.release()
    assert [t.outcome for t in tasks] == ["done"] * 4 + ["failed"]
    assert "absent does not exist" in tasks[-1].error and tasks[-1].attempts == 1
    assert Watcher(bad).standing().state == "failed"
    assert all(
        w.loads <= 2 and w.process is None for w in workers
    )  # two models; an idle worker may take the other's
    assert [Watcher(e).standing().state for e in good] == ["done"] * 4
    result = json.loads(good[0].job.path.read_text())
    assert (
        result["meta"]["environment"]["command"][0] == "eval.py"
        and "scoring on cpu" in good[0].log.read_text()
    )
    stamps = {e.name: e.job.path.stat().st_mtime_ns for e in good}
    extra = " ".join(flags(tmp_path / "data"))
    told = [
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
    assert main(["run", *told]) == 0
    assert "ended: 4 done" in capfd.readouterr().out
    assert {e.name: e.job.path.stat().st_mtime_ns for e in good} == stamps
    assert main(["plan", *told]) == 0
    assert capfd.readouterr().out.startswith("done ")


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_killed_workers_killed_suites_and_second_starts_lose_and_repeat_nothing(tmp_path):
    [experiment] = chosen(
        tmp_path, n=60, extra=("--gen_length", "96", "--block_length", "32"), tps=(1,)
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
        " ".join([*flags(tmp_path / "data"), "--gen_length 96 --block_length 32"]),
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
        before = watcher.standing().n
        wait_for(lambda: suite.poll() is not None or watcher.standing().n > before + 1)
        assert suite.poll() is None, suite.communicate()[0]

    suite = start()
    more_samples(suite)
    second = start()  # while the first runs
    assert second.wait(120) == 75 and "already" in second.communicate()[0]
    assert watcher.standing().state == "running"
    os.kill(children(suite.pid)[0], signal.SIGKILL)  # its worker
    more_samples(suite)
    [worker] = children(suite.pid)
    suite.kill()  # the suite itself; its worker must not keep the device
    suite.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 20)
    assert watcher.standing().state == "partial"
    suite = start()
    more_samples(suite)
    suite.send_signal(signal.SIGINT)
    assert suite.wait(120) == 130
    assert (
        "Traceback" not in (text := suite.communicate()[0]) and "the same command goes on" in text
    )
    assert (tmp_path / "out" / "logs" / "sweep.log").read_text().endswith(" stopped\n")
    assert watcher.standing().state == "partial"
    suite = start()
    text = suite.communicate(timeout=600)[0]
    assert suite.returncode == 0 and "ended: 1 done" in text
    assert (
        sum(len(p.read_bytes().splitlines()) - 1 for p in watcher.directory.glob("shard-*")) == 60
    )
    assert "ended by signal 9; tried again" in (tmp_path / "out" / "logs" / "sweep.log").read_text()
    assert "Traceback" not in experiment.log.read_text()


@pytest.mark.parametrize("terminal, shown", [(True, "6/20"), (False, "")])
def test_a_terminal_gets_a_bar_over_all_samples(monkeypatch, terminal, shown):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("suite.run.Watcher", lambda experiment: experiment)
    monkeypatch.setattr(
        "suite.run.statuses", lambda watchers: [(w, Status("partial", 3, 10)) for w in watchers]
    )
    Bar(["one", "two"]).close()
    assert shown in stream.getvalue() and bool(stream.getvalue()) == terminal
