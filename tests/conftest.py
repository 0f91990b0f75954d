"""Tests run offline, on the CPU, one thread, with the repository root on the path."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def conformance_dir() -> Path:
    """The conformance set: tests/conformance, or the directory that DLLMEXP_CONFORMANCE_DIR names."""
    return Path(os.environ.get("DLLMEXP_CONFORMANCE_DIR") or ROOT / "tests" / "conformance")
