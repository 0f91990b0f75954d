"""Evaluate a masked-diffusion language model on one benchmark: arguments in, one result file out.

    python eval.py --model_alias llada --task gsm8k --tokens_per_step 2

This file has the tables of models and benchmarks, checks the input, calls lm-eval through
harness.py and writes the result. experiment/ has everything else around a run. Nothing heavy is
imported until every cheap check has passed.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # Ctrl-C while modules load ends without a traceback; see main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import import_module
from typing import TYPE_CHECKING, Any

import sandbox
from decoding.algorithms import ALGORITHMS
from experiment import plugins
from experiment.arguments import parse
from experiment.checks import (
    check_inputs,
    choose_device,
    finished_result,
    input_problems,
    open_store,
    say,
)
from experiment.identity import forget, identified, is_known, rows_identity
from experiment.resolve import Job, resolve
from experiment.result import build_result, published, reference_of, table
from experiment.sample_cache import SampleCache, ShareDone
from experiment.signals import Interrupted, Signalled, signals_raise
from experiment.status import StatusFile
from experiment.store import Store
from experiment.workers import WorkerInfo, WorkerPool, worker_info
from models import FAMILIES
from tasks import (
    PromptForm,
    TaskSpec,
    build_task,
    gsm8k,
    humaneval,
    mbpp,
    truthfulqa,
)
from tasks import protocols as cells
from tasks.data import name_of_data
from tasks.installed import headline_of, spec_of
from tasks.protocols import protocol
from utils import (
    EXIT_COMPLETE,
    EXIT_ENVIRONMENT,
    EXIT_INCOMPLETE,
    EXIT_OUTPUT,
    BadDataError,
    DllmexpError,
    ManyProblems,
    OutputError,
    UsageError,
    atomic_write_json,
    environment,
    out_of_memory,
    output_problem,
    sha256,
)

if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]  # `import eval` in a plugin means these tables

if TYPE_CHECKING:
    from harness import _ProfilingHarness
    from models import Transformer

QWEN = "Qwen/Qwen2.5-0.5B"  # the verifier of APD's authors
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")

# Everything that is known of an alias:
#   family      of models.FAMILIES: how checkpoints are read, default algorithm, sampling rules
#   checkpoint  the default one: a directory, a hub id, or a hub id at a revision, org/name@revision
#   flag        the name of the flag that replaces it
#   verifier    a checkpoint for the algorithms that have one (`apd`); optional
#   dtype       the default of --dtype; optional, default: bfloat16
#   harness     a subclass of harness._ProfilingHarness, or "module:Class"; optional
#   uniform, official   cells by task, see tasks/protocols.py; optional
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "llada": {
        "family": "llada",
        "checkpoint": "GSAI-ML/LLaDA-8B-Instruct",
        "flag": "llada_ckpt",
        "uniform": cells.LLADA_UNIFORM,
        "official": cells.LLADA_OFFICIAL,
    },
    "llada1.5": {
        "family": "llada",
        "checkpoint": "GSAI-ML/LLaDA-1.5",
        "flag": "llada15_ckpt",
        "uniform": cells.LLADA15_UNIFORM,
        "official": cells.LLADA15_OFFICIAL,
    },
    "dream": {
        "family": "dream",
        "checkpoint": "Dream-org/Dream-v0-Instruct-7B",
        "flag": "dream_ckpt",
        "verifier": QWEN,
        "official": cells.DREAM_OFFICIAL,
    },
    "diffucoder": {
        "family": "dream",
        "checkpoint": "apple/DiffuCoder-7B-cpGRPO",
        "flag": "diffucoder_ckpt",
        "verifier": QWEN,
        "official": cells.DIFFUCODER_OFFICIAL,
    },
    "tiny-llada": {
        "family": "llada",
        "checkpoint": f"{ASSETS}/tiny-llada",
        "dtype": "float32",
        "flag": "tiny_llada_ckpt",
        "uniform": cells.TINY_UNIFORM,
    },
    "tiny-dream": {
        "family": "dream",
        "checkpoint": f"{ASSETS}/tiny-dream",
        "dtype": "float32",
        "flag": "tiny_dream_ckpt",
        "verifier": f"{ASSETS}/tiny-qwen",
        "uniform": cells.TINY_UNIFORM,
    },
}

# --task NAME: the benchmark, one file in tasks/ each
TASKS: dict[str, TaskSpec] = {
    "humaneval": humaneval.SPEC,
    "mbpp": mbpp.SPEC,
    "gsm8k": gsm8k.SPEC,
    "truthfulqa": truthfulqa.SPEC,
}


TABLES = {"model": MODEL_DEFAULTS, "task": TASKS, "algorithm": ALGORITHMS, "family": FAMILIES}


def get_prompt_template(alias: str, task: str, protocol_name: str = "uniform") -> PromptForm:
    """How a task is asked of a model under a protocol: wording, examples, prefill, stop strings."""
    spec = TASKS.get(task) or spec_of(task)
    family = FAMILIES[MODEL_DEFAULTS[alias]["family"]]
    return spec.forms[protocol(protocol_name, alias, MODEL_DEFAULTS, spec, family).form]


def _load(checkpoint: str, device: str, dtype: str) -> Transformer:
    from models import load_model

    return load_model(checkpoint, device=device, dtype=dtype)[0]


@dataclass(frozen=True)
class Host:
    """What a process that runs several experiments does differently.

    load:  (checkpoint, device, dtype) -> the transformer.
    cache: the class of the sample cache, which decides which samples this process decodes.
    judges: whether programs are judged here while others are generated.
    """

    load: Callable[[str, str, str], Transformer] = _load
    cache: type[SampleCache] = SampleCache
    judges: bool = True


CPU_BATCH = 8  # samples in flight on a CPU, which one sample does not keep busy
MOST_JUDGES = 4  # a GPU does not write more programs than these judge


def harness_of(entry: Mapping[str, Any], family: str) -> type[_ProfilingHarness]:
    """The lm-eval model class of an entry of MODEL_DEFAULTS: its own, or that of its family."""
    from harness import HARNESSES, _ProfilingHarness

    own = entry.get("harness") or HARNESSES.get(family, _ProfilingHarness)
    if isinstance(own, str):
        module, _, name = own.partition(":")
        try:
            own = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(
                f'harness {entry["harness"]!r}: {error}; expected "module:Class"'
            ) from error
    if not (isinstance(own, type) and issubclass(own, _ProfilingHarness)):
        raise UsageError(f"harness {own!r} is no subclass of harness._ProfilingHarness")
    return own


def get_model(
    job: Job, device: str, task, cache: SampleCache, load=_load, score=None, ahead=None
) -> _ProfilingHarness:
    """The lm-eval model of a job: tokenizer and config now, weights with the first sample.

    score, ahead: see experiment.generation.Generation.
    """
    from models import load_tokenizer, read_config

    run, entry = job.config, MODEL_DEFAULTS[job.config.model_alias]
    tokenizer, config = load_tokenizer(run.checkpoint), read_config(run.checkpoint)
    if run.verifier is not None:  # it reads what the model writes: both must have the positions
        room = read_config(run.verifier).max_length
        config = replace(config, max_length=min(config.max_length, room))
    if run.chat_template and not tokenizer.chat_template:
        raise BadDataError(
            f"checkpoint {run.checkpoint} has no chat template, which the {run.protocol} "
            f"protocol needs; "
            "--no_chat_template asks without one"
        )

    def load_models() -> tuple[Transformer, Transformer | None]:
        model = load(run.checkpoint, device, run.dtype)
        model.accelerate(compile=run.compile, cuda_graphs=job.cuda_graphs, tell=say)
        return model, run.verifier and load(run.verifier, device, run.dtype)

    return harness_of(entry, run.family)(
        tokenizer,
        config,
        run.decode,
        load=load_models,
        device=device,
        seed=run.seed,
        prefill=task.prefill,
        cache=cache,
        batch_size=job.batch_size or 1,
        score=score,
        ahead=ahead,
    )


# ---------------------------------------------------------------- what is printed

# checksums: the result has them, a terminal has no room
INPUTS = ("fingerprint", "verifier_fingerprint", "data")


def describe(job: Job) -> str:
    """The configuration, the schedule and the path of the result, as --dry_run prints them."""
    config, schedule = job.config, job.schedule
    settings = {k: v for k, v in config.as_dict().items() if k not in INPUTS}
    settings |= {k: _short(settings[k]) for k in ("plugins", "harness") if k in settings}
    lines = ["config:", *(f"  {key:24}{value}" for key, value in settings.items())]
    known = (
        config.result_id
        if is_known(job)
        else "known once its inputs have been read, by the first run"
    )
    lines.append(f"  {'id':24}{known}")
    if is_known(job) and schedule is not None:
        lines.append(f"  {'generation_id':24}{config.generation_id}")
    if schedule is not None:
        blocks = f"{schedule.n_blocks} block(s) of {schedule.block_length}"
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
    if config.protocol == "official":
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


# ---------------------------------------------------------------- a run


def execute(
    job: Job,
    texts: dict[int, str] | None,
    device: str,
    worker: WorkerInfo,
    argv: list[str],
    host: Host,
) -> dict[str, Any] | None:
    """Generate or take the texts, let lm-eval score them, write the result.

    Returns the result, None in a worker that does not lead.
    """
    store: Store | None = None
    status: StatusFile | None = None
    try:
        with ExitStack() as stack:
            if texts is None:
                store, worker = open_store(job, worker)
                stack.enter_context(store)
                status = StatusFile(store, worker, job.path, job.limit, job.spec.headline)
                stack.enter_context(status)
            pool = None
            if len(job.worker_devices) > 1:
                pool = stack.enter_context(WorkerPool(argv, job.worker_devices, worker))
            result = _execute(job, texts, device, worker, store, status, pool, host)
            atomic_write_json(job.path, result)
            if status is not None:
                status.done(result)
            return result
    except ShareDone:
        return None
    except (KeyboardInterrupt, Signalled) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else error.args[0]
        kept = f"; {len(store)} finished samples are kept in {store.directory}" if store else ""
        name = signal.Signals(number).name
        raise Interrupted(number, f"ended by {name}{kept}; the same command goes on") from error


def _execute(
    job: Job,
    texts: dict[int, str] | None,
    device: str,
    worker: WorkerInfo,
    store: Store | None,
    status: StatusFile | None,
    pool: WorkerPool | None,
    host: Host,
) -> dict[str, Any]:
    from experiment import lmeval
    from experiment.predictions import predictions_lm
    from tasks.code import add_strict, use_extraction

    started = time.time()
    spec, config = job.spec, job.config
    worker = replace(worker, size=max(worker.size, len(job.worker_devices)))
    stamp, on = environment(), lmeval.device_stamp(device)
    alive = [pool.alive] if pool else []
    provenance = _provenance(stamp | on, job)
    cache = host.cache(config.generation_id, store, worker, provenance, *alive)
    with lmeval.quiet():
        task = build_task(spec, job.data_dir, config.prompt_form, config.num_fewshot)
    if "rows" in config.data and rows_identity(spec, task.data) != config.data:
        raise BadDataError(
            f"data set {config.data['hub']} has changed since this run began; start it again"
        )
    use_extraction(task, config.extraction)
    if config.strict_exec and spec.kind == "code":
        add_strict(task)
    if status is not None:
        cache.status = status
        status.expect(min(len(task.eval_docs), job.limit or len(task.eval_docs)))
    score = lmeval.scorer(task, spec.headline) if spec.scores_alone else None
    with ExitStack() as stack:
        ahead = None
        n_judges = idle_cores(device, worker.size) if host.judges and worker.leads else 0
        if n_judges and spec.kind == "code" and texts is None and sandbox.executes():
            ahead = stack.enter_context(task.judging.beside(n_judges))
        if texts is not None:
            lm = predictions_lm(texts)
        else:
            lm = get_model(job, device, task, cache, host.load, score, ahead)
        logged = lmeval.evaluate(
            lm, task, chat_template=config.chat_template, system=config.system, limit=job.limit
        )
    form = spec.forms[config.prompt_form]
    generation = getattr(lm, "generation", None)  # scored predictions have none
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
        profile=lm.profile(),
        meta={
            "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            "total_seconds": time.time() - started,
            "data_origin": task.data.origin,
            "batch_size": generation.first_batch_size if generation else job.batch_size,
            "acceleration": list(getattr(lm, "acceleration", ())),
            "batch_sizes_out_of_memory": generation.halved if generation else [],
            "samples_made": cache.provenances(),
            "store": {"directory": str(store.directory), "found": str(store.report)}
            if store
            else None,
            "device": on,
            "environment": stamp,
            "sandbox": sandbox.announcement() if spec.kind == "code" else None,
        },
    )


def idle_cores(device: str, n_workers: int) -> int:
    """Cores for judging programs while others are generated: a few beside GPUs, none on a CPU.

    On a CPU judging would be seen in tok/s.
    """
    return (
        0 if device == "cpu" else max(0, min(MOST_JUDGES, len(os.sched_getaffinity(0)) - n_workers))
    )


def _provenance(stamp: dict[str, Any], job: Job) -> dict[str, Any]:
    """Facts of the machine that can move a number; they are kept with each sample."""
    names = ("hostname", "device", "device_name", "cpu", "driver", "cuda")
    return {name: stamp.get(name) for name in names} | {
        "torch": stamp["packages"].get("torch"),
        "batch_size": job.batch_size,
    }


def run(argv: list[str], host: Host) -> int:
    """Everything between the command line and the exit code."""
    plugins.load(argv, TABLES)
    args, problems = parse(argv, MODEL_DEFAULTS, TASKS)
    try:
        job = resolve(args, problems, MODEL_DEFAULTS, TASKS)
    except UsageError as error:
        raise ManyProblems([error, *input_problems(args, MODEL_DEFAULTS, TASKS)]) from None
    worker = worker_info(os.environ)
    if worker.size > 1 and job.devices:
        raise UsageError(
            f"--devices {job.devices}: a launcher has started {worker.size} processes already; "
            f"leave it out"
        )
    entry = MODEL_DEFAULTS[job.config.model_alias]
    if entry.get("harness"):
        harness_of(entry, job.config.family)  # a bad one is refused before anything is read
    if args.print_output_path:
        print(job.path)
    elif args.dry_run:
        forget()
        print(describe(identified(job)))
    elif args.show_prompt is not None:
        print(shown_prompt(job, args.show_prompt))
    else:
        return evaluate(job, worker, argv, host)
    return EXIT_COMPLETE


def evaluate(job: Job, worker: WorkerInfo, argv: list[str], host: Host) -> int:
    """Check the inputs, run what is not done, write and print the result. Returns the exit code."""
    job, texts, errors = check_inputs(job, MODEL_DEFAULTS[job.config.model_alias]["flag"])
    done = None
    try:
        done = finished_result(job) if not errors else None
    except DllmexpError as error:
        errors.append(error)
    if done is not None:
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
    job = replace(job, batch_size=job.batch_size or (CPU_BATCH if device == "cpu" else 1))
    if worker.leads:
        say(describe(job))
        chosen = texts is None and not (job.device or job.devices)
        say(f"device: {device}{' (chosen; --device decides)' if chosen else ''}")
    result = execute(job, texts, device, worker, _worker_argv(argv), host)
    if result is None:
        return EXIT_COMPLETE
    print(table(result, job.path))
    return EXIT_COMPLETE if result["status"] == "complete" else EXIT_INCOMPLETE


def shown_prompt(job: Job, doc_id: int) -> str:
    """The prompt of a document as the model gets it, its length and its stop strings.

    Reads the tokenizer and no weights.
    """
    from experiment import lmeval

    with lmeval.quiet():
        task = build_task(job.spec, job.data_dir, job.config.prompt_form, job.config.num_fewshot)
    n_docs = len(task.eval_docs)
    if doc_id >= n_docs:
        raise UsageError(
            f"--show_prompt {doc_id}: {job.config.task} has documents 0 to {n_docs - 1}"
        )
    lm = get_model(job, "cpu", task, SampleCache(generation_id=""))
    request = lmeval.request_of(lm, task, job.config, doc_id)
    form = get_prompt_template(job.config.model_alias, job.config.task, job.config.protocol)
    stops = ", ".join(map(repr, request.stops)) or "none; the answer ends at an end token"
    return "\n".join(
        [
            request.prompt,
            "-" * 80,
            f"document {doc_id} of {n_docs}; {len(request.prompt_ids)} tokens and a canvas of "
            f"{job.schedule.gen_length}",
            f"form {job.config.prompt_form}: {form.source}",
            f"stop strings: {stops}",
        ]
    )


def _worker_argv(argv: list[str]) -> list[str]:
    """The arguments with which this run starts its workers: its own, less --devices."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] != "--devices":
            kept.append(word)
        skip = word == "--devices"
    return kept


def _verdict(error: BaseException) -> tuple[list[str], int]:
    """The error lines of a failure, and the exit code."""
    if isinstance(error, DllmexpError):
        return error.problems, error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return [
            f"package {error.name} is missing; pip install -r requirements.txt"
        ], EXIT_ENVIRONMENT
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted; the same command goes on"], 128 + signal.SIGINT
    if isinstance(error, Signalled):
        return ["terminated; the same command goes on"], 128 + error.args[0]
    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        way_out = "a free device, a smaller --batch_size or --dtype bfloat16 helps"
        return [f"out of memory: {first}; {way_out}"], EXIT_ENVIRONMENT
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
        # what is left in stdout's buffer must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return [f"cannot write: {error.strerror}"], EXIT_OUTPUT
    return [f"{type(error).__name__}: {first}; this should not happen, --debug shows where"], 1


def main(argv: list[str] | None = None, host: Host | None = None) -> int:
    """Run. A failure is one line per problem on stderr and an exit code.

    --debug prints the traceback too.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with signals_raise():
            code = run(argv, host or Host())
            sys.stdout.flush()
            return code
    except (Exception, KeyboardInterrupt, Signalled) as error:
        problems, code = _verdict(error)
        if "--debug" in argv:
            traceback.print_exception(error)
    for problem in problems:
        say(f"error: {problem}")
    return code


if __name__ == "__main__":
    sys.exit(main())
