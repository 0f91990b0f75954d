"""Tests run offline, on the CPU, one thread, with the repository root on the path."""

import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # started in the background of a shell: what tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def conformance_dir() -> Path:
    """The conformance set: tests/conformance, or the directory that DLLMEXP_CONFORMANCE_DIR names."""
    return Path(os.environ.get("DLLMEXP_CONFORMANCE_DIR") or ROOT / "tests" / "conformance")


def _copy(source: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(source, tmp_path / source.name, copy_function=shutil.copyfile))
    folder.chmod(0o755)  # copied from the source, which may be read-only
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
