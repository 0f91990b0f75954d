"""What a run is about to do: all of it for --dry_run, the first lines of a run in short."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from experiment.identity import is_known
from experiment.resolve import Job
from experiment.result import published, reference_of
from tasks.data import name_of_data
from utils import BadDataError, numbered

if TYPE_CHECKING:
    from decoding.schedule import Schedule

# checksums: the result has them, a terminal has no room
INPUTS = ("fingerprint", "verifier_fingerprint", "data")
ID_DIGITS = 16  # of the 64 of an id; the directory of the samples has as many
NOTES = 2  # lines of notes before a run, which with its other lines are at most ten


def describe(job: Job) -> str:
    """The configuration, the schedule and the path of the result, as --dry_run prints them."""
    config, schedule = job.config, job.schedule
    settings = {k: v for k, v in config.as_dict().items() if k not in INPUTS}
    settings |= {k: _short(settings[k]) for k in ("plugins", "harness") if k in settings}
    set_to = {key: value for key, value in settings.items() if value is not None}
    lines = ["config:", *(f"  {key:24}{value}" for key, value in set_to.items())]
    lines.append(f"  {'id':24}{_short_id(job)}")
    if is_known(job) and schedule is not None:
        lines.append(f"  {'generation_id':24}{config.generation_id[:ID_DIGITS]}")
    if schedule is not None:
        lines.append(f"schedule: {_steps(schedule)}")
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


def summary(job: Job, device: str) -> str:
    """The lines that a run prints first: at most seven, and no setting at its protocol's value."""
    config, schedule = job.config, job.schedule
    model = f"{config.model_alias} ({config.checkpoint}, {config.dtype}) on {device}"
    if job.predictions is not None:
        model = f"{config.model_alias}, its texts are those of {job.predictions}"
    elif not (job.device or job.devices):
        model += " (default; --device chooses another)"
    form = f"{config.protocol} protocol, {config.prompt_form} form, {config.num_fewshot}-shot"
    limit = "" if job.limit is None else f", limit {job.limit}"
    lines = [f"model: {model}", f"task: {config.task} ({form}){limit}"]
    if departs := [
        f"{name} {_plain(o['run'])} (protocol: {_plain(o['protocol'])})"
        for name, o in job.overrides.items()
    ]:
        lines.append(f"override: {', '.join(departs)}")
    if schedule is not None:
        named = "" if schedule.adaptive else f"{schedule.algorithm}, "
        lines.append(f"schedule: {named}{_steps(schedule)}")
    if config.likelihood is not None:
        set_to = vars(config.likelihood) | {"estimator": None}
        listed = (f", {name} {value}" for name, value in set_to.items() if value)
        lines.append(f"likelihood: {config.likelihood.estimator}{''.join(listed)}")
    notes = [*job.notes[: NOTES - 1], "; ".join(job.notes[NOTES - 1 :])]
    lines += [f"note: {note}" for note in notes if note]
    return "\n".join([*lines, f"output: {job.path} (id {_short_id(job)})"])


def _short_id(job: Job) -> str:
    if is_known(job):
        return job.config.result_id[:ID_DIGITS]
    return "unknown until the first run has read the inputs"


def _steps(schedule: Schedule) -> str:
    blocks = f"{numbered(schedule.n_blocks, 'block')} of {schedule.block_length}"
    if schedule.last_length < schedule.block_length:
        blocks += f", the last one of {schedule.last_length}"
    tps = f"{schedule.realised_tps:g} tokens per step"
    text = f"{schedule.num_steps} steps in {blocks}, {tps} realised"
    if schedule.adaptive:
        text = f"{schedule.algorithm} decides, in {blocks}: at least {tps}"
    return f"{text}, at most {schedule.forward_passes} forward passes"


def _short(found: Any) -> str:
    """Plugins or a harness: their names, and the first digits of their checksums."""
    listed = [found] if isinstance(found, dict) else found
    return ", ".join(f"{f.get('path') or f.get('name')} ({f['sha256'][:8]})" for f in listed)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
