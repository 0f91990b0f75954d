"""The suite on a real SLURM: slurmctld, two slurmd and munged on loopback; and without one."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pytest
from mini import DREAM, LLADA, gsm8k_dir

import eval as cli
from experiment.result import VOLATILE
from experiment.status import read_status
from scripts.sweep import main
from suite.cluster import DEFAULT_TIME, JobRequest, _sbatch
from suite.lease import read_records
from suite.matrix import Selection, select
from suite.state import Watcher
from utils import EnvironmentProblem, UsageError

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "scontrol",
    "scancel",
    "squeue",
    "sinfo",
)
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MessageTimeout=60
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
KillWait=20
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=tiny Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, what: str, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.2)
    return found


def output_of(*command: str, check: bool = True) -> str:
    """The output of a command. That of a failed one would read as an empty queue."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert not check or run.returncode == 0, f"{' '.join(command)}: {run.stderr}"
    return run.stdout


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, n0 and n1, in the partition `tiny`; its daemons end with the tests."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid():
        pytest.skip("SLURM's daemons are started as root, and these tests are not run by root")
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        pytest.skip(
            f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
    daemons = []

    def start(name: str, *command: str) -> None:
        with open(folder / f"{name}.log", "wb") as log:
            daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", path)
        own = [
            f"--{what}-file={folder}/munge.{what.split('-')[0]}"
            for what in ("key", "pid", "seed", "log")
        ]
        start(
            "munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *own
        )
        try:
            wait_for((folder / "munge.socket").exists, "munged", 30)
            start("slurmctld", "slurmctld", "-D")
            start("n0", "slurmd", "-D", "-N", "n0")
            start("n1", "slurmd", "-D", "-N", "n1")
            wait_for(
                lambda: output_of("sinfo", "-h", "-o", "%D %t", check=False) == "2 idle\n",
                "two idle nodes",
                60,
            )
            yield "tiny"
            output_of("scancel", "--user", "root")
            wait_for(lambda: not output_of("squeue", "-h"), "jobs to end")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(120)
    shutil.rmtree(folder)


TPS = (8, 1, 2)  # a quick one first: soon there is something to lose, and much is left
N = 12  # samples of each: enough work that a task which starts late still finds some


def six(tmp_path: Path, out: str) -> tuple[list[str], list]:
    """6 experiments on tiny checkpoints: the command line, and the experiments."""
    if not (tmp_path / "data").exists():
        gsm8k_dir(tmp_path / "data", N)
    extra = (
        "--llada_ckpt",
        str(LLADA),
        "--dream_ckpt",
        str(DREAM),
        "--data_dir",
        str(tmp_path / "data"),
        "--gen_length",
        "64",
        "--dtype",
        "float32",
    )
    selection = Selection(
        ("llada", "dream"), ("gsm8k",), TPS, extra=extra, output_dir=str(tmp_path / out)
    )
    words = [
        "--models",
        "llada",
        "dream",
        "--tasks",
        "gsm8k",
        "--tps",
        *map(str, TPS),
        "--extra",
        " ".join(extra),
    ]
    return [*words, "--output_dir", selection.output_dir], select(selection)


def content(path: Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in VOLATILE}


@pytest.mark.slow
def test_six_experiments_over_two_nodes_that_are_both_taken_away(cluster, tmp_path, capfd):
    """One task is requeued, the other gets the warning of a time limit; both resume."""
    words, found = six(tmp_path, "cluster")
    assert (
        main(["run", "--engine", "slurm", "--partition", cluster, "--gpus-per-job", "0", *words])
        == 0
    )
    text = capfd.readouterr().out
    job = text.partition("job ")[2].partition(":")[0]
    assert (
        f"job {job}: 6 experiments, 2 tasks at most" in text
        and f"scancel {job}" in text
        and "progress.sh" in text
    )
    watchers = [Watcher(e) for e in found]

    def both_at_work() -> bool:
        """And something to lose: each model has a sample, and a task for itself."""
        living = [record for record in read_records(tmp_path / "cluster") if record.alive]
        begun = {w.experiment.model for w in watchers if w.status().n}
        return len(living) == len(begun) == 2 and any(w.status().n == N for w in watchers)

    def free_to_start() -> bool:
        """SLURM holds a requeued job for two minutes: this ends the wait.

        Not in the second of the requeue: a job started then fails at once.
        """
        tasks = [
            line.split(maxsplit=3)
            for line in output_of("squeue", "-h", "-r", "-j", job, "-o", "%i %T %V %r").splitlines()
        ]
        held = [(task, requeued) for task, _, requeued, reason in tasks if reason == "BeginTime"]
        for task, requeued in held:
            if time.time() > datetime.fromisoformat(requeued).timestamp() + 2:
                output_of("scontrol", "update", f"JobId={task}", "StartTime=now", check=False)
        return not held and all(state != "COMPLETING" for _, state, _, _ in tasks)

    wait_for(both_at_work, "two tasks at work")
    output_of("scontrol", "requeue", f"{job}_0")
    output_of("scancel", "--batch", "--signal=USR2", f"{job}_1")
    wait_for(
        lambda: "RUNNING" not in output_of("squeue", "-h", "-j", job, "-o", "%T"),
        "both tasks taken away",
    )
    wait_for(free_to_start, "both tasks free to start")
    _, local = six(tmp_path, "local")
    assert [cli.main([*e.argv, "--device", "cpu"]) for e in local] == [0] * 6  # meanwhile
    wait_for(lambda: free_to_start() and not output_of("squeue", "-h", "-j", job), "the job to end")
    assert [w.status().state for w in watchers] == ["done"] * 6
    states = output_of("scontrol", "show", "job", job)
    assert states.count("JobState=COMPLETED") == 2 and states.count("Restarts=1") == 2, states
    assert [
        sum(len(p.read_bytes().splitlines()) - 1 for p in e.store.glob("shard-*")) for e in found
    ] == [N] * 6
    assert [read_status(e.store)[0].sums.n for e in found] == [N] * 6
    assert [content(e.job.path) for e in found] == [content(e.job.path) for e in local]
    assert (tmp_path / "cluster" / "report" / "report.html").is_file()


@pytest.mark.slow
def test_what_sbatch_refuses_is_one_line(cluster, tmp_path, capsys):
    words, _ = six(tmp_path, "out")
    slurm = ["run", "--engine", "slurm", *words]
    assert main([*slurm, "--gpus-per-job", "0", "--partition", "nowhere"]) == 3
    assert main(slurm) == 3  # a GPU, which these nodes have not got
    assert capsys.readouterr().err.splitlines() == [
        "error: sbatch: Batch job submission failed: Invalid partition name specified",
        "error: sbatch: Invalid generic resource (gres) specification",
    ]


# ---- without a cluster


def test_without_sbatch_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "--engine", "slurm", "--output_dir", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err.startswith(
        "error: sbatch and scontrol not found: --engine slurm submits from a login node"
    )


@pytest.mark.parametrize(
    ("said", "job"),
    [
        ("Submitted batch job 4242", "4242"),
        ("Welcome. Yesterday job 17 failed.\\n7 nodes are down\\nSubmitted batch job 8", "8"),
        ("Submitted batch job 8 on cluster b", "8"),
        ("see job 17", None),
    ],
)
def test_the_job_is_the_one_that_sbatch_names(tmp_path, monkeypatch, said, job):
    """The text of a site stood before it, and "job 17" became the job."""
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if job:
        assert _sbatch(["--wrap", "true"]) == job
    else:
        with pytest.raises(EnvironmentProblem, match="names no job .'see job 17'"):
            _sbatch(["--wrap", "true"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--partition", "gpu"], "--partition: only for --engine slurm"),
        (["--engine", "slurm", "--time", "soon"], "--time soon: expected minutes"),
        (["--engine", "slurm", "--time", "1"], "--time 1: must be at least 5 minutes"),
        (["--engine", "slurm", "--array-size", "0"], "--array-size 0: must be at least 1"),
        (["--engine", "slurm", "--gpus-per-job", "-1"], "--gpus-per-job -1: must be 0 or more"),
        (["--engine", "slurm", "--slurm-extra=-C a100"], "'-C' is no --option of sbatch"),
        (["--engine", "slurm", "--slurm-extra=--time=5"], "--slurm-extra --time: give --time"),
    ],
)
def test_wrong_options_are_reported_at_once(tmp_path, capsys, words, problem):
    assert main(["run", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("90:00", 90),
        ("9:30", 10),
        ("4:00:00", 240),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:30", 2881),
    ],
)
def test_a_time_limit_as_sbatch_takes_it(text, minutes):
    assert f"--time={minutes}" in JobRequest(time=text).options()
    assert JobRequest().options() == JobRequest(time=DEFAULT_TIME).options()
    assert "--time=240" in JobRequest().options()


@pytest.mark.parametrize("text", ["0", "1:2:3:4", "-5", "1:", "1-", "1.5"])
def test_no_time_limit_is_guessed(text):
    with pytest.raises(UsageError, match="--time"):
        JobRequest(time=text).options()


def test_further_options_of_sbatch_are_handed_on():
    options = JobRequest(
        qos="night", slurm_extra="--mem=64G --exclusive --cpus-per-task 8"
    ).options()
    assert options[-4:] == ["--mem=64G", "--exclusive", "--cpus-per-task", "8"]
    assert {"--qos=night", "--requeue", "--gpus-per-node=1", "--signal=B:USR2@90"} <= set(options)
    assert not any(option.startswith("--partition") for option in options)
    assert not any("gpus" in option for option in JobRequest(gpus_per_job=0).options())
