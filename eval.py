"""Evaluate a masked-diffusion language model on one benchmark: arguments in, one result file out.

    python eval.py --model_alias llada --task gsm8k --tokens_per_step 2

This file checks, calls lm-eval through harness.py and writes the result. What the arguments mean is in experiment/,
what surrounds the model in experiment/. Nothing heavy is imported until every cheap check has passed.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C while modules load ends without a traceback; see main()

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import sandbox
from experiment.arguments import parse
from experiment.checks import (
    check_inputs,
    choose_device,
    finished_result,
    input_problems,
    open_store,
    say,
    uncollected,
)
from experiment.identity import identified, is_known
from experiment.resolve import Job, resolve
from experiment.result import UNPUBLISHED, build_result, published, table
from experiment.sample_cache import SampleCache, ShareDone
from experiment.signals import Interrupted, Signalled, signals_raise
from experiment.status import StatusFile
from experiment.store import Store
from experiment.workers import WorkerInfo, WorkerPool, worker_info
from tasks import DataError, PromptForm, TaskSpec, build_task
from tasks.gsm8k import SPEC as GSM8K
from tasks.humaneval import SPEC as HUMANEVAL
from tasks.installed import NOTE as OTHER_TASK_NOTE
from tasks.installed import headline_of, spec_of
from tasks.mbpp import SPEC as MBPP
from tasks.protocols import protocol
from tasks.truthfulqa import SPEC as TRUTHFULQA
from utils import (
    EXIT_COMPLETE,
    EXIT_DATA,
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

if TYPE_CHECKING:
    from harness import _ProfilingHarness
    from models import Transformer

QWEN = "Qwen/Qwen2.5-0.5B"  # the verifier of APD's authors
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")

# alias -> family (algorithms, harness), default checkpoint, the flag that replaces it, and a verifier that fits (`apd`)
MODEL_DEFAULTS: dict[str, dict[str, str]] = {
    "llada": {"family": "llada", "checkpoint": "GSAI-ML/LLaDA-8B-Instruct", "flag": "llada_ckpt"},
    "llada1.5": {"family": "llada", "checkpoint": "GSAI-ML/LLaDA-1.5", "flag": "llada15_ckpt"},
    "dream": {
        "family": "dream",
        "checkpoint": "Dream-org/Dream-v0-Instruct-7B",
        "flag": "dream_ckpt",
        "verifier": QWEN,
    },
    "diffucoder": {
        "family": "dream",
        "checkpoint": "apple/DiffuCoder-7B-cpGRPO",
        "flag": "diffucoder_ckpt",
        "verifier": QWEN,
    },
    "tiny-llada": {
        "family": "llada",
        "checkpoint": f"{ASSETS}/tiny-llada",
        "flag": "tiny_llada_ckpt",
    },
    "tiny-dream": {
        "family": "dream",
        "checkpoint": f"{ASSETS}/tiny-dream",
        "flag": "tiny_dream_ckpt",
        "verifier": f"{ASSETS}/tiny-qwen",
    },
}

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in (HUMANEVAL, MBPP, GSM8K, TRUTHFULQA)}

# where this project's scoring knowingly departs from lm-eval's; stored with every result of the task
TASK_NOTES = {
    "mbpp": "test_setup_code is run before the tests; lm-eval forgets it, which costs it task 367"
}


def get_prompt_template(alias: str, task: str, protocol_name: str = "uniform") -> PromptForm:
    """How a task is asked of a model under a protocol: wording, examples, prefill, stop strings."""
    return (TASKS.get(task) or spec_of(task)).forms[protocol(protocol_name, alias, task).form]


@dataclass(frozen=True)
class Parts:
    """What a process that runs several experiments puts in place of the usual.

    load:   (checkpoint, device, dtype) -> the transformer. ledger: who decides which samples are this process's.
    """

    load: Callable[[str, str, str], Transformer]
    ledger: type[SampleCache] = SampleCache


def _load(checkpoint: str, device: str, dtype: str) -> Transformer:
    from models import load_model

    return load_model(checkpoint, device=device, dtype=dtype)[0]


USUAL = Parts(_load)
MOST_JUDGES = 4  # more programs than these get through a GPU does not write


def get_model(
    job: Job, device: str, task, ledger: SampleCache, load=_load, score=None, ahead=None
) -> _ProfilingHarness:
    """The lm-eval model of a job: tokenizer and config now, weights when the first sample needs them.

    score, ahead: see _ProfilingHarness.
    """
    from harness import DreamHarness, LladaHarness
    from models import load_tokenizer, read_config

    checkpoint, checker = job.config.checkpoint, job.config.verifier
    tokenizer, config = load_tokenizer(checkpoint), read_config(checkpoint)
    if checker is not None:  # it reads what the model writes: both must have the positions
        config = replace(config, max_length=min(config.max_length, read_config(checker).max_length))
    if job.config.chat_template and not tokenizer.chat_template:
        raise BadDataError(
            f"checkpoint {checkpoint} has no chat template, which the {job.protocol.name} protocol needs"
        )
    family = {"llada": LladaHarness, "dream": DreamHarness}[job.config.family]

    def ready() -> Transformer:
        model = load(checkpoint, device, job.config.dtype)
        model.accelerate(compile=job.config.compile, cuda_graphs=job.cuda_graphs, tell=say)
        return model

    def verifier() -> Transformer:
        return load(checker, device, job.config.dtype)

    return family(
        tokenizer,
        config,
        job.decode,
        load=ready,
        load_verifier=None if checker is None else verifier,
        device=device,
        batch_size=job.batch_size,
        seed=job.config.seed,
        ledger=ledger,
        prefill=task.prefill,
        score=score,
        ahead=ahead,
    )


# ---------------------------------------------------------------- what is printed

INPUTS = (
    "fingerprint",
    "verifier_fingerprint",
    "data",
)  # checksums: the result has them, a terminal has no room


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(job: Job) -> str:
    """The normalised configuration, the schedule and the path of the result, as --dry_run prints them."""
    config, schedule = job.config, job.schedule
    lines = [
        "config:",
        *(f"  {key:24}{value}" for key, value in config.as_dict().items() if key not in INPUTS),
    ]
    lines.append(
        f"  {'id':24}{config.id if is_known(job) else 'known once checkpoint and data are here'}"
    )
    if schedule.adaptive and not job.config.predictions:
        lines.append(
            f"schedule: {schedule.algorithm} decides, in {schedule.n_blocks} block(s) of {schedule.block_length}: at "
            f"least {schedule.realised_tps:g} tokens per step, at most {schedule.forward_passes} forward passes"
        )
    elif not job.config.predictions:
        lines.append(
            f"schedule: {schedule.num_steps} steps in {schedule.n_blocks} block(s) of {schedule.block_length}, "
            f"{schedule.realised_tps:g} tokens per step realised, at most {schedule.forward_passes} forward passes"
        )
    lines += [
        f"override: {name} {_plain(o['run'])} (protocol {config.protocol}: {o['protocol']})"
        for name, o in job.overrides.items()
    ]
    lines += [f"note: {note}" for note in job.notes]
    if job.protocol.name == "official":
        lines += [f"published: {text}" for text in map(published, job.protocol.references)] or [
            f"published: {UNPUBLISHED}"
        ]
    return "\n".join([*lines, f"output: {job.path}"])


# ---------------------------------------------------------------- a run


def execute(
    job: Job,
    spec: TaskSpec,
    texts: dict[int, str] | None,
    device: str,
    place: WorkerInfo,
    argv: list[str],
    parts: Parts = USUAL,
) -> dict[str, Any] | None:
    """Generate or take the texts, let lm-eval score them, and write the result; None in a further worker."""
    store: Store | None = None
    status: StatusFile | None = None
    try:
        with ExitStack() as stack:
            if texts is None:
                store = stack.enter_context(open_store(job, place))
                status = StatusFile(store, place, job.path, job.limit, spec.headline)
                stack.enter_context(status)
            crew = (
                stack.enter_context(WorkerPool(argv, job.devices, place))
                if len(job.devices) > 1
                else None
            )
            result = _execute(job, spec, texts, device, place, store, crew, parts, status)
            atomic_write_json(job.path, result)
            if status is not None:
                status.done(result)
            return result
    except ShareDone:
        return None
    except (KeyboardInterrupt, Signalled) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else error.args[0]
        kept = f"; {len(store)} finished samples are kept in {store.directory}" if store else ""
        raise Interrupted(
            number, f"ended by {signal.Signals(number).name}{kept}; the same command goes on"
        ) from error


def _execute(
    job: Job,
    spec: TaskSpec,
    texts: dict[int, str] | None,
    device: str,
    place: WorkerInfo,
    store: Store | None,
    crew: WorkerPool | None,
    parts: Parts,
    status: StatusFile | None,
) -> dict[str, Any]:
    started = time.time()
    with uncollected():
        import harness  # noqa: F401 - get_model needs it, and here nothing collects garbage meanwhile
        from experiment import lmeval
        from experiment.predictions import Predictions
    place = replace(place, size=max(place.size, len(job.devices)))
    stamp, on = environment(), lmeval.device_stamp(device)
    ledger = parts.ledger(
        job.config.id, store, place, _provenance(stamp | on, job), *([crew.alive] if crew else [])
    )
    with lmeval.quiet():
        task = build_task(spec, job.data_dir, job.config.prompt_form, job.config.num_fewshot)
    if status is not None:
        ledger.status = status
        status.expect(min(len(task.eval_docs), job.limit or len(task.eval_docs)))
    score = lmeval.scorer(task, spec.headline) if spec.kind in ("math", "qa") else None
    with ExitStack() as stack:
        idle, ahead = idle_cores(device, place.size), None
        # a suite scores in a process of its own
        if (
            idle
            and spec.kind == "code"
            and parts is USUAL
            and place.leads
            and texts is None
            and sandbox.executes()
        ):
            ahead = stack.enter_context(task.judging.beside(idle))
        lm = (
            Predictions(texts)
            if texts is not None
            else get_model(job, device, task, ledger, parts.load, score, ahead)
        )
        logged = lmeval.evaluate(
            lm,
            task,
            chat_template=job.config.chat_template,
            system=job.config.system,
            limit=job.limit,
        )
    form = spec.forms[job.config.prompt_form]
    return build_result(
        config=job.config.as_dict(),
        config_id=job.config.id,
        protocol=asdict(job.protocol) | {"form_source": form.source},
        overrides=job.overrides,
        notes=job.notes,
        data={
            "name": task.data.name,
            "files": job.config.data,
            "n_docs": len(task.eval_docs),
            "rows_sha256": sha256([dict(doc) for doc in task.eval_docs]),
        },
        limit=job.limit,
        records=lm.records,
        logged=logged,
        headline=spec.headline or headline_of(task),
        code=spec.kind == "code",
        profile=lm.profile(),
        meta={
            "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            "total_seconds": time.time() - started,
            "data_origin": task.data.origin,
            "batch_size": getattr(lm, "rows_in_flight", job.batch_size),
            "acceleration": list(getattr(lm, "acceleration", ())),
            "batch_sizes_out_of_memory": getattr(lm, "halved", []),
            "samples_made": ledger.provenances(),
            "store": {"directory": str(store.directory), "found": str(store.report)}
            if store
            else None,
            "device": on,
            "environment": stamp,
            "sandbox": sandbox.announcement() if spec.kind == "code" else None,
        },
    )


def idle_cores(device: str, n_workers: int) -> int:
    """Cores for judging programs while others are generated: those that GPUs leave, a few at most; none on a CPU, where it
    would be seen in tok/s."""
    return (
        0 if device == "cpu" else max(0, min(MOST_JUDGES, len(os.sched_getaffinity(0)) - n_workers))
    )


def _provenance(stamp: dict[str, Any], job: Job) -> dict[str, Any]:
    """What of the machine can move a number and is not part of the configuration; kept with each sample."""
    names = ("hostname", "device", "device_name", "cpu", "driver", "cuda")
    return {name: stamp.get(name) for name in names} | {
        "torch": stamp["packages"].get("torch"),
        "batch_size": job.batch_size,
    }


def run(argv: list[str] | None, parts: Parts = USUAL) -> int:
    """Everything between the command line and the exit code."""
    args, problems = parse(argv, MODEL_DEFAULTS, list(TASKS))
    try:
        job = resolve(args, problems, MODEL_DEFAULTS, list(TASKS))
    except UsageError as error:
        raise ManyProblems([error, *input_problems(args, MODEL_DEFAULTS, TASKS)]) from None
    if args.print_output_path:
        print(job.path)
        return EXIT_COMPLETE
    place = worker_info(os.environ)
    if place.size > 1 and job.devices:
        raise UsageError(
            f"--devices is for a run of its own: here a launcher has started {place.size} processes already"
        )
    spec = TASKS.get(job.config.task) or spec_of(job.config.task)
    note = OTHER_TASK_NOTE if spec.foreign else TASK_NOTES.get(spec.name)
    job = replace(job, notes=(*job.notes, *filter(None, [note])))
    if args.dry_run:
        print(describe(identified(job, spec)))
        return EXIT_COMPLETE
    job, texts, errors = check_inputs(job, spec, MODEL_DEFAULTS[job.config.model_alias]["flag"])
    try:
        done = finished_result(job) if not errors else None
    except DllmexpError as error:
        errors.append(error)
    else:
        if done is not None:
            if place.leads:
                say(f"finished already (id {job.config.id[:12]}); --overwrite runs it again")
            if place.leads:
                print(table(done, job.path))
            return EXIT_COMPLETE
    if problem := output_problem(job.output_dir):
        errors.append(OutputError(problem))
    device = "cpu"
    if job.predictions is None and not (errors and job.device is None):
        try:
            device = choose_device(job.device, place)
        except DllmexpError as error:
            errors.append(error)
    if errors:
        raise ManyProblems(errors)
    if place.leads:
        say(describe(job))
        say(
            f"device: {device}{'' if job.device or texts is not None else ' (chosen; --device decides)'}"
        )
    result = execute(
        job, spec, texts, device, place, _worker_argv(sys.argv[1:] if argv is None else argv), parts
    )
    if result is None:
        return EXIT_COMPLETE
    print(table(result, job.path))
    return EXIT_COMPLETE if result["status"] == "complete" else EXIT_INCOMPLETE


def _worker_argv(argv: list[str]) -> list[str]:
    """The arguments with which this run starts its workers: its own, less --devices."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] != "--devices":
            kept.append(word)
        skip = word == "--devices"
    return kept


def _verdict(error: BaseException, bad_data: tuple[type[Exception], ...]) -> tuple[list[str], int]:
    """What to say about a failure, and the exit code. `bad_data`: other parts' errors with .problems about files."""
    if isinstance(error, DllmexpError):
        return error.problems, error.exit_code
    if isinstance(error, bad_data):
        return error.problems, EXIT_DATA
    if isinstance(error, sandbox.SandboxError):
        return [str(error)], EXIT_ENVIRONMENT
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
        return [
            f"out of memory: {first}; a free device, a smaller --batch_size or --dtype bfloat16 helps"
        ], EXIT_ENVIRONMENT
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
        # what is left in stdout's buffer must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return [f"cannot write: {error.strerror}"], EXIT_OUTPUT
    return [f"{type(error).__name__}: {first}; this should not happen, --debug shows where"], 1


def main(argv: list[str] | None = None, parts: Parts = USUAL) -> int:
    """Run; a failure is one line per problem on stderr and an exit code, a traceback only with --debug."""
    from models import CheckpointError

    try:
        with signals_raise():
            code = run(argv, parts)
            sys.stdout.flush()
            return code
    except (Exception, KeyboardInterrupt, Signalled) as error:
        problems, code = _verdict(error, (DataError, CheckpointError))
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exception(error)
    for problem in problems:
        say(f"error: {problem}")
    return code


if __name__ == "__main__":
    sys.exit(main())
