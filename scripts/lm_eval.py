#!/usr/bin/env python3
"""lm-eval's own command line, with the models of eval.py as its model type `dllmexp`.

    python scripts/lm_eval.py --model dllmexp --tasks gsm8k --apply_chat_template \\
        --model_args alias=llada,task=gsm8k,tokens_per_step=2

Tasks, prompts, metrics, tables and files are lm-eval's; texts and likelihoods are those of eval.py
where the prompt is the same. --model_args has flags of eval.py without their dashes:

    alias       the model, as --model_alias; required
    pretrained  its checkpoint, in place of the alias's own
    task        the benchmark of eval.py whose protocol decides canvas, algorithm and the like;
                default: that of any other task
    protocol, tokens_per_step, dtype, likelihood, ...

Stop strings are the task's; its other generation_kwargs have no effect, as in eval.py. Samples are
not kept between runs: eval.py resumes. All other flags are lm-eval's, see --help.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # without this file

import eval as cli  # noqa: E402
from decoding.likelihood import LikelihoodConfig  # noqa: E402
from decoding.option import options_in  # noqa: E402
from experiment.arguments import parse  # noqa: E402
from experiment.checks import choose_device  # noqa: E402
from experiment.resolve import Job, resolve  # noqa: E402
from experiment.sample_cache import SampleCache  # noqa: E402
from experiment.workers import WorkerInfo  # noqa: E402
from tasks import PromptForm, TaskSpec  # noqa: E402
from utils import DllmexpError, UsageError  # noqa: E402

NAME = "dllmexp"
# stands for a task of which eval.py knows nothing
ANY = TaskSpec(
    name="lm_eval",
    build=lambda data, form: None,
    n_docs=0,
    sources=(),
    forms={"lm_eval": PromptForm(source="lm-eval")},
    headline="",
    foreign=True,
)


# flags of eval.py that lm-eval has under another name, and those that mean nothing to it
ELSEWHERE = {
    "system": "--system_instruction",
    "num_fewshot": "--num_fewshot",
    "limit": "--limit",
    "batch_size": "--batch_size",
    "device": "--device",
    "output_dir": "--output_path",
}
NO_EFFECT = frozenset(
    "data_dir plugin devices strict_exec no_exec unsafe_exec predictions export tag overwrite "
    "timed_batch".split()
)


def words_of(arguments: str) -> dict[str, str]:
    """--model_args as flag -> value. Raises UsageError."""
    words = {}
    for part in filter(None, arguments.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--model_args {part!r}: expected NAME=VALUE, such as alias=llada")
        words[name.strip()] = value.strip()
    if "repeats" in words:
        text = "lm-eval's task decides how many samples a document has; leave it out"
        raise UsageError(f"--model_args repeats={words['repeats']}: {text}")
    for name in words.keys() & (ELSEWHERE.keys() | NO_EFFECT):
        why = f"lm-eval has {ELSEWHERE[name]}" if name in ELSEWHERE else "it has no effect here"
        raise UsageError(f"--model_args {name}={words[name]}: {why}; leave it out")
    if "alias" not in words:
        raise UsageError(f"--model_args: alias is required: {', '.join(cli.MODEL_DEFAULTS)}")
    words["model_alias"] = words.pop("alias")
    if "pretrained" in words and words["model_alias"] in cli.MODEL_DEFAULTS:
        words[cli.MODEL_DEFAULTS[words["model_alias"]]["flag"]] = words.pop("pretrained")
    return words


def job_of(words: dict[str, str], spec: TaskSpec) -> Job:
    """What eval.py makes of the flags for the benchmark. Raises UsageError."""
    tasks = cli.TASKS | {spec.name: spec}
    argv = ["--task", spec.name]
    for name, value in words.items():
        argv += [f"--{name}"] if value == "True" else [f"--{name}", value]
    return resolve(*parse(argv, cli.MODEL_DEFAULTS, tasks), cli.MODEL_DEFAULTS, tasks)


def model(arguments: str, given: dict):
    """The harness behind --model_args; it generates and computes likelihoods.

    given: lm-eval's own batch_size and device.
    """
    words = words_of(arguments)
    name = words.pop("task", None)
    if name is not None and name not in cli.TASKS:
        raise UsageError(f"--model_args task={name}: there are: {', '.join(cli.TASKS)}")
    spec = cli.TASKS.get(name, ANY)
    scored = {flag for n, known in options_in(LikelihoodConfig).items() for flag in known.names(n)}
    # a benchmark's protocol decides the one or the other; lm-eval's tasks may ask for both
    choice = spec.kind == "choice"
    common = {"model_alias", "dtype", "seed"} | {e["flag"] for e in cli.MODEL_DEFAULTS.values()}
    common |= {"protocol"} if choice or name is None else set()
    scores = job_of(
        {n: v for n, v in words.items() if n in common | scored},
        spec if choice else replace(ANY, kind="choice"),
    )
    apart = scored | ({"protocol"} if choice else set())
    texts = job_of({n: v for n, v in words.items() if n not in apart}, ANY if choice else spec)
    size = str(given.get("batch_size") or 1)
    texts = replace(texts, batch_size="auto" if size.startswith("auto") else int(size))
    texts = replace(texts, config=replace(texts.config, likelihood=scores.config.likelihood))
    stub = SimpleNamespace(prefill=lambda doc: "", OUTPUT_TYPE="loglikelihood")
    device = choose_device(given.get("device"), WorkerInfo())
    return cli.get_model(texts, device, stub, SampleCache(generation_id=""))


def register() -> None:
    """Make `dllmexp` a model type of lm-eval."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    if NAME in MODEL_REGISTRY:
        return

    @register_model(NAME)
    class Dllmexp(LM):
        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config=None):
            return model(arg_string, additional_config or {})

        loglikelihood = loglikelihood_rolling = generate_until = None  # the harness has them


def main() -> int:
    import lm_eval.__main__ as command

    register()
    args = command.parse_eval_args(command.setup_parser())
    try:
        if args.model == NAME and args.gen_kwargs:
            raise UsageError(
                f"--gen_kwargs {args.gen_kwargs}: decoding is set in --model_args, with the names "
                "of eval.py"
            )
        command.cli_evaluate(args)
    except DllmexpError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
