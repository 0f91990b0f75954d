"""What the command line's tests share: tiny checkpoints, a tiny benchmark, the real one where it is."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LLADA, DREAM = (
    ROOT / "tests" / "conformance" / "llada-tiny",
    ROOT / "tests" / "conformance" / "dream-tiny",
)
REAL = Path(os.environ.get("DLLMEXP_DATA_DIR") or ROOT.parent / "shared" / "benchmarks")

real_data = pytest.mark.skipif(
    not (REAL / "mbpp.jsonl").is_file(),
    reason=f"the benchmarks' original files are not in {REAL}; DLLMEXP_DATA_DIR names them",
)


def gsm8k_dir(folder: Path, n: int = 3) -> Path:
    """A data directory with n word problems of its own, declared by a manifest."""
    rows = [
        {
            "question": f"Tom has {i} apples and buys 2. How many?",
            "answer": f"{i} + 2\n#### {i + 2}",
        }
        for i in range(n)
    ]
    (folder / "gsm8k").mkdir(parents=True)
    for name in ("test", "train"):
        write_lines(folder / "gsm8k" / f"{name}.jsonl", rows)
    (folder / "manifest.json").write_text(
        json.dumps({"name": "mini", "counts": {"gsm8k/test.jsonl": n, "gsm8k/train.jsonl": n}}),
        encoding="utf-8",
    )
    return folder


def write_lines(path: Path, rows: list) -> Path:
    """One row per line; what is text already is written as it is."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path
