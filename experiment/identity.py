"""The identity of an experiment's inputs, without fetching or hashing anything.

A run, a plan and progress use the same function. Digests of weights and of the hub's rows are
computed by the run (see checks.py) and kept in the user's cache; until then an id is not known.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import TaskSpec, data_checksums
from tasks.data import Data
from utils import sha256

if TYPE_CHECKING:
    from collections.abc import Iterable

    from experiment.resolve import Job

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
    """Find the identity of the checkpoints of several jobs, so that all processes have the same.

    Weights are hashed, and a hub id is looked up, once: the commit holds for this process and for
    those that it starts. A checkpoint that cannot be read is left to the run, which reports it.
    """
    from models import CheckpointError, fingerprint

    configs = [job.config for job in jobs if job.predictions is None]
    names = [name for config in configs for name in (config.checkpoint, config.verifier) if name]
    for name in dict.fromkeys(names):
        with suppress(CheckpointError, OSError):
            fingerprint(name)
    forget()


def data_identity(spec: TaskSpec, data_dir: Path | None) -> dict[str, str]:
    """sha256 of each benchmark file; of a data set of the hub its name, and its rows if known."""
    from models.digests import kept

    if data_dir is not None and not spec.foreign:
        return data_checksums(spec, data_dir)
    name = "/".join(filter(None, spec.hub or ()))
    rows = kept([_rows_key(name)]).get(_rows_key(name))
    return {"hub": name, "rows": rows} if rows and not spec.foreign else {"hub": name}


def rows_identity(spec: TaskSpec, data: Data) -> dict[str, str]:
    """`data_identity` of a data set of the hub that has been loaded; the digest is kept."""
    from models.digests import keep

    name, digest = "/".join(filter(None, spec.hub or ())), sha256(data.splits[spec.eval_split])
    keep(_rows_key(name), digest)
    return {"hub": name, "rows": digest}


def _rows_key(name: str) -> str:
    return f"rows of {name}"


def identified(job: Job) -> Job:
    """The job with the identity of its inputs, as far as they are on this machine."""
    config, spec = job.config, job.spec
    if job.predictions is None:
        config = replace(config, fingerprint=weights(config.checkpoint))
    elif job.predictions.is_file():
        config = replace(
            config, predictions=hashlib.sha256(job.predictions.read_bytes()).hexdigest()
        )
    if config.verifier is not None:
        config = replace(config, verifier_fingerprint=weights(config.verifier))
    if job.data_dir is None:
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
    lacks_rows = "hub" in data and "rows" not in data and not job.spec.foreign
    return _is_generation_known(job) and not lacks_rows


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
