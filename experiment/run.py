"""A run: check the inputs, generate what is not kept yet, score it, write the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import sandbox
from experiment.arguments import Models
from experiment.checks import (
    check_inputs,
    choose_device,
    finished_result,
    open_store,
    own_result,
    say,
)
from experiment.describe import summary
from experiment.export import export
from experiment.identity import agree_ranks, data_identity, rows_identity
from experiment.resolve import Job
from experiment.result import build_result, table
from experiment.sample_cache import SampleCache, ShareDone
from experiment.signals import Interrupted, Signalled
from experiment.status import StatusFile
from experiment.store import Store
from experiment.text import token_texts
from experiment.workers import WorkerInfo, WorkerPool
from models.cost import CPU_ROWS
from models.files import download
from tasks import build_task
from tasks.installed import headline_of
from utils import (
    EXIT_COMPLETE,
    EXIT_INCOMPLETE,
    BadDataError,
    DllmexpError,
    ManyProblems,
    OutputError,
    UsageError,
    atomic_write_json,
    available_cores,
    environment,
    output_problem,
    sha256,
)

if TYPE_CHECKING:
    from harness import _ProfilingHarness
    from models import Transformer

GetModel = Callable[..., "_ProfilingHarness"]  # eval.get_model
CPU_LIKELIHOODS = 32  # rows of likelihoods in one forward pass on a CPU
MOST_JUDGES = 4  # a GPU does not write more programs than these judge


def load_weights(checkpoint: str, device: str, dtype: str) -> Transformer:
    from models import load_model

    return load_model(checkpoint, device=device, dtype=dtype)[0]


@dataclass(frozen=True)
class Host:
    """What a process that runs several experiments does differently.

    load:  (checkpoint, device, dtype) -> the transformer.
    cache: the class of the sample cache, which decides which samples this process decodes.
    judges: whether programs are judged here while others are generated.
    """

    load: Callable[[str, str, str], Transformer] = load_weights
    cache: type[SampleCache] = SampleCache
    judges: bool = True


def run_job(
    job: Job, worker: WorkerInfo, argv: list[str], host: Host, models: Models, get_model: GetModel
) -> int:
    """Check the inputs, run what is not done, write and print the result. Returns the exit code."""
    agree_ranks(job, worker)
    job, texts, errors = check_inputs(job, models[job.config.model_alias]["flag"])
    done = None
    try:
        done = finished_result(job) if not errors else None
    except DllmexpError as error:
        errors.append(error)
    if done is not None and job.export:  # scored again as it was, for lm-eval's files
        if job.no_exec and job.spec.kind == "code":
            errors.append(
                UsageError("--export with --no_exec would replace a complete result; leave one out")
            )
        if done["id"] != job.config.result_id:
            job = replace(job, config=replace(job.config, strict_exec=True))
    elif done is not None:
        if worker.leads:
            say(f"finished already (id {job.config.result_id[:12]}); --overwrite runs it again")
            print(table(done, job.path))
        return EXIT_COMPLETE
    if problem := output_problem(job.output_dir):
        errors.append(OutputError(problem))
    device = "cpu"
    if texts is None and not (errors and job.device is None):
        try:
            device = choose_device((*job.worker_devices, job.device)[0], worker)
        except DllmexpError as error:
            errors.append(error)
    if errors:
        raise ManyProblems(errors)
    asked, on_cpu = job.batch_size, device == "cpu"
    if job.config.likelihood is not None:  # a row takes part in one pass, not in hundreds
        usual = CPU_LIKELIHOODS if on_cpu else "auto"
    else:
        usual = CPU_ROWS if on_cpu else 1
    asked = None if on_cpu and asked == "auto" else asked
    job = replace(job, batch_size=job.config.timed_batch or asked or usual)
    if worker.leads:
        say(summary(job, device))
    result = execute(job, texts, device, worker, _worker_argv(argv), host, get_model)
    if result is None:
        return EXIT_COMPLETE
    print(table(result, job.path))
    return EXIT_COMPLETE if result["status"] == "complete" else EXIT_INCOMPLETE


def execute(
    job: Job,
    texts: dict[int, str] | None,
    device: str,
    worker: WorkerInfo,
    argv: list[str],
    host: Host,
    get_model: GetModel,
) -> dict[str, Any] | None:
    """Generate or take the texts, let lm-eval score them, write the result.

    argv: the arguments with which the other workers are started.
    Returns the result, None in a worker that does not lead.
    """
    started, clock = datetime.now(timezone.utc), time.monotonic()
    store: Store | None = None
    status: StatusFile | None = None
    try:
        with ExitStack() as stack:
            if texts is None:
                store, worker = open_store(job, worker)
                stack.enter_context(store)
                status = StatusFile(
                    store, worker, job.path, job.limit, job.spec.headline, job.config.repeats
                )
                stack.enter_context(status)
            alive = []
            if texts is None and len(job.worker_devices) > 1:
                pool = stack.enter_context(WorkerPool(argv, job.worker_devices, worker))
                alive = [pool.alive]
                worker = replace(worker, size=max(worker.size, len(job.worker_devices)))
            from experiment import lmeval
            from experiment.predictions import predictions_lm

            machine = {"environment": environment(), "device": lmeval.device_stamp(device)}
            facts = _provenance(machine["environment"] | machine["device"], job)
            cache = host.cache(job.config.generation_id, store, worker, facts, *alive)
            task = _task(job)
            if status is not None:
                cache.status = status
                n_docs = len(task.eval_docs)
                n_samples = min(n_docs, job.limit or n_docs) * task.config.repeats
                status.expect(n_samples)
                if len(store) < n_samples:  # before the bar over the samples
                    for name in filter(None, (job.config.checkpoint, job.config.verifier)):
                        download(name)
            if texts is not None:
                lm = predictions_lm(texts)
            else:
                n_judges = idle_cores(device, worker.size) if host.judges and worker.leads else 0
                lm = get_model(job, device, task, cache, **_scoring(job, task, n_judges, stack))
            config, found = job.config, []
            logged = lmeval.evaluate(
                lm,
                task,
                chat_template=config.chat_template,
                system=config.system,
                limit=job.limit,
                repeats=config.repeats,
                keep=found.append,
            )
            times = {
                "started": started.isoformat(timespec="seconds"),
                "total_seconds": time.monotonic() - clock,
            }
            result = _result(job, task, lm, logged, cache, times | machine)
            own_result(job)  # raises where a run of the same name has ended since this one began
            atomic_write_json(job.path, result)
            if job.export:
                say(export(job, result, found[0], lm, task))
            if status is not None:
                status.done(result)
            return result
    except ShareDone:
        return None
    except (KeyboardInterrupt, Signalled) as error:
        kept = f"; {len(store)} finished samples are kept in {store.directory}" if store else ""
        raise Interrupted.by(error, kept) from error


def _task(job: Job):
    """The lm-eval task of a job: its documents, its prompts and its scoring."""
    from experiment import lmeval
    from tasks.code import add_repeats, add_strict, use_extraction

    spec, config = job.spec, job.config
    with lmeval.quiet():
        task = build_task(spec, job.data_dir, config.prompt_form, config.num_fewshot)
    hub = config.data.get("hub")
    found = rows_identity(spec, task.data) if hub else data_identity(spec, job.data_dir)
    if found != config.data:
        name = f"data set {hub}" if hub else f"--data_dir {job.data_dir}"
        raise BadDataError(f"{name} has changed since this run began; start it again")
    use_extraction(task, config.extraction)
    if config.strict_exec and spec.kind == "code":
        add_strict(task)
    if (n := config.repeats) > 1:
        if (own := task.config.repeats) > 1:
            why = f"{spec.name} already takes {own} samples per document; leave it out"
            raise UsageError(f"--repeats {n}: {why}")
        task.set_config("repeats", n)
        if spec.kind == "code":
            add_repeats(task, n)
    return task


def _scoring(job: Job, task, n_judges: int, stack: ExitStack) -> dict[str, Any]:
    """What scores samples while others are generated: `score` and `ahead` of Generation."""
    from experiment import lmeval

    ahead = None
    if n_judges and job.spec.kind == "code" and sandbox.executes():
        ahead = stack.enter_context(task.judging.beside(n_judges))
    alone = job.spec.scores_alone and job.config.likelihood is None
    score = lmeval.scorer(task, job.spec.headline) if alone else None
    return {"score": score, "ahead": ahead}


def _result(
    job: Job, task, lm, logged: dict[str, Any], cache: SampleCache, meta: dict[str, Any]
) -> dict[str, Any]:
    """The result of a run that lm-eval has scored.

    logged: what experiment.lmeval.evaluate returns. meta: times and facts of the machine.
    """
    spec, config, store = job.spec, job.config, cache.store
    form = spec.forms[config.prompt_form]
    generation = getattr(lm, "generation", None)  # scored predictions have none
    found = None
    if store is not None:
        found = {"directory": str(store.directory), "found": str(store.report)}
    return build_result(
        config=config.as_dict(),
        generation_id=config.generation_id,
        result_id=config.result_id,
        protocol=asdict(job.protocol) | {"form_source": form.source},
        overrides=job.overrides,
        notes=job.notes,
        data={
            "name": task.data.name,
            "files": config.data,
            "n_docs": len(task.eval_docs),
            "rows_sha256": sha256([dict(doc) for doc in task.eval_docs]),
        },
        limit=job.limit,
        samples=lm.samples,
        logged=logged,
        headline=spec.headline or headline_of(task),
        code=spec.kind == "code",
        target=spec.target,
        token_texts=token_texts(lm.tokenizer, lm.samples) if generation else {},
        profile=lm.profile(),
        meta={
            **meta,
            "data_origin": task.data.origin,
            "batch_size": generation.first_batch_size if generation else job.batch_size,
            "acceleration": list(getattr(lm, "acceleration", ())),
            "batch_sizes_out_of_memory": generation.halved if generation else [],
            "samples_made": cache.provenances(),
            "store": found,
            "sandbox": sandbox.announcement() if spec.kind == "code" else None,
        },
    )


def idle_cores(device: str, n_workers: int) -> int:
    """Cores for judging programs while others are generated: a few beside GPUs, none on a CPU.

    On a CPU judging would be seen in tok/s.
    """
    return 0 if device == "cpu" else max(0, min(MOST_JUDGES, available_cores() - n_workers))


def _provenance(stamp: dict[str, Any], job: Job) -> dict[str, Any]:
    """Facts of the machine that can move a number; they are kept with each sample."""
    names = ("hostname", "device", "device_name", "cpu", "driver", "cuda")
    return {name: stamp.get(name) for name in names} | {
        "torch": stamp["packages"].get("torch"),
        "batch_size": job.batch_size,
    }


def _worker_argv(argv: list[str]) -> list[str]:
    """The arguments with which this run starts its workers: its own, less --devices."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] != "--devices":
            kept.append(word)
        skip = word == "--devices"
    return kept
