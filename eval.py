"""Evaluate a masked-diffusion language model: arguments in, one result file a benchmark out.

    python eval.py --model_alias llada --task gsm8k --tokens_per_step 2

This file has the tables of models and benchmarks and the command line; experiment/run.py has a
run. Nothing heavy is imported until every cheap check has passed.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # Ctrl-C while modules load ends without a traceback; see main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import os
import sys

if __name__ == "__main__":  # PYTHONSAFEPATH=1 leaves it out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from decoding.algorithms import ALGORITHMS
from decoding.likelihood import ESTIMATORS
from experiment import plugins
from experiment.arguments import parse
from experiment.checks import input_problems, say
from experiment.describe import describe
from experiment.identity import forget, identified
from experiment.kept_model import KeptModel, free_memory
from experiment.resolve import Job, resolve
from experiment.run import Host, load_weights, run_job
from experiment.sample_cache import SampleCache
from experiment.signals import Interrupted, Signalled, signals_raise
from experiment.workers import worker_info
from models import FAMILIES
from tasks import (
    PromptForm,
    TaskSpec,
    bbh,
    build_task,
    choice,
    gsm8k,
    humaneval,
    ifeval,
    lines,
    mbpp,
    minerva,
    truthfulqa,
)
from tasks import protocols as cells
from tasks.installed import spec_of
from tasks.protocols import protocol
from utils import (
    EXIT_COMPLETE,
    EXIT_ENVIRONMENT,
    EXIT_OUTPUT,
    BadDataError,
    DllmexpError,
    ManyProblems,
    UsageError,
    nearest,
    out_of_memory,
    safe_streams,
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
#   uniform, official, fast_dllm   cells by task, see tasks/protocols.py; optional
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "llada": {
        "family": "llada",
        "checkpoint": "GSAI-ML/LLaDA-8B-Instruct",
        "flag": "llada_ckpt",
        "uniform": cells.LLADA_UNIFORM,
        "official": cells.LLADA_OFFICIAL,
        "fast_dllm": cells.LLADA_FAST_DLLM,
    },
    "llada1.5": {
        "family": "llada",
        "checkpoint": "GSAI-ML/LLaDA-1.5",
        "flag": "llada15_ckpt",
        "uniform": cells.LLADA15_UNIFORM,
        "official": cells.LLADA15_OFFICIAL,
        "fast_dllm": cells.LLADA15_FAST_DLLM,
    },
    "dream": {
        "family": "dream",
        "checkpoint": "Dream-org/Dream-v0-Instruct-7B",
        "flag": "dream_ckpt",
        "verifier": QWEN,
        "official": cells.DREAM_OFFICIAL,
        "fast_dllm": cells.DREAM_FAST_DLLM,
    },
    "diffucoder": {
        "family": "dream",
        "checkpoint": "apple/DiffuCoder-7B-cpGRPO",
        "flag": "diffucoder_ckpt",
        "verifier": QWEN,
        "official": cells.DIFFUCODER_OFFICIAL,
    },
    "llada-base": {
        "family": "llada",
        "checkpoint": "GSAI-ML/LLaDA-8B-Base",
        "flag": "llada_base_ckpt",
        "uniform": cells.LLADA_BASE_UNIFORM,
        "official": cells.LLADA_BASE_OFFICIAL,
    },
    "dream-base": {
        "family": "dream",
        "checkpoint": "Dream-org/Dream-v0-Base-7B",
        "flag": "dream_base_ckpt",
        "verifier": QWEN,
        "uniform": cells.DREAM_BASE_UNIFORM,
        "official": cells.DREAM_BASE_OFFICIAL,
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

# --task NAME: the benchmark, see its file in tasks/
TASKS: dict[str, TaskSpec] = {
    "humaneval": humaneval.SPEC,
    "mbpp": mbpp.SPEC,
    "gsm8k": gsm8k.SPEC,
    "truthfulqa": truthfulqa.SPEC,
    "lines": lines.SPEC,
    "humaneval_plus": humaneval.PLUS,
    "mbpp_plus": mbpp.PLUS,
    "math500": minerva.MATH500,
    "minerva_math": minerva.SPEC,
    "ifeval": ifeval.SPEC,
    "bbh": bbh.SPEC,
    "arc_challenge": choice.ARC_CHALLENGE,
    "arc_easy": choice.ARC_EASY,
    "hellaswag": choice.HELLASWAG,
    "winogrande": choice.WINOGRANDE,
    "piqa": choice.PIQA,
    "mmlu": choice.MMLU,
    "gpqa": choice.GPQA,
    "truthfulqa_mc1": choice.TRUTHFULQA_MC1,
    "truthfulqa_mc2": choice.TRUTHFULQA_MC2,
}


TABLES = {
    "model": MODEL_DEFAULTS,
    "task": TASKS,
    "algorithm": ALGORITHMS,
    "family": FAMILIES,
    "estimator": ESTIMATORS,
}


def get_prompt_template(alias: str, task: str, protocol_name: str = "uniform") -> PromptForm:
    """How a task is asked of a model under a protocol: wording, examples, prefill, stop strings."""
    spec = TASKS.get(task) or spec_of(task)
    family = FAMILIES[MODEL_DEFAULTS[alias]["family"]]
    return spec.forms[protocol(protocol_name, alias, MODEL_DEFAULTS, spec, family).form]


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
    job: Job, device: str, task, cache: SampleCache, load=load_weights, score=None, ahead=None
) -> _ProfilingHarness:
    """The lm-eval model of a job: tokenizer and config now, weights with the first sample.

    score, ahead: see experiment.generation.Generation.
    """
    from experiment.lmeval import reads_greedy
    from models import load_tokenizer, read_config

    run, entry = job.config, MODEL_DEFAULTS[job.config.model_alias]
    tokenizer, config = load_tokenizer(run.checkpoint), read_config(run.checkpoint)
    if run.verifier is not None:  # it reads what the model writes: both must have the positions
        room = read_config(run.verifier).max_length
        config = replace(config, max_length=min(config.max_length, room))
    if run.chat_template and not tokenizer.chat_template:
        raise BadDataError(
            f"checkpoint {run.checkpoint} has no chat template, which the {run.protocol} "
            "protocol needs; --no_chat_template asks without one"
        )
    if run.start_token and tokenizer.bos_token is None:
        raise BadDataError(
            f"checkpoint {run.checkpoint} has no start token (bos_token of tokenizer_config.json), "
            f"with which {run.model_alias} begins its prompts"
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
        start=tokenizer.bos_token if run.start_token else "",
        likelihood=run.likelihood,
        greedy=reads_greedy(task),
        cache=cache,
        batch_size=job.batch_size or 1,
        halves=run.timed_batch is None,
        score=score,
        ahead=ahead,
    )


def run(argv: list[str], host: Host | None = None) -> int:
    """Everything between the command line and the exit code."""
    plugins.load(argv, TABLES)
    args, problems = parse(argv, MODEL_DEFAULTS, TASKS)
    jobs = jobs_of(args, problems)
    worker = worker_info(os.environ)
    if worker.size > 1 and jobs[0].devices:
        raise UsageError(
            f"--devices {jobs[0].devices}: a launcher has started {worker.size} processes already; "
            "leave it out"
        )
    if worker.size > 1 and len(jobs) > 1:
        raise UsageError(
            f"--task {args.task}: a launcher has started {worker.size} processes, which run one "
            "task; give one, or let --devices start the processes"
        )
    entry = MODEL_DEFAULTS[jobs[0].config.model_alias]
    if entry.get("harness"):
        harness_of(entry, jobs[0].config.family)  # a bad one is refused before anything is read
    if args.print_output_path:
        print(*(job.path for job in jobs), sep="\n")
    elif args.dry_run:
        forget()
        print(*(describe(identified(job)) for job in jobs), sep="\n\n")
    elif args.show_prompt is not None:
        print(*(shown_prompt(job, args.show_prompt) for job in jobs), sep="\n\n")
    elif len(jobs) > 1:
        return run_several(jobs, argv, host or Host())
    else:
        host = host or Host()
        ask = partial(get_model, load=host.load)
        return run_job(jobs[0], worker, argv, host, MODEL_DEFAULTS, ask)
    return EXIT_COMPLETE


def jobs_of(args: Namespace, problems: list[str]) -> list[Job]:
    """The job of each name in --task. Raises DllmexpError with the problems of all of them."""
    names = list(dict.fromkeys(args.task.split(","))) if args.task else [args.task]
    jobs: list[Job] = []
    errors: list[DllmexpError] = [UsageError(problems)] if problems else []
    if len(names) > 1:
        if args.predictions is not None:
            errors.append(
                UsageError("--predictions: its texts answer one benchmark; give one --task")
            )
        if unknown := [n for n in names if n not in TASKS and not n.startswith(cells.PREFIX)]:
            known = [*TASKS, f"{cells.PREFIX}NAME"]
            text = f"--task {', '.join(map(repr, unknown))}: not known{nearest(unknown[0], known)}"
            errors.append(UsageError(f"{text}; there are: {', '.join(known)}"))
            names = [name for name in names if name not in unknown]
    for name in names:
        one = Namespace(**vars(args) | {"task": name})
        try:
            jobs.append(resolve(one, problems, MODEL_DEFAULTS, TASKS))
        except UsageError as error:
            errors += [error, *input_problems(one, MODEL_DEFAULTS, TASKS)]
        except ManyProblems as error:
            errors.append(error)
    if errors:
        raise ManyProblems(errors)
    return jobs


def run_several(jobs: Sequence[Job], argv: list[str], host: Host) -> int:
    """Run one job after the other with the model loaded once. Returns the greatest exit code.

    A job that fails does not stop the others; a signal stops all.
    """
    host = replace(host, load=KeptModel(host.load).load)
    codes = {}
    for number, job in enumerate(jobs, 1):
        name = job.config.task
        say(f"task {number} of {len(jobs)}: {name}")
        own, ask = [*argv, "--task", name], partial(get_model, load=host.load)
        try:
            codes[name] = run_job(job, worker_info(os.environ), own, host, MODEL_DEFAULTS, ask)
            sys.stdout.flush()
        except Interrupted:
            raise
        except Exception as error:
            codes[name] = report_failure(error, argv, f"{name}: ")
        free_memory()
    if failed := [name for name, code in codes.items() if code]:
        say(f"{len(failed)} of {len(jobs)} tasks without a complete result: {', '.join(failed)}")
    return max(codes.values())


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
    requests = lmeval.requests_of(lm, task, job.config, doc_id)
    request = requests[0]
    form = get_prompt_template(job.config.model_alias, job.config.task, job.config.protocol)
    if request.continuation is not None:
        return "\n".join(
            [
                *dict.fromkeys(r.prompt for r in requests),
                "-" * 80,
                *(f"{len(r.target_ids)} tokens: {r.continuation!r}" for r in requests),
                f"document {doc_id} of {n_docs}; {len(request.prompt_ids)} tokens before option 0",
                f"form {job.config.prompt_form}: {form.source}",
            ]
        )
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


def _verdict(error: BaseException) -> tuple[list[str], int]:
    """The error lines of a failure, and the exit code."""
    if isinstance(error, DllmexpError):
        return error.problems, error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return [
            f"package {error.name} is missing; pip install -r requirements.txt"
        ], EXIT_ENVIRONMENT
    if isinstance(error, KeyboardInterrupt | Signalled):
        ended = Interrupted.by(error)
        return ended.problems, ended.exit_code
    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        way_out = "a free device, a smaller --batch_size or --dtype bfloat16 helps"
        return [f"out of memory: {first}; {way_out}"], EXIT_ENVIRONMENT
    if isinstance(error, FileNotFoundError) and "temporary directory" in first:
        return [f"{first}; set TMPDIR to a directory that can be written"], EXIT_ENVIRONMENT
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)
    if isinstance(error, OSError) and error.errno in full:
        # what is left in stdout's buffer must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return [f"cannot write: {error.strerror}"], EXIT_OUTPUT
    return [f"{type(error).__name__}: {first}; this should not happen, --debug shows where"], 1


def main(argv: list[str] | None = None, host: Host | None = None) -> int:
    """Run. A failure is one line per problem on stderr and an exit code.

    --debug prints the traceback too.
    """
    argv = sys.argv[1:] if argv is None else argv
    safe_streams()
    try:
        with signals_raise():
            code = run(argv, host)
            sys.stdout.flush()
            return code
    except (Exception, KeyboardInterrupt, Signalled) as error:
        return report_failure(error, argv)


def report_failure(error: BaseException, argv: list[str], where: str = "") -> int:
    """Print one line for each problem of a failure, behind `where`. Returns its exit code."""
    problems, code = _verdict(error)
    if "--debug" in argv:
        traceback.print_exception(error)
    for problem in problems:
        say(f"error: {where}{problem}")
    return code


if __name__ == "__main__":
    sys.exit(main())
