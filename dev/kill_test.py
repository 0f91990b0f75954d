#!/usr/bin/env python3
"""Kill an experiment with SIGKILL at random moments, resume it until it is done, compare with an uninterrupted run.

    python dev/kill_test.py --kills 100

Runs on the tiny checkpoint of the tests and on word problems of its own, offline, on the CPU. Every second kill falls
anywhere from the start of the process on, the others while samples are being written. Printed at the end: kills,
samples generated in all, samples that were kept once and gone later, bytes of the result that differ (times, hosts and
versions, which the result keeps apart, aside). The last two must be 0; the exit code is 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.store import Store  # noqa: E402
from utils import canonical_json  # noqa: E402

START_S = 6.0  # what a process needs to its first sample, about


def write_problems(folder: Path, n: int) -> Path:
    """A data directory with n word problems in GSM8K's format."""
    (folder / "gsm8k").mkdir(parents=True)
    rows = [
        {
            "question": f"Ann has {i} stamps and buys {i % 7 + 2} more. How many?",
            "answer": f"Adds up.\n#### {i + i % 7 + 2}",
        }
        for i in range(n)
    ]
    for name in ("test", "train"):
        (folder / "gsm8k" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    counts = {f"gsm8k/{name}.jsonl": n for name in ("test", "train")}
    (folder / "manifest.json").write_text(json.dumps({"name": "kill_test", "counts": counts}))
    return folder


class Experiment:
    """One experiment in a directory of its own."""

    def __init__(self, data: Path, out: Path, checkpoint: Path, batch_sizes: list[int], seed: int):
        self.data, self.out, self.checkpoint = data, out, checkpoint
        self.batch_sizes, self.rng = batch_sizes, random.Random(seed)

    def start(self) -> subprocess.Popen:
        """A process that runs or resumes it, each time with another batch size."""
        command = [
            sys.executable,
            str(ROOT / "eval.py"),
            "--model_alias",
            "llada",
            "--llada_ckpt",
            str(self.checkpoint),
            "--task",
            "gsm8k",
            "--data_dir",
            str(self.data),
            "--output_dir",
            str(self.out),
            "--gen_length",
            "64",
            "--temperature",
            "0.7",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--batch_size",
            str(self.rng.choice(self.batch_sizes)),
        ]
        quiet = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            "stdin": subprocess.DEVNULL,
        }
        return subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **quiet
        )

    def written(self) -> int:
        """Bytes in the shards."""
        return sum(path.stat().st_size for path in self.out.glob("cache/*/shard-*"))

    def kept(self) -> tuple[set[str], int]:
        """Keys of the samples that the store gives back, and how many whole records lie in its shards."""
        for config in self.out.glob("cache/*/config.json"):
            told = json.loads(config.read_text())
            identity = {k: v for k, v in told.items() if k not in ("config_id", "store_version")}
            with Store.open(self.out / "cache", identity, told["config_id"]) as store:
                return set(store), store.report.loaded
        return set(), 0

    def result(self) -> dict | None:
        return next((json.loads(path.read_text()) for path in self.out.glob("*.json")), None)

    def kill_once(self) -> bool:
        """Start, wait for a random moment, SIGKILL; False where the run was done before."""
        process, before = self.start(), self.written()
        if self.rng.random() < 0.5:
            moment = time.monotonic() + self.rng.uniform(0, START_S)
        else:
            while process.poll() is None and self.written() <= before:
                time.sleep(0.01)
            moment = time.monotonic() + self.rng.uniform(0, 0.5)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.002)
        done = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        return not done


def differing_bytes(a: dict, b: dict) -> int:
    """Bytes that differ between two results, without the parts that depend on the day."""
    x, y = (
        canonical_json({k: v for k, v in r.items() if k not in ("profile", "meta")}).encode()
        for r in (a, b)
    )
    return sum(p != q for p, q in zip(x, y)) + abs(len(x) - len(y))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="default 100")
    parser.add_argument(
        "--samples",
        type=int,
        help="documents of the experiment (default 8 for each kill, 400 at least)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "tests" / "conformance" / "llada-tiny"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and batch sizes (default 0)"
    )
    args = parser.parse_args(argv)
    if args.samples is None:
        args.samples = max(400, 8 * args.kills)
    if args.kills < 1 or args.samples < 1:
        parser.error("--kills and --samples must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, Path(folder))


def _run(args: argparse.Namespace, folder: Path) -> int:
    data = write_problems(folder / "data", args.samples)
    whole = Experiment(data, folder / "whole", args.checkpoint, [4], args.seed)
    if whole.start().wait() != 0:
        print(
            "error: the uninterrupted run failed; run the command of this script's source by hand",
            file=sys.stderr,
        )
        return 4
    killed = Experiment(data, folder / "killed", args.checkpoint, [1, 2, 3, 8], args.seed)
    kills = lost = 0
    kept: set[str] = set()
    while kills < args.kills and killed.kill_once():
        kills += 1
        now, _ = killed.kept()
        lost += len(kept - now)
        kept |= now
        partial = killed.result()
        assert partial is None or partial["status"] == "complete", "a partial result looks final"
        print(
            f"\rkill {kills}/{args.kills}: {len(kept)} of {args.samples} samples kept",
            end="",
            flush=True,
        )
    print()
    killed.start().wait()
    now, records = killed.kept()
    lost += len(kept - now)
    differ = differing_bytes(whole.result(), killed.result())
    print(
        f"kills {kills}, samples generated {records} for {args.samples}, lost {lost}, differing bytes {differ}"
    )
    if kills < args.kills:
        print(f"the run was done after {kills} kills; more --samples make it last longer")
    return 1 if lost or differ else 0


if __name__ == "__main__":
    sys.exit(main())
