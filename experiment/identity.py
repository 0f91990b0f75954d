"""What identifies the inputs of an experiment, found without fetching anything: one function for a run, a plan, progress."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import TaskSpec, data_checksums

if TYPE_CHECKING:
    from experiment.resolve import Job


_data: dict[tuple[str, Path | None], dict[str, str]] = {}  # kept, as weights() is, until forget()


@lru_cache
def weights(checkpoint: str) -> dict[str, Any] | None:
    """Fingerprint of a checkpoint: of a directory its files, of a hub id its cached commit; None where it is not here."""
    from models import CheckpointError, cached_revision, fingerprint

    with suppress(CheckpointError, OSError, ValueError):
        if Path(checkpoint).expanduser().is_dir():
            return fingerprint(checkpoint)
        revision = cached_revision(checkpoint)
        return None if revision is None else {"revision": revision}
    return None


def data_identity(spec: TaskSpec, data_dir: Path | None) -> dict[str, str]:
    """sha256 of each benchmark file, or the hub's data set."""
    return data_checksums(spec, data_dir) or {"hub": "/".join(filter(None, spec.hub or ()))}


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
    if job.data_dir is None or job.data_dir.is_dir():
        with suppress(OSError):
            key = spec.name, job.data_dir
            if key not in _data:
                _data[key] = data_identity(spec, job.data_dir)
            config = replace(config, data=_data[key])
    return replace(job, config=config)


def is_known(job: Job) -> bool:
    """Whether everything that the id covers is known."""
    config = job.config
    if config.data is None:
        return False
    if job.predictions is not None:
        return config.predictions is not None
    verified = config.verifier is None or config.verifier_fingerprint is not None
    return config.fingerprint is not None and verified


def known_ids(job: Job) -> tuple[str, str] | None:
    """The generation id, under which samples are kept, and the result id; None while an input is not on this machine."""
    found = identified(job)
    return (found.config.generation_id, found.config.result_id) if is_known(found) else None


def forget() -> None:
    """Look again: a checkpoint may have arrived."""
    weights.cache_clear()
    _data.clear()
