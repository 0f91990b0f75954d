"""What a suite needs before it runs: checkpoints, data, memory, disk, time; from files only.

Every number is read, calculated from the checkpoint's configuration, or measured on samples that
are there; what cannot be known yet is said to be unknown.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

from suite.matrix import Experiment
from suite.state import Status
from suite.table import Estimator, duration
from tasks import check_data
from utils import numbered, output_problem

BYTES = ("KB", "MB", "GB")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Rows = Sequence[tuple[Experiment, Status]]


def preflight(rows: Rows, out: Path) -> list[str]:
    """Lines for `plan`; none where everything is done."""
    left = [(e, s) for e, s in rows if s.state != "done"]
    if not left:
        return []
    models: dict[tuple[str, str], list[Experiment]] = {}
    for experiment, status in left:
        config = experiment.job.config
        if experiment.model and status.n != status.of:
            models.setdefault((config.checkpoint, config.dtype), []).append(experiment)
            if config.verifier:
                models.setdefault((config.verifier, config.dtype), []).append(experiment)
    lines = [line for key, users in models.items() for line in _checkpoint(*key, users)]
    data = dict.fromkeys((e.job.spec.name, e.job.data_dir) for e, _ in left)
    specs = {e.job.spec.name: e.job.spec for e, _ in left}
    lines += [f"data of {name}: {p}" for name, at in data for p in check_data(specs[name], at)]
    return [*lines, _disk(rows, out), _time(rows)]


def short(n: float, units: Sequence[str]) -> str:
    """`16.1 GB`."""
    power = next((i for i in (3, 2) if n >= 1000**i), 1)
    return f"{n / 1000**power:.3g} {units[power - 1]}"


def _checkpoint(name: str, dtype: str, users: Sequence[Experiment]) -> list[str]:
    """Where a checkpoint is, and the memory that it takes; or the reason why it cannot run."""
    from decoding.algorithms import ALGORITHMS
    from models import CheckpointError, check_checkpoint
    from models.cost import row_bytes
    from models.files import config_in, parameter_shapes, shard_paths
    from models.hub import hub_id, offline

    folder = folder_of(name)
    if folder is None and (hub_id(name) is None or offline()):
        why = "not here, and HF_HUB_OFFLINE=1" if hub_id(name) else "does not exist"
        return [f"checkpoint {name}: ABSENT, {why}"]
    if folder is None:
        return [f"checkpoint {name}: not here; the first run downloads it. Its size is unknown yet"]
    try:
        size = sum(path.stat().st_size for path in shard_paths(folder))
        where = f"here, {short(size, BYTES)}"
    except CheckpointError as error:
        if Path(name).is_dir() or offline():
            return [f"checkpoint {name}: INCOMPLETE, {error}"]
        where = "weights not here; the first run downloads them"
    try:
        config = config_in(folder)
    except CheckpointError as error:
        return [f"checkpoint {name}: {error}"]
    if Path(name).is_dir() and (problems := check_checkpoint(name)):
        return [f"checkpoint {name}: {problem}" for problem in problems]
    n, itemsize = sum(map(prod, parameter_shapes(config).values())), ITEMSIZE[dtype]
    each = max(
        row_bytes(
            config,
            s.gen_length,
            s.block_length,
            itemsize,
            kv != "none",
            ALGORITHMS[s.algorithm].observe is not None,
        )
        for s, kv in ((e.job.schedule, e.job.config.decode.kv_cache) for e in users)
    )
    return [
        f"checkpoint {name}: {where}; memory (estimated): weights "
        f"{short(n * itemsize, BYTES)} in {dtype}, plus {short(each, BYTES)} per sample, plus "
        "its prompt"
    ]


def folder_of(name: str) -> Path | None:
    """The directory of a checkpoint: itself, or its snapshot in the hub's cache."""
    from huggingface_hub import constants

    from models.hub import cached_revision, hub_id

    if (path := Path(name).expanduser()).is_dir():
        return path
    if commit := cached_revision(name):
        repo = hub_id(name).repo.replace("/", "--")
        return Path(constants.HF_HUB_CACHE, f"models--{repo}", "snapshots", commit)
    return None


def _disk(rows: Rows, out: Path) -> str:
    """Samples and results of what is left, by those that are there, and the free space."""
    size = positions = left = 0
    for experiment, status in rows:
        if experiment.job.schedule is None:
            continue
        length = experiment.job.schedule.gen_length
        left += max(0, (status.of or 0) - status.n) * length
        if status.n and experiment.store:
            shards = experiment.store.glob("shard-*")
            with suppress(OSError):
                size += sum(path.stat().st_size for path in shards)
                if status.state == "done":
                    size += experiment.path.stat().st_size
                positions += status.n * length
    existing = next(p for p in [out.resolve(), *out.resolve().parents] if p.exists())
    if problem := output_problem(existing):
        return f"disk: {problem}"
    free = f"{short(shutil.disk_usage(existing).free, BYTES)} free in {out}"
    if not positions:
        return f"disk: {free}; the size of the samples is known after the first ones"
    more = short(left * size / positions, BYTES)
    return f"disk: samples and results take about {more} more; {free}"


def _time(rows: Rows) -> str:
    """Forward passes that the schedules have left at most, and the hours of a device for them."""
    left = [(e, s) for e, s in rows if s.state not in ("done", "failed")]
    known = [max(0, s.of - s.n) * e.forward_passes for e, s in left if s.of is not None]
    parts = [f"at most {sum(known):,} forward passes"] if known else []
    if unknown := len(left) - len(known):
        parts.append(f"unknown for {numbered(unknown, 'experiment')}")
    if failed := sum(s.state == "failed" for _, s in rows):
        parts.append(f"without {failed} failed")
    text = f"time: {', '.join(parts)}"
    estimator = Estimator(rows)
    seconds = [estimator.left_s(e, s) for e, s in rows]
    measured = sum(s.n for _, s in rows if s.sums.seconds)
    if None in seconds:
        return f"{text}; the hours are unknown until an experiment has run"
    return f"{text}; about {duration(sum(seconds))} of one device, by {measured:,} samples so far"
