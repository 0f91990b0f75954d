"""What several test files share: the tiny checkpoints, a tiny benchmark, random prompts."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LLADA = ROOT / "tests" / "conformance" / "llada-tiny"
DREAM = ROOT / "tests" / "conformance" / "dream-tiny"
# One algorithm of each family and of each kind: fixed schedule, threshold, observer, verifier. The
# others differ from these in their choice alone.
KINDS = ("low_confidence", "maskgit_plus", "threshold", "klass", "apd")


def prompts_for(n: int, vocabulary: int = 400) -> list[list[int]]:
    """n prompts of 1 to 39 random tokens, the same ones in every call."""
    rng = np.random.default_rng(7)
    return [rng.integers(5, vocabulary, size=int(rng.integers(1, 40))).tolist() for _ in range(n)]


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
    counts = {"gsm8k/test.jsonl": n, "gsm8k/train.jsonl": n}
    manifest = json.dumps({"name": "mini", "counts": counts})
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    return folder


def winogrande_dir(folder: Path, n: int = 2) -> Path:
    """A data directory with n sentences of its own in WinoGrande's format."""
    rows = [
        {
            "sentence": f"Ann gave Bea {i + 2} apples because _ was hungry.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "2",
        }
        for i in range(n)
    ]
    folder.mkdir(parents=True)
    write_lines(folder / "winogrande.jsonl", rows)
    manifest = json.dumps({"name": "mini", "counts": {"winogrande.jsonl": n}})
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    return folder


def write_lines(path: Path, rows: list) -> Path:
    """Write one row per line. A row that is a string is written as it is, others as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def forked(call: Callable[[], int | None], log: Path) -> multiprocessing.Process:
    """Start call() in a copy of this process, where torch and lm-eval are imported already.

    What it prints is in `log`, what it returns is its exit code.
    """

    def child() -> None:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.exit(call())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def run_forked(commands: list[list], log: Path) -> str:
    """Run eval.py with each of the commands, from the root; what they print.

    The plugins of a command stay in that process.
    """
    import eval as cli

    def call() -> int:
        os.chdir(ROOT)
        return max(cli.main([*map(str, words)]) for words in commands)

    process = forked(call, log)
    process.join()
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    return printed
