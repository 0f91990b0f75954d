#!/usr/bin/env python3
"""Kill an experiment at random moments, resume it, compare it with an uninterrupted run.

    python dev/kill_test.py --kills 100

The experiment runs offline on the CPU, on the tests' tiny checkpoint and on word problems that
this script makes. SIGKILL falls at a random moment after the start of the process or, every second
time on average, while samples are being written. The last start runs to the end. Then the script
prints the number of kills, of generated samples, of samples that the store had and lost, and of
bytes that differ between the two results. Times, hosts and versions are not compared. The exit
code is 1 if a sample is lost or a byte differs.
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

START_S = 6.0  # approximate time from the start of a process to its first sample


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
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "gsm8k" / f"{name}.jsonl").write_text(lines)
    counts = {f"gsm8k/{name}.jsonl": n for name in ("test", "train")}
    (folder / "manifest.json").write_text(json.dumps({"name": "kill_test", "counts": counts}))
    return folder


class Experiment:
    """One experiment in a directory of its own."""

    def __init__(self, data: Path, out: Path, checkpoint: Path, batch_sizes: list[int], seed: int):
        self.data, self.out, self.checkpoint = data, out, checkpoint
        self.batch_sizes, self.rng = batch_sizes, random.Random(seed)
        self.log = out.with_suffix(".log")  # stderr of the last process

    def start(self) -> subprocess.Popen:
        """Start a process that begins or resumes the experiment, with a random batch size."""
        options = (
            "--model_alias llada --task gsm8k --gen_length 64 --temperature 0.7 --dtype float32"
        )
        command = [sys.executable, str(ROOT / "eval.py"), *options.split(), "--device", "cpu"]
        command += ["--llada_ckpt", str(self.checkpoint), "--data_dir", str(self.data)]
        command += ["--output_dir", str(self.out)]
        command += ["--batch_size", str(self.rng.choice(self.batch_sizes))]
        quiet = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(command, env=environment, stderr=log, **quiet)

    def written(self) -> int:
        """Total size of the shards in bytes."""
        return sum(path.stat().st_size for path in self.out.glob("cache/*/shard-*"))

    def kept(self) -> tuple[set[str], int]:
        """Keys of the samples in the store, and the number of whole records in its shards."""
        for config in self.out.glob("cache/*/config.json"):
            found = json.loads(config.read_text())
            identity = {k: v for k, v in found.items() if k not in ("config_id", "store_version")}
            with Store.open(self.out / "cache", identity, found["config_id"]) as store:
                return set(store), store.report.loaded
        return set(), 0

    def result(self) -> dict | None:
        return next((json.loads(path.read_text()) for path in self.out.glob("*.json")), None)

    def kill_once(self) -> bool:
        """Start the experiment and SIGKILL it at a random moment. False if it ended before."""
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
    """Number of bytes that differ between two results, without `profile` and `meta`."""
    x, y = (
        canonical_json({k: v for k, v in r.items() if k not in ("profile", "meta")}).encode()
        for r in (a, b)
    )
    return sum(p != q for p, q in zip(x, y)) + abs(len(x) - len(y))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=100, help="number of kills (default 100)")
    add("--samples", type=int, help="number of documents (default 8 per kill, at least 400)")
    add("--checkpoint", type=Path, default=ROOT / "tests" / "conformance" / "llada-tiny")
    add("--seed", type=int, default=0, help="seed of the moments and batch sizes (default 0)")
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
        print(whole.log.read_text(), "error: the uninterrupted run failed", sep="", file=sys.stderr)
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
        progress = f"\rkill {kills}/{args.kills}: {len(kept)} of {args.samples} samples kept"
        print(progress, end="", flush=True)
    print()
    killed.start().wait()
    now, records = killed.kept()
    lost += len(kept - now)
    differ = differing_bytes(whole.result(), killed.result())
    print(
        f"kills {kills}, samples generated {records} for {args.samples}, lost {lost}, "
        f"differing bytes {differ}"
    )
    if kills < args.kills:
        print(f"the experiment was complete after {kills} kills; give more --samples")
    return 1 if lost or differ else 0


if __name__ == "__main__":
    sys.exit(main())
