"""The shell scripts pass on their options. A fake interpreter records how it is called."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from mini import ROOT

PYTHON = """#!/bin/sh
printf '%s\\n' "HF_HOME=$HF_HOME HF_DATASETS_CACHE=$HF_DATASETS_CACHE \\
HF_HUB_OFFLINE=$HF_HUB_OFFLINE $*" >>called
case "$*" in *"--check --wrong"*) exit 2 ;; *--check* | *--no_tmux*) exit 0 ;; esac
while [ -e wait ]; do sleep 0.05; done
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory with the scripts and a .venv that counts as installed."""
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
    """Run a script. A variable of `environ` that is None is unset."""
    return subprocess.run(
        ["bash", str(folder / "scripts" / name), *words],
        env={k: v for k, v in (os.environ | environ).items() if v is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def calls(folder: Path) -> list[str]:
    """The calls of the fake interpreter: three variables of the environment, then the arguments."""
    return (folder / "called").read_text().splitlines()


@pytest.fixture
def tmux(tmp_path):
    """The name of a tmux server of this test."""
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
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
    home = "/home/me/.cache/huggingface"
    variables = f"HF_HOME={home} HF_DATASETS_CACHE={home}/datasets"
    variables += f" HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']}"
    options = "--models llada --extra --limit 5"
    assert calls(folder) == [
        f"{variables} scripts/sweep.py run --check {options}",
        f"{variables} scripts/sweep.py run {options}",
    ]
    second = script(folder, "exp.sh", **environ)
    assert second.returncode == 0 and "running already" in second.stdout
    assert len(calls(folder)) == 2
    (folder / "wait").unlink()
    while not subprocess.run(["tmux", "-L", tmux, "has-session"], capture_output=True).returncode:
        assert time.monotonic() < end, "the session outlives the suite"
        time.sleep(0.05)


def test_wrong_options_start_no_session(folder, tmux):
    assert script(folder, "exp.sh", "--wrong", DLLMEXP_TMUX=tmux).returncode == 2
    assert subprocess.run(["tmux", "-L", tmux, "has-session"], capture_output=True).returncode != 0


def test_the_given_caches_of_the_hub_are_used(folder):
    caches = {"HF_HOME": "/hf", "HF_DATASETS_CACHE": "/data"}
    assert script(folder, "exp.sh", "--no_tmux", "--tps", "2", **caches).returncode == 0
    call = calls(folder)[-1]
    assert call.startswith("HF_HOME=/hf HF_DATASETS_CACHE=/data ") and call.endswith("run --tps 2")


@pytest.mark.parametrize(
    ("words", "out", "more"),
    [
        ([], "results/demo", ""),
        (["--quick"], "results/demo-quick", " --limit 25"),
        (["--tps", "8"], "results/demo", ""),
    ],
)
def test_the_demo_is_the_tiny_models_on_the_mini_benchmarks(folder, words, out, more):
    done = script(folder, "demo.sh", *words)
    assert done.returncode == 0 and f"{out}/report/report.html" in done.stdout, done.stderr
    [call] = calls(folder)
    options = f"--models tiny-llada tiny-dream --output_dir {out}"
    options += f" --extra --data_dir assets/benchmarks --dtype float32 --batch_size 32{more}"
    passed_on = "".join(f" {word}" for word in words if word != "--quick")
    assert call.endswith(f"sweep.py run {options} --workers 2{passed_on}")


@pytest.mark.parametrize(
    ("words", "venv", "passed_on"),
    [
        ([], ".venv", ""),
        (["--quick"], ".venv", " -m not slow"),
        (["tests/test_store.py", "--quick"], ".venv", " tests/test_store.py -m not slow"),
        (["--quick", "--latest", "-k", "store"], ".venv-latest", " -m not slow -k store"),
    ],
)
def test_the_tests_are_all_or_quick_pinned_or_latest(folder, words, venv, passed_on):
    """Only the expected environment exists, so that another one cannot be used unnoticed."""
    (folder / ".venv").rename(folder / venv)
    if venv == ".venv-latest":
        for copy in (folder / "requirements-latest.txt", folder / venv / "installed.txt"):
            shutil.copyfile(ROOT / "requirements-latest.txt", copy)
    done = script(folder, "test.sh", *words)
    assert done.returncode == 0, done.stderr
    [call] = calls(folder)
    assert call.endswith("-m pytest -q -rs" + passed_on)


# ---- installing


def fake_python(folder: Path, text: str) -> str:
    path = folder / "fake"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_that_is_too_old_is_named(folder):
    shutil.rmtree(folder / ".venv")
    old = fake_python(folder, 'case "$1" in --version) echo Python 3.9.18 ;; *) exit 1 ;; esac')
    done = script(folder, "demo.sh", DLLMEXP_PYTHON=old)
    assert done.returncode == 3 and "Python 3.9.18 is too old" in done.stderr
    assert not (folder / ".venv").exists()


def test_an_environment_that_could_not_be_made_leaves_nothing_behind(folder):
    """Debian without python3-venv leaves one without pip, which a second call would use."""
    shutil.rmtree(folder / ".venv")
    half = (
        'case "$1" in -m) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; '
        'echo "ensurepip is not available"; exit 1 ;; esac'
    )
    done = script(folder, "demo.sh", DLLMEXP_PYTHON=fake_python(folder, half))
    assert done.returncode == 3 and "ensurepip is not available" in done.stdout
    assert ".venv cannot be made" in done.stderr and not (folder / ".venv").exists()
