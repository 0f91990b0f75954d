"""What a run is about to do, as --dry_run and a run's first lines say it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from experiment.identity import is_known
from experiment.resolve import Job
from experiment.result import published, reference_of
from tasks.data import name_of_data
from utils import BadDataError, numbered

# checksums: the result has them, a terminal has no room
INPUTS = ("fingerprint", "verifier_fingerprint", "data")
ID_DIGITS = 16  # of the 64 of an id; the directory of the samples has as many


def describe(job: Job) -> str:
    """The configuration, the schedule and the path of the result, as --dry_run prints them."""
    config, schedule = job.config, job.schedule
    settings = {k: v for k, v in config.as_dict().items() if k not in INPUTS}
    settings |= {k: _short(settings[k]) for k in ("plugins", "harness") if k in settings}
    set_to = {key: value for key, value in settings.items() if value is not None}
    lines = ["config:", *(f"  {key:24}{value}" for key, value in set_to.items())]
    known = (
        config.result_id[:ID_DIGITS]
        if is_known(job)
        else "unknown until the first run has read the inputs"
    )
    lines.append(f"  {'id':24}{known}")
    if is_known(job) and schedule is not None:
        lines.append(f"  {'generation_id':24}{config.generation_id[:ID_DIGITS]}")
    if schedule is not None:
        blocks = f"{numbered(schedule.n_blocks, 'block')} of {schedule.block_length}"
        if schedule.last_length < schedule.block_length:
            blocks += f", the last one of {schedule.last_length}"
        tps = f"{schedule.realised_tps:g} tokens per step"
        text = f"{schedule.num_steps} steps in {blocks}, {tps} realised"
        if schedule.adaptive:
            text = f"{schedule.algorithm} decides, in {blocks}: at least {tps}"
        lines.append(f"schedule: {text}, at most {schedule.forward_passes} forward passes")
    lines += [
        f"override: {name} {_plain(o['run'])} (protocol {config.protocol}: {o['protocol']})"
        for name, o in job.overrides.items()
    ]
    lines += [f"note: {note}" for note in job.notes]
    if config.protocol != "uniform":
        name = None
        with suppress(OSError, BadDataError):
            name = name_of_data(job.spec, job.data_dir)
        whole = job.limit is None and job.predictions is None
        references = job.protocol.references
        reference, why = reference_of(references, job.overrides, whole=whole, data=name)
        lines.append(f"published: {published(reference) if reference else why}")
    return "\n".join([*lines, f"output: {job.path}"])


def _short(found: Any) -> str:
    """Plugins or a harness: their names, and the first digits of their checksums."""
    listed = [found] if isinstance(found, dict) else found
    return ", ".join(f"{f.get('path') or f.get('name')} ({f['sha256'][:8]})" for f in listed)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
