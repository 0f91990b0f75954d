"""The flags, their help, and the values they take one by one: argv -> Namespace and what is wrong with it."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from decoding.algorithms import ALGORITHMS, FAMILIES, OPTIONS, algorithms_of
from decoding.kv_cache import CACHES
from utils import UsageError, nearest

BLOCK_LENGTH = 32  # of algorithms that go in blocks where the protocol knows none: Fast-dLLM's
KV_WINDOW = 16  # APD's
Models = Mapping[str, Mapping[str, str]]  # MODEL_DEFAULTS of eval.py
EXIT_CODES = (
    "Exit codes: 0 complete, 2 usage or configuration, 3 environment (no GPU, no sandbox), 4 data or checkpoint, "
    "5 finished but some samples failed, 74 not writable or disk full, 75 another process has the job, "
    "128+n signal n."
)


class Parser(argparse.ArgumentParser):
    """argparse that raises its problem instead of printing usage and leaving."""

    def error(self, message: str):
        raise UsageError(re.sub(r"^argument (--\w+): ", r"\1: ", message))


class _Values:
    """Makes converters that note a bad value and go on, so that every one of them is reported."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, flag: str, read: Callable[[str], Any], allowed: str) -> Callable[[str], Any]:
        """A converter for --flag; read raises ValueError or KeyError for what is not `allowed`."""

        def convert(text: str):
            try:
                return read(text)
            except (ValueError, KeyError):
                self.problems.append(f"--{flag} {text}: must be {allowed}")
                return None

        return convert


def _whole(low: int) -> tuple[Callable[[str], int], str]:
    def read(text: str) -> int:
        if int(text) < low:
            raise ValueError
        return int(text)

    return read, f"a whole number of at least {low}"


def _real(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


COUNT, SEED = _whole(1), _whole(0)
BATCH = (lambda text: text if text == "auto" else COUNT[0](text), f"{COUNT[1]}, or auto")
REAL, SHARE = (_real, "a number of at least 0"), (_share, "a number above 0 and at most 1")
TRUTH = ({"true": True, "false": False}.__getitem__, "true or false")


class _Group:
    """A titled group of flags."""

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        values: _Values,
        title: str,
        description: str | None = None,
    ):
        self.group, self.values = parser.add_argument_group(title, description), values

    def add(
        self,
        flag: str,
        metavar: str,
        text: str,
        kind: tuple[Callable[[str], Any], str] | None = None,
        **more,
    ):
        """A flag that takes a value; `kind` says how it is read. Not given: None, or default=..."""
        if kind is not None:
            more["type"] = self.values.of(flag, *kind)
        self.group.add_argument(f"--{flag}", metavar=metavar, help=text, **more)

    def switch(self, flag: str, text: str) -> None:
        self.group.add_argument(f"--{flag}", action="store_true", help=text)


def build_parser(models: Models, tasks: Sequence[str], values: _Values) -> argparse.ArgumentParser:
    """The parser. Choices are checked by `resolve`, which names the nearest one; None means: not given."""
    parser = Parser(
        prog="eval.py",
        allow_abbrev=False,
        epilog=EXIT_CODES,
        description="Evaluate a masked-diffusion language model on one benchmark and write one result file.",
    )
    _what(_Group(parser, values, "what is evaluated"), models, tasks)
    rule = "Where a flag is not given, the protocol decides; a flag always wins, and the result says so."
    _steps(_Group(parser, values, "decoding", rule))
    _parallel(_Group(parser, values, "options of single algorithms, and the KV cache"))
    left = [name for name, algorithm in ALGORITHMS.items() if algorithm.left_to_right]
    _left_to_right(
        _Group(parser, values, "algorithms that go left to right", f"{', '.join(left)}."), models
    )
    _sampling(_Group(parser, values, "sampling and precision"))
    _running(_Group(parser, values, "running"))
    _output(_Group(parser, values, "output"))
    return parser


def _what(group: _Group, models: Models, tasks: Sequence[str]) -> None:
    group.add("model_alias", "NAME", f"The model: {', '.join(models)}. Required.")
    group.add(
        "task",
        "NAME",
        f"The benchmark: {', '.join(tasks)}; or lm_eval:NAME, any other "
        "generation task that the installed lm-eval defines, with its data from the hub. Required.",
    )
    group.add(
        "protocol",
        "NAME",
        "Where prompts, lengths, algorithm and sampling come from. 'uniform' is the same for all models, so that they "
        "can be compared; 'official' is what the model's authors report with, so that a published score can be "
        "reproduced. Default: uniform.",
        default="uniform",
    )
    for alias, entry in models.items():
        group.add(
            entry["flag"],
            "DIR_OR_HUB_ID",
            f"Checkpoint of {alias}: a directory in the hub's layout, or a hub id. Default: {entry['checkpoint']}.",
        )
    group.add(
        "predictions",
        "FILE.jsonl",
        'Score texts that were made elsewhere instead of generating: one line {"doc_id": n, "text": "..."} for each '
        "document, n counting from 0 in the benchmark's order. Texts are cut at the task's stop strings as generated "
        "ones are. No checkpoint is needed, and decoding flags have no effect.",
    )


def _steps(group: _Group) -> None:
    table = "; ".join(f"{family} family: {', '.join(algorithms_of(family))}" for family in FAMILIES)
    group.add(
        "alg",
        "NAME",
        f"The decoding algorithm: which positions are committed at each step ({table}).",
    )
    group.add(
        "remasking", "NAME", "LLaDA's name for --alg. Give either, or both with the same value."
    )
    group.add(
        "tokens_per_step",
        "K",
        "Tokens committed per step; more is faster and usually worse. LLaDA takes (gen_length / block_length) * "
        "ceil(block_length / K) steps, Dream and DiffuCoder ceil(gen_length / K). The least that a step commits where "
        "the algorithm decides itself. Default: 1.",
        COUNT,
    )
    group.add(
        "num_steps",
        "N",
        "Decoding steps per sample, the same knob seen from the other side. It decides where both are given; if they "
        "disagree the realised tokens per step are printed and stored. Default: from --tokens_per_step.",
        COUNT,
    )
    text = "Length of the canvas in tokens, which is the longest that an answer can be. Default: the protocol's."
    group.add("gen_length", "N", text, COUNT)
    text = "Dream's name for --gen_length. Give either, or both with the same value."
    group.add("max_new_tokens", "N", text, COUNT)
    group.add(
        "block_length",
        "N",
        "Decode the canvas in blocks of this many tokens, left to right; it must divide --gen_length. Default: the "
        f"protocol's for LLaDA's own algorithms; {BLOCK_LENGTH} for those that go in blocks where the protocol has none: "
        f"{', '.join(name for name, a in ALGORITHMS.items() if a.blocks and a.schedule == 'adaptive')}; else the whole "
        "canvas.",
        COUNT,
    )
    ending = ", ".join(name for name, algorithm in ALGORITHMS.items() if algorithm.ends_at_eos)
    group.switch(
        "no_early_exit",
        "Fill the whole canvas even where the answer can no longer change. Answers are the same either way; the result "
        f"says how many forward passes the early exit saved. {ending} end at the end token in any case: that is part "
        "of the algorithm.",
    )


def _parallel(group: _Group) -> None:
    for name, algorithms in OPTIONS.items():
        uses: dict[str, list[str]] = {}
        for algorithm in algorithms:
            option = ALGORITHMS[algorithm].options[name]
            uses.setdefault(f"{option.help} (default {option.default:g})", []).append(algorithm)
        text = "; ".join(f"{', '.join(users)}: {use}" for use, users in uses.items())
        group.add(name, "N" if option.whole else "X", f"{text}.", REAL)
    group.add(
        "kv_cache",
        "NAME",
        f"{', '.join(CACHES)}. Keys and values of earlier forward passes that are taken over: 'prefix' those left of the "
        "block, 'dual' those right of it too, 'window' those further left than --kv_window. Faster, and not exact: what "
        "was committed since does not reach them. Default: none.",
    )
    group.add(
        "cache_refresh",
        "N",
        "With a cache, compute all columns on every Nth forward pass of a block, the first included. 1 gives the tokens "
        "of no cache. Default: on the first alone.",
        COUNT,
    )


def _left_to_right(group: _Group, models: Models) -> None:
    group.add(
        "kv_window",
        "W",
        "Left to right: compute again only the last W committed columns before those that the last step committed, that "
        f"step's first included, and keep what is further left (--kv_cache window, whose default it is to be {KV_WINDOW}).",
        COUNT,
    )
    group.add(
        "max_lookahead",
        "M",
        "Left to right: the model sees, and a step may commit, at most M positions from the first open one on. Default: "
        "all that are left.",
        COUNT,
    )
    own = ", ".join(
        f"{entry['verifier']} for {alias}" for alias, entry in models.items() if "verifier" in entry
    )
    group.add(
        "verifier_ckpt",
        "DIR_OR_HUB_ID",
        f"Autoregressive model that checks what {' and '.join(verified())} draft: a checkpoint of Qwen2's layout with the "
        f"model's own tokenizer. Default: {own}.",
    )


def verified() -> list[str]:
    """Names of the algorithms that a verifier belongs to."""
    return [name for name, algorithm in ALGORITHMS.items() if algorithm.verification is not None]


def _sampling(group: _Group) -> None:
    group.add(
        "temperature",
        "T",
        "0 takes the likeliest token at every position; above 0 tokens are drawn, from a generator seeded per sample. "
        "Default: the protocol's.",
        REAL,
    )
    inactive = "Has no effect at temperature 0, and the run says so. Default: the protocol's."
    group.add(
        "top_p",
        "P",
        f"Draw only from the likeliest tokens that together have probability P. {inactive}",
        SHARE,
    )
    group.add("top_k", "N", f"Draw only from the N likeliest tokens. {inactive}", COUNT)
    group.add(
        "alg_temp",
        "T",
        "Dream family: above 0 the positions to commit are themselves drawn, by softmax(score / T). "
        "Default: the protocol's.",
        REAL,
    )
    end = "Without a value it means true. Default: the protocol's."
    text = (
        f"LLaDA family: never propose the end-of-text token (the end of turn still can be). {end}"
    )
    group.add("logits_eos_inf", "true|false", text, TRUTH, nargs="?", const=True)
    text = f"LLaDA family: end tokens get no confidence, so they are committed last. {end}"
    group.add("confidence_eos_eot_inf", "true|false", text, TRUTH, nargs="?", const=True)
    group.add(
        "confidence_dtype",
        "NAME",
        "Precision in which probabilities and scores are computed: float64, float32, or model for that of the logits, "
        "which in bfloat16 ties most confident positions. Default: float64.",
        default="float64",
    )
    group.add(
        "dtype",
        "NAME",
        "Precision of the weights and of the forward pass: bfloat16, float16 or float32. Default: bfloat16, as "
        "published.",
        default="bfloat16",
    )
    group.add(
        "seed",
        "N",
        "Start of all randomness. Each sample's generator is seeded from this, its prompt and its repeat. Default: 0.",
        SEED,
        default=0,
    )


def _running(group: _Group) -> None:
    group.add("limit", "N", "Only the first N documents, for a trial. Default: all.", COUNT)
    group.add(
        "batch_size",
        "N",
        "Samples in flight at a time; 'auto' takes what fits into the free memory and helps. At float32 it does not "
        "change a token. Default: 1.",
        BATCH,
        default=1,
    )
    group.switch(
        "compile",
        "Compile the model's layers with torch.compile. Faster on a GPU, but rounding changes and so tokens may: the "
        "result is another configuration's. Where it does not work the run says so and goes on without.",
    )
    group.switch(
        "cuda_graphs",
        "Replay forward passes of up to 1024 columns as CUDA graphs, which saves their launches. Each graph is compared "
        "with the plain path when it is captured; tokens stay the same.",
    )
    text = "cuda, cuda:1, ... or cpu. Default: cuda where there is one, else cpu; it is printed."
    group.add("device", "NAME", text)
    group.add(
        "devices",
        "LIST",
        "Share the samples among several processes on this node, one for each device of a list such as 0,1,2,3 (or "
        "cpu,cpu). The result is that of one process. Under torchrun or accelerate launch it is not needed.",
    )
    group.add(
        "unsafe_exec",
        "WHAT",
        "Run generated code also where it cannot be confined: 'fs' accepts that it can read and write your files, 'all' "
        "that it can do what you can do. Not needed where the sandbox works; the run says what it found.",
    )
    group.switch(
        "no_exec",
        "Run no generated code: the result keeps the programs and is not complete. Score it on another machine with "
        "--predictions RESULT.json, or here by the same command without --no_exec.",
    )
    group.add(
        "data_dir",
        "DIR",
        "Directory with the benchmarks' original files, to run without a network. Default: the environment variable "
        "DLLMEXP_DATA_DIR; unset, data comes from the hub.",
        default=os.environ.get("DLLMEXP_DATA_DIR") or None,
    )
    group.switch("debug", "Print tracebacks where something fails.")


def _output(group: _Group) -> None:
    group.add("output_dir", "DIR", "Where results go. Default: results.", default="results")
    group.add(
        "tag",
        "NAME",
        "Becomes part of the result's file name, to keep variants apart. Default: none.",
    )
    group.switch(
        "overwrite",
        "Run again although a finished result is there, and replace it. Without it, a finished result of the same "
        "configuration is reported and kept, and one of another configuration is an error.",
    )
    text = "Print the normalised configuration, the schedule and the path of the result, and leave. Loads nothing."
    group.switch("dry_run", text)
    group.switch("print_output_path", "Print the path of the result and leave.")


def parse(
    argv: Sequence[str] | None, models: Models, tasks: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Arguments and the problems with single values. Raises UsageError where argparse cannot go on."""
    values = _Values()
    parser = build_parser(models, tasks, values)
    args, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = [
        f"unknown argument {word!r}{nearest(word.split('=')[0], flags) or '; --help lists them all'}"
        for word in unknown
        if word.startswith("--")
    ]
    if unknown and not problems:
        problems = [f"unexpected argument {unknown[0]!r}; every value follows its --flag"]
    return args, values.problems + problems
