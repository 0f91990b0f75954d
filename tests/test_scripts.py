"""The shell scripts and their options, in a folder whose interpreter only logs its calls."""

import os
import pty
import pwd
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mini import ROOT

PYTHON = """#!/bin/sh
hub="HF_HOME=$HF_HOME HF_DATASETS_CACHE=$HF_DATASETS_CACHE HF_HUB_OFFLINE=$HF_HUB_OFFLINE"
printf '%s\\n' "$hub $*" >>called
case "$*" in
  *"--check --wrong"*) exit 2 ;;
  *--check*) mkdir -p "${OUT:-results}/logs" && echo "${OUT:-results}" && exit ;;
  *--no_tmux* | *--help*) exit 0 ;;
esac
while [ -e wait ]; do sleep 0.05; done
[ ! -d "${OUT:-results}/logs" ] ||
  printf 'begun\n\n| a table |\nended: 1 done\n' >>"${OUT:-results}/logs/sweep.log"
[ ! -e code ] || exit "$(cat code)"
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
    for socket in sockets(name):
        subprocess.run(["tmux", "-S", socket, "kill-server"], capture_output=True)
        socket.unlink(missing_ok=True)


def sockets(name: str) -> list[Path]:
    folder = Path(os.environ.get("TMUX_TMPDIR", "/tmp")) / f"tmux-{os.getuid()}"
    return sorted(folder.glob(f"{name}-*"))


def alive(name: str) -> bool:
    command = ["tmux", "-S", "", "has-session"]
    found = [command[:2] + [socket] + command[3:] for socket in sockets(name)]
    return any(subprocess.run(c, capture_output=True).returncode == 0 for c in found)


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
    assert first.returncode == 0, first.stderr
    assert f"attach: tmux -L {tmux}-results-" in first.stdout
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
    words = ["--models", "llada", "--extra", "--limit 5"]
    for again in ([], words):
        second = script(folder, "exp.sh", *again, **environ)
        assert second.returncode == 0 and "running in results already" in second.stdout
    other = script(folder, "exp.sh", "--tps", "8", **environ)  # it would never run
    assert other.returncode == 75 and "another --output_dir runs beside it" in other.stderr
    beside = script(folder, "exp.sh", **environ, OUT="beside")
    assert beside.returncode == 0 and f"attach: tmux -L {tmux}-beside-" in beside.stdout
    assert "progress: ./scripts/progress.sh --watch --output_dir beside" in beside.stdout
    assert len(sockets(tmux)) == 2
    (folder / "wait").unlink()
    while alive(tmux):
        assert time.monotonic() < end, "the session outlives the suite"
        time.sleep(0.05)


def test_wrong_options_start_no_session(folder, tmux):
    assert script(folder, "exp.sh", "--wrong", DLLMEXP_TMUX=tmux).returncode == 2
    assert not alive(tmux)


def on_a_terminal(folder: Path, *words: str, code: int = 0, **environ: str) -> str:
    """What a terminal shows of exp.sh, up to its end with this exit code."""
    with pty_of(folder, words, environ) as (process, fd):
        shown = b""
        with suppress(OSError):  # Linux: the other end is closed
            while chunk := os.read(fd, 65536):
                shown += chunk
        assert process.wait(60) == code, shown
    return shown.decode()


@contextmanager
def pty_of(folder: Path, words, environ):
    fd, slave = pty.openpty()
    command = ["bash", str(folder / "scripts" / "exp.sh"), *words]
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    process = subprocess.Popen(command, env=os.environ | environ, start_new_session=True, **streams)
    os.close(slave)
    late = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    try:
        yield process, fd
    finally:
        late.cancel()
        os.close(fd)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_terminal_shows_how_the_suite_ended(folder, tmux):
    """tmux closes its screen with the suite: `[exited]` was all that was left."""
    (folder / "wait").touch()
    threading.Timer(1, (folder / "wait").unlink).start()
    shown = on_a_terminal(folder, DLLMEXP_TMUX=tmux, TERM="xterm")
    assert shown.endswith("| a table |\r\nended: 1 done\r\n")


def test_a_suite_in_tmux_has_the_exit_code_of_one_in_the_foreground(folder, tmux):
    """It was 0 after failed experiments."""
    (folder / "code").write_text("5")
    on_a_terminal(folder, code=5, DLLMEXP_TMUX=tmux, TERM="xterm")
    (folder / "code").write_text("0")
    on_a_terminal(folder, DLLMEXP_TMUX=tmux, TERM="xterm")


def test_ctrl_c_in_tmux_is_130(folder, tmux):
    python = folder / ".venv" / "bin" / "python"
    python.write_text(PYTHON.replace("while [", "trap 'exit 130' INT\nwhile ["))
    (folder / "wait").touch()
    with pty_of(folder, (), {"DLLMEXP_TMUX": tmux, "TERM": "xterm"}) as (process, fd):
        while not (folder / "called").exists() or len(calls(folder)) < 2:
            time.sleep(0.05)
        time.sleep(0.5)  # the trap is set
        os.write(fd, b"\x03")
        shown = b""
        with suppress(OSError):
            while chunk := os.read(fd, 65536):
                shown += chunk
        assert process.wait(60) == 130, shown


def test_a_check_starts_no_session(folder, tmux):
    run = script(folder, "exp.sh", "--check", "--tps", "2", DLLMEXP_TMUX=tmux)
    assert (run.returncode, run.stdout, sockets(tmux)) == (0, "results\n", []), run.stderr
    assert len(calls(folder)) == 1


def test_a_terminal_that_tmux_does_not_know_gets_its_suite(folder, tmux):
    """kitty or ghostty over ssh: nothing ran."""
    (folder / "wait").touch()
    shown = on_a_terminal(folder, DLLMEXP_TMUX=tmux, TERM="xterm-nobody")
    assert "cannot show the session in this terminal (TERM=xterm-nobody)" in shown
    assert "the suite runs; attach: tmux -L" in shown and alive(tmux)
    (folder / "wait").unlink()


def test_exp_runs_without_home(folder):
    """In a batch job or a container it may not be set: "HOME: unbound variable"."""
    names = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE")
    run = script(folder, "exp.sh", "--no_tmux", **dict.fromkeys(names))
    assert run.returncode == 0, run.stderr
    [call] = calls(folder)
    hub = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "huggingface"
    assert call.startswith(f"HF_HOME={hub} HF_DATASETS_CACHE={hub}/datasets ")


@pytest.mark.parametrize("name", ["exp.sh", "demo.sh", "test.sh", "setup.sh"])
def test_help_runs_nothing(folder, tmux, name):
    run = script(folder, name, "--help", DLLMEXP_TMUX=tmux)
    assert run.returncode == 0 and f"./scripts/{name}" in run.stdout, run.stderr
    assert not sockets(tmux)
    assert not (folder / "called").exists() or calls(folder)[0].endswith("run --help")


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
    assert run.returncode == 0, run.stderr
    call, *choices = calls(folder)
    assert [
        f"--model_alias tiny-{m} --task arc_easy,arc_challenge" in c
        for m, c in zip(("llada", "dream"), choices)
    ] == [True] * 2
    extra = f"--extra --data_dir assets/benchmarks --dtype float32 --batch_size 32{more}"
    assert (
        "sweep.py run --models tiny-llada tiny-dream --tasks humaneval mbpp gsm8k truthfulqa lines "
        f"--tps 1 2 3 8 --output_dir {out} {extra} --workers 2" in call
    )
    assert call.endswith("--workers 2" + "".join(f" {w}" for w in words if w != "--quick"))


# ---- installing


def test_setup_installs_by_itself(folder):
    """From any directory; a user of a cluster ran a demo in order to install."""
    (folder / ".venv" / "installed.txt").unlink()
    run = script(folder, "setup.sh")
    assert run.returncode == 0 and "source .venv/bin/activate" in run.stdout, run.stderr
    assert ["pip install" in call for call in calls(folder)] == [True, True]
    again = script(folder, "setup.sh")
    assert again.returncode == 0 and len(calls(folder)) == 2
    assert os.access(ROOT / "scripts" / "setup.sh", os.X_OK)


def test_setup_takes_no_argument(folder):
    (folder / ".venv" / "installed.txt").unlink()
    run = script(folder, "setup.sh", "--quick")
    assert (run.returncode, "'--quick'" in run.stderr) == (2, True)
    assert not (folder / "called").exists(), "nothing is installed"


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
