"""The identity of an experiment's inputs, without fetching or hashing anything.

A run, a plan and progress use the same function. Digests of weights and of the hub's rows are
computed by the run (see checks.py) and kept in the user's cache; until then an id is not known.
"""

from __future__ import annotations

import atexit
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import TaskSpec, data_checksums
from tasks.data import Data
from tasks.installed import definition_of
from utils import file_sha256, sha256

if TYPE_CHECKING:
    from collections.abc import Iterable

    from experiment.resolve import Job
    from experiment.workers import WorkerInfo

# what was found, until forget()
_weights: dict[str, dict[str, Any]] = {}
_files: dict[tuple[str, Path], dict[str, str]] = {}


def weights(checkpoint: str) -> dict[str, Any] | None:
    """Fingerprint of a checkpoint, None where it is not known.

    Of a directory its files, once its weights have been hashed; of a hub id its cached commit.
    """
    from models import CheckpointError, cached_revision, fingerprint

    if checkpoint not in _weights:
        found = None
        with suppress(CheckpointError, OSError, ValueError):
            if Path(checkpoint).expanduser().is_dir():
                found = fingerprint(checkpoint, hashing=False)
            elif revision := cached_revision(checkpoint):
                found = {"revision": revision}
        if found is None:
            return None
        _weights[checkpoint] = found
    return _weights[checkpoint]


def prepare(jobs: Iterable[Job]) -> None:
    """Find the identity of the inputs of several jobs, so that all processes have the same.

    Weights are hashed, and a hub id is looked up, once: the commit holds for this process and for
    those that it starts. What cannot be read is left to the run, which reports it.
    """
    from models import CheckpointError, fingerprint
    from models.hub import parquet_files

    for name in _checkpoints(jobs := list(jobs)):
        with suppress(CheckpointError, OSError):
            fingerprint(name)
    for spec in _hub_data(jobs):
        with suppress(CheckpointError):
            parquet_files(*spec.hub)
    forget()


def agree(path: Path, jobs: Iterable[Job]) -> None:
    """Let the jobs have the same commits of the hub in all processes with the same `path`.

    The first of them writes `path`. One that cannot look its commits up, or cannot write, goes on
    alone, and reports that later.
    """
    from models import CheckpointError, hub

    jobs = list(jobs)
    names = [name for name in _checkpoints(jobs) if hub.hub_id(name) and not Path(name).is_dir()]
    specs = _hub_data(jobs)

    def find() -> None:
        for name in names:
            hub.resolve(name, weights=False)
        for spec in specs:
            hub.parquet_files(*spec.hub)

    if names or specs:
        with suppress(CheckpointError, OSError):
            hub.agree(path, find)


def agree_ranks(job: Job, worker: WorkerInfo) -> None:
    """Let the processes that a launcher has started use the same commits of the hub."""
    if worker.size > 1 and worker.parent is None:  # the leader's own have its environment
        path = job.output_dir / "cache" / f"commits-{worker.launch}.json"
        if worker.leads:
            atexit.register(path.unlink, missing_ok=True)
        agree(path, [job])


def _checkpoints(jobs: Iterable[Job]) -> list[str]:
    configs = [job.config for job in jobs if job.predictions is None]
    names = (name for config in configs for name in (config.checkpoint, config.verifier) if name)
    return list(dict.fromkeys(names))


def _hub_data(jobs: Iterable[Job]) -> list[TaskSpec]:
    """The benchmarks whose rows come from a data set of the hub."""
    specs = {job.spec.name: job.spec for job in jobs if job.data_dir is None}
    return [spec for spec in specs.values() if spec.hub and not spec.foreign]


def data_identity(spec: TaskSpec, data_dir: Path | None) -> dict[str, str]:
    """sha256 of each benchmark file; of a data set of the hub its name, and its rows if known."""
    from models.digests import kept

    if data_dir is not None and not spec.foreign:
        return data_checksums(spec, data_dir)
    name = "/".join(filter(None, spec.hub or ()))
    rows = kept([_rows_key(name)]).get(_rows_key(name))
    return {"hub": name, "rows": rows} if rows else {"hub": name}


def rows_identity(spec: TaskSpec, data: Data) -> dict[str, str]:
    """`data_identity` of a data set of the hub that has been loaded; the digest is kept.

    All splits count: worked examples come from other ones than the documents. The rows of a task of
    lm-eval's own go with its definition, which scores them.
    """
    from models.digests import keep

    content = [data.splits, definition_of(spec.name)] if spec.foreign else data.splits
    name, digest = "/".join(filter(None, spec.hub or ())), sha256(content)
    keep(_rows_key(name), digest)
    return {"hub": name, "rows": digest}


def _rows_key(name: str) -> str:
    return f"rows of {name}"


def identified(job: Job) -> Job:
    """The job with the identity of its inputs, as far as they are on this machine."""
    config, spec = job.config, job.spec
    if job.predictions is None:
        config = replace(config, fingerprint=weights(config.checkpoint))
    else:
        with suppress(OSError):
            config = replace(config, predictions=file_sha256(job.predictions))
    if config.verifier is not None:
        config = replace(config, verifier_fingerprint=weights(config.verifier))
    if job.data_dir is None or spec.foreign:
        config = replace(config, data=data_identity(spec, None))
    elif job.data_dir.is_dir():
        with suppress(OSError):
            key = spec.name, job.data_dir
            if key not in _files:
                _files[key] = data_identity(spec, job.data_dir)
            config = replace(config, data=_files[key])
    return replace(job, config=config)


def is_known(job: Job) -> bool:
    """Whether everything that the result id covers is known."""
    data = job.config.data or {}
    return _is_generation_known(job) and not ("hub" in data and "rows" not in data)


def _is_generation_known(job: Job) -> bool:
    """Whether everything that the generation id covers is known."""
    config = job.config
    if config.data is None:
        return False
    if job.predictions is not None:
        return config.predictions is not None
    verified = config.verifier is None or config.verifier_fingerprint is not None
    return config.fingerprint is not None and verified


def known_ids(job: Job) -> tuple[str, str | None] | None:
    """The generation id, under which samples are kept, and the result id.

    The result id is None while the rows of the hub's data set are not known; None is returned
    while another input is not known.
    """
    found = identified(job)
    if not _is_generation_known(found):
        return None
    return found.config.generation_id, found.config.result_id if is_known(found) else None


def forget() -> None:
    """Look again: an input may have arrived or changed."""
    _weights.clear()
    _files.clear()
