"""Tests run offline, on the CPU and on one thread."""

import atexit
import os
import shlex
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Digests of weights are kept in the user's cache; huggingface's own stays where it is.
os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dllmexp-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A shell starts background jobs with SIGINT ignored, which the tests' processes would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from mini import DREAM, LLADA, ROOT  # noqa: E402

from models import fingerprint  # noqa: E402

torch.set_num_threads(1)
for known in ("assets/tiny-llada", "assets/tiny-dream", "assets/tiny-qwen", LLADA, DREAM):
    fingerprint(ROOT / known)  # a plan hashes nothing; it has their ids from here


@pytest.fixture(scope="session")
def conformance_dir() -> Path:
    """The conformance set: tests/conformance, or DLLMEXP_CONFORMANCE_DIR."""
    return Path(os.environ.get("DLLMEXP_CONFORMANCE_DIR") or ROOT / "tests" / "conformance")


@pytest.fixture(scope="session")
def benchmarks() -> Path:
    """The directory of the benchmarks' original files; without it the test is skipped.

    DLLMEXP_DATA_DIR names it; the default is shared/benchmarks next to the repository.
    """
    folder = Path(os.environ.get("DLLMEXP_DATA_DIR") or ROOT.parent / "shared" / "benchmarks")
    if not (folder / "mbpp.jsonl").is_file():
        pytest.skip(
            f"the benchmarks' original files are not in {folder}; "
            "set DLLMEXP_DATA_DIR to their directory"
        )
    return folder


@pytest.fixture(autouse=True)
def sandbox_as_before():
    """What --no_exec and --unsafe_exec of a test say holds for the rest of a process."""
    import sandbox

    before = sandbox._accepted, sandbox._executes
    yield
    sandbox._accepted, sandbox._executes = before


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the program; (exit code, stdout, stderr). The environment names no data directory."""
    import eval as cli

    monkeypatch.delenv("DLLMEXP_DATA_DIR", raising=False)

    def call(arguments: str, *more: str):
        code = cli.main([*shlex.split(arguments), *map(str, more)])
        return code, *capsys.readouterr()

    return call


def _copy(source: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(source, tmp_path / source.name, copy_function=shutil.copyfile))
    folder.chmod(0o755)  # the source may be read-only
    return folder


@pytest.fixture
def llada(conformance_dir, tmp_path) -> Path:
    """A copy of llada-tiny that a test may change."""
    return _copy(conformance_dir / "llada-tiny", tmp_path)


@pytest.fixture
def dream(conformance_dir, tmp_path) -> Path:
    """A copy of dream-tiny that a test may change."""
    return _copy(conformance_dir / "dream-tiny", tmp_path)


@pytest.fixture(params=["llada", "dream"])
def either(request) -> Path:
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)
