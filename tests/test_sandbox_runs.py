"""Many programs at once: plain exec's verdicts, no spurious failure, nothing left by a kill -9.

Sizes are small by default. DLLMEXP_PARITY: how many changed solutions are compared (60; 1200 is the
full size). DLLMEXP_SOAK: how many good programs must pass (800; 20000 is the full size).
"""

import gzip
import json
import os
import random
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mini import ROOT

import eval as command
import sandbox
from experiment.code_scores import code_lines
from sandbox import Program, SandboxError, judge, judge_many, process, scratch, tiers
from sandbox.scratch import RUN
from tasks import code, humaneval, load_data, mbpp
from tasks.code import Judging
from utils import Extracted

PARITY = int(os.environ.get("DLLMEXP_PARITY") or 60)
SOAK = int(os.environ.get("DLLMEXP_SOAK") or 800)
GOOD, TESTS = "def f(x):\n    return x + 1\n", "assert f(1) == 2\nassert f(-1) == 0"
CPU_S, BYTES = 2, 4 << 30  # MBPP's slowest reference takes 1.6 s
SWAPS = {
    "+": "-",
    "-": "+",
    "*": "+",
    "<": "<=",
    ">": ">=",
    "==": "!=",
    " and ": " or ",
    "True": "False",
    "0": "1",
    "1": "2",
}


# ---------------------------------------------------------------- the standard executor

STANDARD = """
import os, resource, sys
program, word = sys.stdin.buffer.read().decode(), sys.argv[1]
cpu_s, size = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
write, leave, out = os.write, os._exit, os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDWR), 0), os.dup2(0, 1), os.dup2(0, 2)
exec(program, {})
write(out, word.encode())
leave(0)
"""


def standard(program: tuple[str, str]) -> str:
    """The verdict of plain exec in a process of its own: "passed", "failed" or "time"."""
    source = f"{program[0].rstrip()}\n\n{program[1]}\n".encode("utf-8", "surrogatepass")
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-c", STANDARD, word, str(CPU_S), str(BYTES)],
            input=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
            timeout=600,
            check=False,
        )
    if run.returncode == -signal.SIGKILL or run.returncode == -signal.SIGXCPU:
        return "time"
    return "passed" if run.stdout.decode() == word else "failed"


def changed(text: str, rng: random.Random) -> str:
    """A solution cut short, with an operator or literal exchanged, or without one of its lines."""
    kind = rng.choice(("cut", "swap", "swap", "swap", "line"))
    if kind == "cut":
        return text[: rng.randrange(len(text))]
    if kind == "line":
        lines = text.splitlines(keepends=True)
        del lines[rng.randrange(len(lines))]
        return "".join(lines)
    places = [(at, old) for old in SWAPS for at in range(len(text)) if text.startswith(old, at)]
    if not places:
        return text[:-1]
    at, old = rng.choice(places)
    return text[:at] + SWAPS[old] + text[at + len(old) :]


def mutants(n: int, data_dir: Path) -> list[tuple[str, str]]:
    """n changed reference solutions of both benchmarks with their tests, the same in every run."""
    rng = random.Random(4)
    rows = {
        spec.name: list(load_data(spec, data_dir).splits[spec.eval_split])
        for spec in (humaneval.SPEC, mbpp.SPEC)
    }
    whole = [
        (d["prompt"], d["canonical_solution"], humaneval.tests_of(d)) for d in rows["humaneval"]
    ]
    whole += [("", d["code"].replace("\r\n", "\n"), mbpp.tests_of(d)) for d in rows["mbpp"]]
    chosen = [rng.choice(whole) for _ in range(n)]
    return [(prompt + changed(solution, rng), tests) for prompt, solution, tests in chosen]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape")
def test_changed_solutions_get_the_standard_executors_verdict(benchmarks):
    """A sandbox that fails right programs or passes wrong ones would change every score."""
    programs = mutants(PARITY, benchmarks)
    with ThreadPoolExecutor(2) as pool:
        theirs = list(pool.map(standard, programs))
    verdicts = judge_many(programs, 2, timeout_s=CPU_S)
    ours = [
        "time" if v.reason in ("cpu", "wall") else "passed" if v.passed else "failed"
        for v in verdicts
    ]
    timed = sum("time" in pair for pair in zip(ours, theirs, strict=True))
    passed, failed = theirs.count("passed"), theirs.count("failed")
    print(f"{len(programs)} changed solutions: {passed} pass, {failed} fail, {timed} by time")
    both = zip(ours, theirs, programs, strict=True)
    assert [found for found in both if found[0] != found[1] and "time" not in found[:2]] == []
    assert passed > 0 < failed
    assert timed < max(3, len(programs) // 20)


# ---------------------------------------------------------------- many good ones


@pytest.mark.slow
def test_good_programs_never_fail():
    """One spurious failure in thousands is a wrong score that nobody can reproduce."""
    began = time.monotonic()
    programs = [
        (f"def f(x):\n    return x + {i}\n", f"assert f(1) == {i + 1}") for i in range(SOAK)
    ]
    failed = [(i, v) for i, v in enumerate(judge_many(programs, 2)) if not v.passed]
    print(f"{SOAK} programs in {time.monotonic() - began:.0f} s")
    assert failed == []


# ---------------------------------------------------------------- judging while the model generates

ANSWERS = [GOOD, "def f(x):\n    return x\n", "def f(x): return"]


def judging() -> Judging:
    return Judging(
        lambda doc, answer: Extracted(answer, "whole", ""),
        lambda doc, source: Program(source, TESTS),
    )


def scored(found: Judging) -> list[dict]:
    rows = found.score([[answer] for answer in ANSWERS], [{}] * len(ANSWERS))
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in rows]


def test_an_answer_judged_early_is_judged_once_with_the_same_verdict(monkeypatch):
    plain, asked = scored(judging()), []
    assert [row["passed"] for row in plain] == [True, False, False]
    real = code.verdicts
    monkeypatch.setattr(
        code,
        "verdicts",
        lambda programs, **more: asked.append(len(programs)) or real(programs, **more),
    )
    found = judging()
    with found.beside(1) as ahead:
        for answer in ANSWERS[:2] * 2:
            ahead({}, answer)
        assert within(60, lambda: all(future.done() for future in found._early.values()))
        assert scored(found) == plain
    assert asked == [1, 1, 1, 0]


def test_a_program_that_cannot_be_judged_early_delays_no_other_and_is_tried_again(monkeypatch):
    plain, real = scored(judging()), sandbox.run_program
    failures = [OSError("no process can be started")] * sandbox.ATTEMPTS

    def run_program(candidate, *rest):
        if candidate == ANSWERS[0] and failures:
            raise failures.pop()
        return real(candidate, *rest)

    monkeypatch.setattr(sandbox, "run_program", run_program)
    found = judging()
    with found.beside(1) as ahead:
        ahead({}, ANSWERS[0])
        assert within(60, lambda: all(future.done() for future in found._early.values()))
        ahead({}, ANSWERS[1])
        assert within(60, lambda: all(future.done() for future in found._early.values()))
        early = [future.result()[0] for future in found._early.values()]
        assert [code.unjudged(row) is None for row in early] == [False, True]
        assert scored(found) == plain


def test_a_queued_program_that_has_not_started_is_judged_with_the_rest(monkeypatch):
    plain, real, late = scored(judging()), code.verdicts, []
    begun, gate = threading.Event(), threading.Event()

    def verdicts(programs, *, cancel=None, **more):
        if cancel is None:
            late.append(len(programs))
            gate.set()
        else:
            begun.set()
            gate.wait(60)
        return real(programs, cancel=cancel, **more)

    monkeypatch.setattr(code, "verdicts", verdicts)
    found = judging()
    with found.beside(1) as ahead:
        for answer in ANSWERS:
            ahead({}, answer)
        assert begun.wait(60) and scored(found) == plain
    assert late == [2, 0]


@pytest.mark.slow
def test_programs_that_are_judged_early_end_with_an_interrupted_run():
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), judging().beside(2) as ahead:
        ahead({}, "import time\ntime.sleep(600)")
        time.sleep(1.0)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- nothing stays

# a root that no other run sweeps
PLACE = "from sandbox import scratch\nscratch.roots = lambda: [{folder!r}]\n"
HARNESS = """
import sys
import sandbox
from sandbox.scratch import RUN
sandbox.accept("all")
if {probed}:
    sandbox.tier()
print(RUN.path(), flush=True)
programs = [(text, "f()") for text in {texts!r}]
sandbox.judge_many(programs, len(programs), strict={strict}, timeout_s=60, wall_s=60)
"""
STAYING = [
    "while True: pass",
    "import time\ntime.sleep(600)",
    "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(600)",
    "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(600)",
    "import os, time\ntry: os.fork()\nexcept OSError: pass\ntime.sleep(600)",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    "time.sleep(600)",
]


def holding(text: str) -> list[int]:
    """Processes with this text in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            pass
    return found


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("probing", marks=pytest.mark.slow),
        "judging",
        pytest.param("strict", marks=pytest.mark.slow),
    ],
)
def test_nothing_survives_a_killed_harness(moment, request, monkeypatch):
    """kill -9 runs no handler: the kernel has to end the programs, and the next run to sweep."""
    if sandbox.tier().name == "C":
        pytest.skip(f"without seccomp a program may outlive its parent: {sandbox.tier().line}")
    folder = tempfile.mkdtemp(dir=scratch.root())
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    monkeypatch.setenv("TMPDIR", folder)
    place = PLACE.format(folder=folder)
    code = place + HARNESS.format(
        texts=STAYING, strict=moment == "strict", probed=moment != "probing"
    )
    harness = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        run = harness.stdout.readline().strip()
        wanted = {"probing": 1, "judging": len(STAYING), "strict": 2 * len(STAYING)}[moment]
        assert within(120, lambda: len(holding(run)) >= wanted), holding(run)
        if moment != "probing":
            time.sleep(0.3)  # until some of them have done what they try
    finally:
        harness.kill()
        harness.wait()
        harness.stdout.close()
    assert within(20, lambda: not holding(run)), holding(run)
    assert os.path.isdir(run)
    sweeper = f"{place}import sandbox\nsandbox.accept('all')\nsandbox.judge('', '')"
    subprocess.run([sys.executable, "-c", sweeper], cwd=ROOT, check=True)
    assert not os.listdir(folder)


def test_the_tier_is_found_once_however_many_ask(monkeypatch):
    asked = []
    monkeypatch.setattr(
        tiers, "probe", lambda mechanism: asked.append(mechanism) or time.sleep(0.1) or ()
    )
    tiers._found.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(lambda _: tiers.find(), range(4)))) == 1
    finally:
        tiers._found.cache_clear()
    assert len(asked) == len(set(asked)) > 0


def test_a_deep_tree_is_removed():
    """shutil.rmtree recurses: a tree deeper than Python's stack ended the harness."""
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('a'); os.chdir('a')\n"
    judge(deep + GOOD, TESTS)
    assert {p for p in os.listdir(RUN.path()) if p.startswith("s")} == set()


def test_a_directory_is_removed_though_something_writes_to_it_for_a_moment(monkeypatch, tmp_path):
    """Under bubblewrap a program ends a moment after bwrap itself."""
    folder, real, late = tmp_path / "s", os.rmdir, []
    (folder / "a").mkdir(parents=True)

    def rmdir(path) -> None:
        if path == str(folder) and len(late) < 2:
            late.append(folder / f"{len(late)}")
            late[-1].touch()
        real(path)

    monkeypatch.setattr(scratch.os, "rmdir", rmdir)
    scratch.remove(str(folder))
    assert len(late) == 2 and not folder.exists()


def test_a_small_dev_shm_is_not_used(monkeypatch):
    """One program could fill a container's 64 MiB, and other programs would fail."""
    monkeypatch.setattr(scratch, "ROOM_BYTES", 1 << 60)
    assert scratch.root() == tempfile.gettempdir()
    monkeypatch.setattr(scratch, "ROOM_BYTES", 0)
    assert scratch.root() == scratch.roots()[0]


# ---------------------------------------------------------------- the machine's faults


def test_a_start_that_fails_is_tried_again(monkeypatch):
    """EAGAIN on a full machine must not become a failed sample."""
    sandbox.tier()
    real, failures = process.start, [OSError(11, "no more processes")] * 2

    def start(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(process, "start", start)
    assert judge(GOOD, TESTS).passed and failures == []


def judged_and_killed(program: str, times: int = 1) -> tuple[sandbox.Verdict, int]:
    """(verdict, how often it was killed) of a program; so many runs of it are killed.

    They are killed once the program has made the file "ready".
    """
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < times:
            if not within(60, lambda: list(Path(RUN.path()).glob("s*/ready"))):
                return
            pids = holding(RUN.lib())
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
            within(60, lambda: not list(Path(RUN.path()).glob("s*/ready")))

    RUN.path()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return judge(
            f"{program}\nopen('ready', 'w')\nimport time\ntime.sleep(1)\n{GOOD}", TESTS
        ), len(killed)
    except SandboxError as error:
        return sandbox.Verdict(None, "error", str(error), 0.0), len(killed)
    finally:
        killer.join()


@pytest.fixture
def little_memory_is_much(monkeypatch):
    if sandbox.tier().name == "C":
        pytest.skip(f"without seccomp a program may kill itself: {sandbox.tier().line}")
    monkeypatch.setattr(process, "MUCH_MEMORY_KB", 64 << 10)


@pytest.mark.slow
def test_a_program_that_is_killed_from_outside_runs_again(little_memory_is_much):
    """A kill from outside says nothing about the program, however large the harness is."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > process.MUCH_MEMORY_KB
    verdict, killed = judged_and_killed("")
    assert verdict.passed and killed == 1


@pytest.mark.slow
def test_a_program_that_is_killed_alone_while_it_holds_much_memory_ran_out_of_it(
    little_memory_is_much,
):
    """Beside others it may have been their memory."""
    program = "x = bytearray(200 << 20)\nx[::4096] = b'1' * 51200\nimport time; time.sleep(0.3)"
    verdict, killed = judged_and_killed(program, 2)
    assert (killed, verdict.reason) == (2, "memory")
    assert "killed by the system while it held 2" in verdict.detail


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [True, False])
def test_a_kill_for_lack_of_memory_is_known_from_the_kernels_counter(monkeypatch, kernel):
    """In a control group of 180 MiB such a kill counted as the machine's fault."""
    if sandbox.tier().name == "C":
        pytest.skip(f"without seccomp a program may kill itself: {sandbox.tier().line}")
    assert process.oom_kills() >= 0
    counted = iter(range(100))
    monkeypatch.setattr(process, "oom_kills", lambda: next(counted) if kernel else 7)
    verdict, killed = judged_and_killed("", 2 if kernel else 4)
    assert (verdict.reason, killed) == (("memory", 2) if kernel else ("error", 4))


def scoring(folder: Path, texts: list[str], value: str = "") -> list[str]:
    """Arguments of a run that scores texts on copies of one problem.

    value: source that the test appends to f(1) before it compares.
    """
    row = {
        "entry_point": "f",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return x + 1\n",
        "test": f"def check(candidate):\n    assert candidate(1){value} == 2\n",
    }
    rows = "".join(json.dumps(row | {"task_id": f"Mini/{i}"}) + "\n" for i in range(len(texts)))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "manifest.json").write_text(
        json.dumps({"name": "mini", "counts": {"HumanEval.jsonl.gz": len(texts)}})
    )
    predictions = folder / "texts.jsonl"
    predictions.write_text(
        "".join(json.dumps({"doc_id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    )
    words = f"--model_alias llada --task humaneval --data_dir {folder}"
    return f"{words} --predictions {predictions} --output_dir {folder}/out".split()


def result_in(folder: Path) -> dict:
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.fixture
def as_before():
    """A run sets for the whole process what is accepted: undo it."""
    yield
    sandbox.accept(None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "strict"])
def test_a_program_that_cannot_be_judged_is_an_error_of_its_sample(
    monkeypatch, tmp_path, capsys, mode
):
    """It is no failure of the model, and it takes no other sample along."""
    sandbox.tier()
    name = "run_strict" if mode == "strict" else "run_program"
    real = getattr(process, name)

    def broken(candidate, *rest):
        return "no memory" if "broken" in candidate else real(candidate, *rest)

    answers = [GOOD, "def f(x):\n    broken = x + 1\n    return broken\n", "def f(x): return x\n"]
    arguments = scoring(tmp_path, answers) + ["--strict_exec"] * (mode == "strict")
    with monkeypatch.context() as faulty:
        faulty.setattr(sandbox, name, broken)
        assert command.main(arguments) == 5
    problem = "a program could not be judged, tried 4 times: no memory"
    assert "1 sample failed: the values above are of the others" in (out := capsys.readouterr().out)
    assert problem in out and "suspect" not in out
    found = result_in(tmp_path / "out")
    assert (found["status"], found["headline"], found["metrics"]) == ("incomplete", None, {})
    assert [(row["status"], row["error"]) for row in found["samples"]] == [
        ("ok", None),
        ("error", problem),
        ("ok", None),
    ]
    assert found["n_failed"] == 1 and "metrics" not in found["samples"][1]
    scores = found["score_on_completed"]
    assert {e["value"] for e in scores.values()} == {0.5} and {e["n"] for e in scores.values()} == {
        2
    }
    assert not found["strict"] or found["strict"]["suspects"] == []
    # the machine is mended: the same command scores all
    assert command.main(arguments) == 0
    assert result_in(tmp_path / "out")["n_failed"] == 0


# ---------------------------------------------------------------- what a user gets

EQUAL = "def f(x):\n    class Equal:\n        __eq__ = lambda *_: True\n    return Equal()\n"
OBJECT = "class Found:\n    value = 2\ndef f(x):\n    return Found()\n"


def test_a_forged_pass_counts_and_is_run_once_unless_strict_mode_is_asked_for(tmp_path, capsys):
    """pass@1 is lm-eval's number: what passes there passes here too, without a warning."""
    assert command.main(scoring(tmp_path, [GOOD, EQUAL])) == 0
    out, result = capsys.readouterr().out, result_in(tmp_path / "out")
    assert list(result["metrics"]) == ["pass@1,create_test"]
    assert result["headline"]["value"] == 1.0 and result["strict"] is None
    assert all("strict" not in row["verdict"] for row in result["samples"])
    assert "strict" not in out


def test_without_strict_mode_no_program_runs_twice(monkeypatch):
    monkeypatch.setattr(sandbox, "run_strict", lambda *_: pytest.fail("a second run"))
    assert [row["passed"] for row in scored(judging())] == [True, False, False]


def test_a_forged_pass_is_listed_with_its_program(tmp_path, capsys):
    """pass@1 stays lm-eval's number; pass@1_strict leaves the forged pass out."""
    answers = [GOOD, EQUAL, "def f(x):\n    return x\n"]
    assert command.main([*scoring(tmp_path, answers), "--strict_exec"]) == 0
    out, result = capsys.readouterr().out, result_in(tmp_path / "out")
    values = {key.partition(",")[0]: found["value"] for key, found in result["metrics"].items()}
    assert values == {"pass@1": pytest.approx(2 / 3), "pass@1_strict": pytest.approx(1 / 3)}
    assert result["headline"]["metric"] == "pass@1,create_test"
    [suspect] = result["strict"]["suspects"]
    assert (suspect["doc_id"], suspect["reason"]) == (1, "opaque")
    assert result["strict"]["unverifiable"] == []
    assert "class Equal" in suspect["program"] and "check(f)" in suspect["program"]
    assert "warning: 1 pass fails in strict mode" in out and "tests: doc_id 1;" in out
    assert result["meta"]["sandbox"] == sandbox.tier().line
    tiers_used = {row["sandbox_tier"] for row in result["profile"]["sample_seconds"]}
    assert tiers_used == {sandbox.tier().name}


def test_an_unverifiable_pass_is_no_suspect(tmp_path, capsys):
    assert command.main([*scoring(tmp_path, [OBJECT], value=".value"), "--strict_exec"]) == 0
    assert result_in(tmp_path / "out")["strict"] == {"suspects": [], "unverifiable": [0]}
    assert "1 pass cannot be checked in strict mode: doc_id 0" in capsys.readouterr().out


def test_a_pass_that_was_judged_early_is_rechecked_too():
    found = judging()
    found.strict = True
    with found.beside(1) as ahead:
        ahead({}, ANSWERS[0])
        assert within(60, lambda: all(future.done() for future in found._early.values()))
        rows = scored(found)
    assert [row["strict"] and row["strict"]["passed"] for row in rows] == [True, None, None]


def test_passes_beyond_the_usual_limit_are_named():
    """With lm-eval's time limit they would fail."""
    rows = [
        {"doc_id": i, "repeat": 0, "verdict": {"passed": i != 2, "strict": None}} for i in range(3)
    ]
    times = [
        {"doc_id": i, "repeat": 0, "judged_cpu_s": seconds}
        for i, seconds in enumerate((2.9, 3.1, 9.0))
    ]
    lines = code_lines(
        {"samples": rows, "profile": {"sample_seconds": times}, "status": "complete"}
    )
    assert lines == ["1 pass used more than 3.0 CPU-seconds (lm-eval's limit): doc_id 1"]


def test_programs_are_kept_for_another_machine(monkeypatch, tmp_path, capsys, as_before):
    """On a node where no program may run, none runs and none is lost."""
    arguments = scoring(tmp_path, [GOOD, "def f(x):\n    return x\n"])
    with monkeypatch.context() as nothing_runs:
        nothing_runs.setattr(tiers, "find", lambda: pytest.fail("the sandbox was asked for"))
        nothing_runs.setattr(process, "start", lambda *_: pytest.fail("a program was run"))
        assert command.main([*arguments, "--no_exec"]) == 5
    out, err = capsys.readouterr()
    assert "no program was run (--no_exec)" in out and "code sandbox: not used (--no_exec)" in err
    kept = result_in(tmp_path / "out")
    assert (kept["status"], kept["headline"], kept["metrics"]) == ("unscored", None, {})
    assert [row["verdict"]["passed"] for row in kept["samples"]] == [None, None]
    assert all("check(f)" in row["program"] for row in kept["samples"])
    [path] = (tmp_path / "out").glob("llada_humaneval_predictions*.json")
    there = ["--predictions", str(path)]
    there += ["--output_dir", str(tmp_path / "there")]
    # elsewhere, from the result; here, by the same command
    for more, folder in ((there, "there"), ([], "out")):
        assert command.main([*arguments, *more]) == 0
        scored = result_in(tmp_path / folder)
        assert scored["status"] == "complete"
        assert scored["metrics"]["pass@1,create_test"]["value"] == 0.5


def test_without_execution_strict_mode_has_no_verdict_either(as_before):
    sandbox.accept(None, execute=False)
    [row] = code.verdicts([Program(GOOD, TESTS)], strict=True)
    assert row["passed"] is None and row["strict"] is None
    assert code.process_results({}, [row]) == {}


@pytest.mark.parametrize(
    ("name", "value", "code"), [("B", None, 3), ("B", "fs", 0), ("C", "fs", 3), ("C", "all", 0)]
)
def test_a_run_in_a_lower_tier_has_to_be_accepted(
    monkeypatch, tmp_path, capsys, as_before, name, value, code
):
    below = replace(sandbox.tier(), name=name, open=("read", "write"))
    monkeypatch.setattr(tiers, "find", lambda: below)
    accept = ["--unsafe_exec", value] * bool(value)
    assert command.main([*scoring(tmp_path, [GOOD]), *accept]) == code
    err = capsys.readouterr().err
    if code:
        assert f"error: code sandbox: tier {name} " in err
        assert "--unsafe_exec" in err and "--no_exec" in err
        assert not list((tmp_path / "out").rglob("*.json"))
    else:
        assert f"code sandbox: tier {name} " in err
        line = result_in(tmp_path / "out")["meta"]["sandbox"]
        assert line.startswith(f"code sandbox: tier {name} (")
