"""Checks of an experiment's inputs, before anything heavy is loaded; its device and its store."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import sandbox
from experiment.arguments import Models
from experiment.config import RunConfig
from experiment.identity import forget, identified, is_known, rows_identity
from experiment.predictions import read_predictions
from experiment.resolve import Job
from experiment.result import load_result
from experiment.sample import is_usable, samples_of
from experiment.sample_cache import ShareDone
from experiment.status import await_leader
from experiment.store import HOST, Store, folder
from experiment.workers import WorkerInfo
from tasks import Data, TaskSpec, check_data, load_data
from tasks.data import missing_extra
from utils import (
    BadDataError,
    DllmexpError,
    EnvironmentProblem,
    OutputError,
    UsageError,
    differing_keys,
    numbered,
    output_problem,
)

FITS = "and prompt and canvas must fit into them; give a shorter one"


def say(text: str) -> None:
    """Print a line for the person at the terminal; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def check_inputs(
    job: Job, checkpoint_flag: str
) -> tuple[Job, dict[int, str] | None, list[DllmexpError]]:
    """The job with the identity of its inputs, the predictions if any, and the errors."""
    errors: list[DllmexpError] = []
    notes, config, texts, spec = list(job.notes), job.config, None, job.spec
    n_docs, task_ids = spec.n_docs, []
    if sys.flags.optimize > 1:
        errors.append(
            EnvironmentProblem(
                "Python runs without docstrings (PYTHONOPTIMIZE=2 or -OO), which transformers "
                "needs; unset it"
            )
        )
    if missing := missing_extra(spec.extra):
        errors.append(EnvironmentProblem(missing))
    if problems := check_data(spec, job.data_dir):
        errors.append(BadDataError(problems))
    elif job.data_dir and not spec.foreign:
        data = load_data(spec, job.data_dir)
        n_docs = len(data.splits[spec.eval_split])
        task_ids = [row["task_id"] for row in data.splits[spec.eval_split] if "task_id" in row]
        if data.name == "modified":
            notes.append(
                f"{job.data_dir} has as many documents as the published files, but other content: "
                "no published score is shown"
            )
    if job.limit is not None and job.limit > n_docs and not spec.foreign:
        notes.append(f"limit {job.limit}: the benchmark has {n_docs} documents")
    if spec.kind == "code":
        errors += _sandbox_errors(job)
    elif job.no_exec or job.unsafe_exec or config.strict_exec:
        unused = "--no_exec, --unsafe_exec and --strict_exec have no effect"
        notes.append(f"this task runs no generated code: {unused}")
    if job.predictions is None:
        _check_checkpoints(config, checkpoint_flag, notes, errors)
    elif not problems:  # without good data the number of documents is not known
        try:
            texts = read_predictions(job.predictions, n_docs, job.limit, task_ids, notes, spec.name)
        except BadDataError as error:
            errors.append(error)
    if (job.data_dir is None or spec.foreign) and not errors:  # last: it may download
        try:
            rows_identity(spec, _hub_data(spec))  # identified() reads what it keeps
        except BadDataError as error:
            errors.append(error)
    forget()
    job = identified(replace(job, notes=tuple(notes)))
    if not errors and not is_known(job):
        errors.append(BadDataError("an input changed while it was checked; start again"))
    return job, texts, errors


def _hub_data(spec: TaskSpec) -> Data:
    if not spec.foreign:
        return load_data(spec, None)
    from experiment import lmeval

    with lmeval.quiet():
        return load_data(spec, None)


def _check_checkpoints(
    config: RunConfig, flag: str, notes: list[str], errors: list[DllmexpError]
) -> None:
    """Check model and verifier, and hash them."""
    from models import check_checkpoint, fingerprint, read_config

    canvas = config.decode.schedule.gen_length if config.decode is not None else 0
    if problems := check_checkpoint(config.checkpoint):
        errors.append(BadDataError(flagged(flag, config.checkpoint, problems)))
    else:
        stored = read_config(config.checkpoint)
        fingerprint(config.checkpoint)
        if stored.family != config.family:
            found = f"--{flag} {config.checkpoint} is of the {stored.family} family"
            wanted = f"--model_alias {config.model_alias} is of the {config.family} family"
            errors.append(UsageError(f"{found}, {wanted}; give an alias of its family"))
        if canvas > stored.max_length:
            room = f"the checkpoint has {stored.max_length} positions, {FITS}"
            errors.append(UsageError(f"--gen_length {canvas}: {room}"))
        if stored.dtype_on_disk not in (None, config.dtype):
            notes.append(f"the checkpoint is {stored.dtype_on_disk}, it runs in {config.dtype}")
    if config.verifier is not None:
        known = None if problems else config.checkpoint
        if problems := verifier_problems(config.verifier, known):
            errors.append(BadDataError(flagged("verifier_ckpt", config.verifier, problems)))
        else:
            fingerprint(config.verifier)
            room = read_config(config.verifier).max_length
            if canvas > room:
                which = f"the verifier {config.verifier} has {room} positions, {FITS}"
                errors.append(UsageError(f"--gen_length {canvas}: {which}"))


def flagged(flag: str, checkpoint: str, problems: Iterable[str]) -> list[str]:
    """The problems of a checkpoint behind its flag; it is named once in each."""
    return [f"--{flag}{'' if checkpoint in p else f' {checkpoint}'}: {p}" for p in problems]


def verifier_problems(verifier: str, checkpoint: str | None) -> list[str]:
    """Why a checkpoint cannot verify the drafts of another one.

    checkpoint: of the model that drafts; None: it is not looked at.
    """
    from models import check_checkpoint, read_config, tokenizer_disagreement

    if problems := check_checkpoint(verifier):
        return problems
    found = read_config(verifier)
    if not found.causal:
        wanted = "a verifier is autoregressive, such as Qwen/Qwen2.5-0.5B"
        return [f"{verifier} is of the {found.family} family; {wanted}"]
    return [] if checkpoint is None else tokenizer_disagreement(checkpoint, verifier)


def input_problems(
    args: Namespace, models: Models, tasks: Mapping[str, TaskSpec]
) -> list[DllmexpError]:
    """Problems of the files that a refused command line names, so that all are reported at once."""
    from models import check_checkpoint

    errors: list[DllmexpError] = []
    if args.task in tasks and args.data_dir:
        if problems := check_data(tasks[args.task], args.data_dir):
            errors.append(BadDataError(problems))
    flag = models[args.model_alias]["flag"] if args.model_alias in models else None
    if flag and getattr(args, flag) and not args.predictions:
        errors += [BadDataError(f"--{flag}: {p}") for p in check_checkpoint(getattr(args, flag))]
    if args.output_dir and (problem := output_problem(args.output_dir)):
        errors.append(OutputError(problem))
    return errors


def _sandbox_errors(job: Job) -> list[DllmexpError]:
    """Why generated code could not be run here, found before hours are spent on generating it."""
    try:
        sandbox.accept(job.unsafe_exec, execute=not job.no_exec)
        say(sandbox.announcement())
    except EnvironmentProblem as error:
        return [error]
    return []


def finished_result(job: Job) -> dict[str, Any] | None:
    """The finished result of this configuration where there is one, else None.

    A result of the same generation that was scored otherwise is not finished: the run scores its
    kept samples anew. Raises as `own_result`.
    """
    result, config = own_result(job), job.config
    if result is None:
        return None
    # a result that was judged strictly too is one that was judged
    if result["id"] in (config.result_id, replace(config, strict_exec=True).result_id):
        return result if result["status"] == "complete" else None
    say(f"{job.path} was scored in another way: its samples are scored anew")
    return None


def own_result(job: Job) -> dict[str, Any] | None:
    """The result at the job's path, None without one or with --overwrite.

    Raises UsageError if another configuration's result is there, and BadDataError if something else
    is.
    """
    result = None if job.overwrite else load_result(job.path)
    if result is None or result["generation_id"] == job.config.generation_id:
        return result
    differ = differing_keys(result["config"], job.config.as_dict())
    raise UsageError(
        f"{job.path} is the result of another configuration "
        f"({'; '.join(differ) or 'made by another version'}); "
        "--tag NAME writes beside it, --overwrite replaces it"
    )


def choose_device(requested: str | None, worker: WorkerInfo) -> str:
    """The device to run on; by default cuda where there is one.

    Raises EnvironmentProblem where the requested one is not there.

    Under a launcher "cuda" is the device of the process's local rank.
    """
    if requested == "cpu":
        return requested
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested is None and not n:
        return "cpu"
    if worker.size > 1 and requested in (None, "cuda"):
        # some launchers show each process one GPU, which then is number 0
        requested = f"cuda:{worker.local_rank if n != 1 else 0}"
    if requested is None:
        return "cuda"
    if not n:
        why = "no CUDA device is visible"
        if not torch.version.cuda:
            why = f"torch {torch.__version__} is built without CUDA"
        raise EnvironmentProblem(f"--device {requested}: {why}; --device cpu runs on the processor")
    index = int(requested.partition(":")[2] or 0)
    if index >= n:
        there_are = f"there are: {', '.join(f'cuda:{i}' for i in range(n))}, cpu"
        raise EnvironmentProblem(f"--device {requested} is not there; {there_are}")
    return requested


def open_store(job: Job, worker: WorkerInfo) -> tuple[Store, WorkerInfo]:
    """The store of a job's samples, and the worker with the session of its run.

    The leader locks the store; the others wait for it. Raises ShareDone where its run is over.
    """
    root, config = job.output_dir / "cache", job.config
    identity, key = config.identity(), config.generation_id
    if worker.size > 1 and worker.parent is None:
        say(f"rank {worker.rank} of {worker.size} on {HOST}, process {os.getpid()}")
    if not worker.leads:
        session = await_leader(folder(root, key), worker)
        if session is None:
            raise ShareDone
        store = Store.open(root, identity, key, alone=False, usable=is_usable)
        return store, replace(worker, session=session)
    store = Store.open(root, identity, key, fresh=job.overwrite, usable=is_usable)
    if not job.overwrite:
        _restore(store, job)
    if len(store):
        say(f"resuming: {numbered(len(store), 'finished sample')} in {store.directory}")
    damage = [getattr(store.report, name) for name in ("torn", "corrupt", "foreign")]
    if any(damage):
        lines = numbered(sum(damage), "damaged line")
        ignored = f"{lines} in {store.directory} {'is' if sum(damage) == 1 else 'are'} ignored"
        say(f"note: {ignored}; samples that they held are generated again")
    return store, worker


def _restore(store: Store, job: Job) -> None:
    """Put the samples of an old result of this generation back into a store that lost them."""
    result = load_result(job.path)
    if result is not None and result.get("generation_id") == job.config.generation_id:
        for key, kept in samples_of(result).items():
            if store.get(key) is None:
                store.put(key, {"status": "ok", **kept})
