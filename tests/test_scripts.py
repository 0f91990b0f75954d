"""The shell scripts and their options, in a folder whose interpreter only logs its calls."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from mini import ROOT

PYTHON = """#!/bin/sh
hub="HF_HOME=$HF_HOME HF_DATASETS_CACHE=$HF_DATASETS_CACHE HF_HUB_OFFLINE=$HF_HUB_OFFLINE"
printf '%s\\n' "$hub $*" >>called
case "$*" in *"--check --wrong"*) exit 2 ;; *--check* | *--no_tmux*) exit 0 ;; esac
while [ -e wait ]; do sleep 0.05; done
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """The repository as the scripts see it, installed."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for copy in (tmp_path / "requirements.txt", tmp_path / ".venv" / "installed.txt"):
        shutil.copyfile(ROOT / "requirements.txt", copy)
    return tmp_path


def script(
    folder: Path, name: str, *words: str, **environ: str | None
) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in (os.environ | environ).items() if v is not None}
    command = ["bash", str(folder / "scripts" / name), *words]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def calls(folder: Path) -> list[str]:
    return (folder / "called").read_text().splitlines()


@pytest.fixture
def tmux(tmp_path):
    """The name of a server of its own, which ends with the test."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux on this machine; apt-get install tmux")
    name = f"dllmexp-test-{os.getpid()}"
    yield name
    subprocess.run(["tmux", "-L", name, "kill-server"], capture_output=True)


def test_the_suite_runs_in_tmux_and_a_second_call_finds_it(folder, tmux):
    (folder / "wait").touch()
    environ = {
        "DLLMEXP_TMUX": tmux,
        "HF_HOME": None,
        "HF_DATASETS_CACHE": None,
        "XDG_CACHE_HOME": None,
        "HOME": "/home/me",
    }
    first = script(folder, "exp.sh", "--models", "llada", "--extra", "--limit 5", **environ)
    assert first.returncode == 0 and f"attach: tmux -L {tmux} attach" in first.stdout, first.stderr
    end = time.monotonic() + 60
    while len(calls(folder)) < 2:
        assert time.monotonic() < end, "the session runs nothing"
        time.sleep(0.05)
    home = (
        "HF_HOME=/home/me/.cache/huggingface HF_DATASETS_CACHE=/home/me/.cache/huggingface/datasets"
    )
    command = "scripts/sweep.py run{} --models llada --extra --limit 5"
    assert calls(folder) == [
        f"{home} HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']} {command.format(c)}"
        for c in (" --check", "")
    ]
    second = script(folder, "exp.sh", **environ)
    assert second.returncode == 0 and "running already" in second.stdout and len(calls(folder)) == 2
    (folder / "wait").unlink()
    while not subprocess.run(["tmux", "-L", tmux, "has-session"], capture_output=True).returncode:
        assert time.monotonic() < end, "the session outlives the suite"
        time.sleep(0.05)


def test_wrong_options_start_no_session(folder, tmux):
    assert script(folder, "exp.sh", "--wrong", DLLMEXP_TMUX=tmux).returncode == 2
    assert subprocess.run(["tmux", "-L", tmux, "has-session"], capture_output=True).returncode != 0


def test_the_caches_of_the_hub_stay_where_the_environment_puts_them(folder):
    assert (
        script(
            folder, "exp.sh", "--no_tmux", "--tps", "2", HF_HOME="/hf", HF_DATASETS_CACHE="/data"
        ).returncode
        == 0
    )
    assert calls(folder)[-1].startswith("HF_HOME=/hf HF_DATASETS_CACHE=/data ") and calls(folder)[
        -1
    ].endswith("run --tps 2")


@pytest.mark.parametrize(
    ("words", "out", "more"),
    [
        ([], "results/demo", ""),
        (["--quick"], "results/demo-quick", " --limit 25"),
        (["--tps", "8"], "results/demo", ""),
    ],
)
def test_the_demo_is_the_tiny_models_on_the_mini_benchmarks(folder, words, out, more):
    run = script(folder, "demo.sh", *words)
    assert run.returncode == 0 and f"{out}/report/report.html" in run.stdout, run.stderr
    [call] = calls(folder)
    extra = f"--extra --data_dir assets/benchmarks --dtype float32 --batch_size 32{more}"
    assert (
        f"sweep.py run --models tiny-llada tiny-dream --output_dir {out} {extra} --workers 2"
        in call
    )
    assert call.endswith("--workers 2" + "".join(f" {w}" for w in words if w != "--quick"))


# ---- installing


def fake_python(folder: Path, text: str) -> str:
    path = folder / "fake"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_that_is_too_old_is_named(folder):
    shutil.rmtree(folder / ".venv")
    old = fake_python(folder, 'case "$1" in --version) echo Python 3.9.18 ;; *) exit 1 ;; esac')
    run = script(folder, "demo.sh", DLLMEXP_PYTHON=old)
    assert (
        run.returncode == 3
        and "Python 3.9.18 is too old" in run.stderr
        and not (folder / ".venv").exists()
    )


def test_an_environment_that_could_not_be_made_leaves_nothing_behind(folder):
    """Without python3-venv Debian makes one without pip, and a second call would use it."""
    shutil.rmtree(folder / ".venv")
    make = 'mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "ensurepip is not available"; exit 1'
    half = f'case "$1" in -m) {make} ;; esac'
    run = script(folder, "demo.sh", DLLMEXP_PYTHON=fake_python(folder, half))
    assert (
        run.returncode == 3
        and "ensurepip is not available" in run.stdout
        and ".venv cannot be made" in run.stderr
    )
    assert not (folder / ".venv").exists()
