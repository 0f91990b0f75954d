"""The command line's arguments, and what they mean together: argv -> Job.

No torch, no files read: everything here is decided from the arguments and the protocol alone. All problems are
collected and raised at once.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithms_of
from decoding.schedule import CONFIDENCE_DTYPES, DecodeConfig, Schedule, ScheduleError, make_schedule
from tasks.protocols import PROTOCOLS, Protocol, protocol
from utils import RunConfig, UsageError, nearest, result_name, run_lengths

DTYPES = ("bfloat16", "float16", "float32")
# an explicit flag of this name wins over the protocol's value of this name
PROTOCOL_FLAGS = ("algorithm", "gen_length", "block_length", "temperature", "top_p", "top_k", "alg_temp", "logits_eos_inf", "confidence_eos_eot_inf")


@dataclass(frozen=True)
class Job:
    """One experiment and how to run it.

    config:    what decides the numbers. decode: its decoding part, ready for decoding.decode.
    overrides: flag -> {"protocol": value, "run": value} for every flag that departs from the protocol.
    notes:     what a user should be told: sentences, printed and stored.
    path:      where the result goes.
    """

    config: RunConfig
    decode: DecodeConfig
    protocol: Protocol
    overrides: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    output_dir: Path
    tag: str | None
    limit: int | None
    batch_size: int
    device: str | None
    data_dir: Path | None
    predictions: Path | None
    overwrite: bool

    @property
    def schedule(self) -> Schedule:
        return self.decode.schedule

    @property
    def path(self) -> Path:
        return self.output_dir / result_name(self.config, tag=self.tag, limit=self.limit)


# ---------------------------------------------------------------- values

class _Parser(argparse.ArgumentParser):
    """argparse that raises its problem instead of printing usage and leaving."""

    def error(self, message: str):
        raise UsageError(re.sub(r"^argument (--\w+): ", r"\1: ", message))


class _Values:
    """Converters that note a bad value and go on, so that every one of them is reported."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def _number(self, flag: str, kind: type, allowed: str, good: Callable[[Any], bool]) -> Callable[[str], Any]:
        def convert(text: str):
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not good(value):
                self.problems.append(f"--{flag} {text}: must be {allowed}")
                return None
            return value

        return convert

    def integer(self, flag: str, low: int) -> Callable[[str], int | None]:
        return self._number(flag, int, f"a whole number of at least {low}", lambda v: v >= low)

    def real(self, flag: str) -> Callable[[str], float | None]:
        return self._number(flag, float, "a number", lambda v: v == v and abs(v) != float("inf"))

    def truth(self, flag: str) -> Callable[[str], bool | None]:
        def convert(text: str):
            words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
            if text.lower() not in words:
                self.problems.append(f"--{flag} {text}: must be true or false")
            return words.get(text.lower())

        return convert


def build_parser(models: Mapping[str, Mapping[str, str]], tasks: Sequence[str], values: _Values) -> argparse.ArgumentParser:
    """The parser. Choices are checked by `resolve`, which names the nearest one; None means: not given."""
    parser = _Parser(
        prog="eval.py", allow_abbrev=False,
        description="Evaluate a masked-diffusion language model on one benchmark and write one result file.",
        epilog="Exit codes: 0 complete, 2 usage or configuration, 3 environment (no GPU, no sandbox), 4 data or checkpoint, "
        "5 finished but some samples failed, 74 not writable or disk full, 75 another process has the job, 128+n signal n.",
    )
    _what(parser.add_argument_group("what is evaluated"), models, tasks)
    _decoding(parser.add_argument_group(
        "decoding", "Where a flag is not given, the protocol decides; a flag always wins, and the result says so."), values)
    _running(parser.add_argument_group("running"), values)
    _output(parser.add_argument_group("output"), values)
    return parser


def _what(group, models: Mapping[str, Mapping[str, str]], tasks: Sequence[str]) -> None:
    families = "; ".join(f"{family}: {', '.join(algorithms_of(family))}" for family in ("llada", "dream"))
    group.add_argument("--model_alias", metavar="NAME", help=f"The model: {', '.join(models)}. Required.")
    group.add_argument("--task", metavar="NAME", help=f"The benchmark: {', '.join(tasks)}. Required.")
    group.add_argument(
        "--protocol", metavar="NAME", default="uniform",
        help="Where prompts, lengths, algorithm and sampling come from. 'uniform' is the same for all models, so that they can "
        "be compared; 'official' is what the model's authors report with, so that a published score can be reproduced. "
        "Default: uniform.")
    group.add_argument(
        "--alg", metavar="NAME", help=f"The decoding algorithm: which positions are committed at each step ({families}).")
    group.add_argument("--remasking", metavar="NAME", help="LLaDA's name for --alg. Give either, or both with the same value.")
    for alias, entry in models.items():
        group.add_argument(
            f"--{entry['flag']}", metavar="DIR_OR_HUB_ID",
            help=f"Checkpoint of {alias}: a directory in the hub's layout, or a hub id. Default: {entry['checkpoint']}.")
    group.add_argument(
        "--predictions", metavar="FILE.jsonl",
        help='Score texts that were made elsewhere instead of generating: one line {"doc_id": n, "text": "..."} for each document, '
        "n counting from 0 in the benchmark's order. Texts are cut at the task's stop strings as generated ones are. "
        "No checkpoint is needed, and decoding flags have no effect.")


def _decoding(group, values: _Values) -> None:
    group.add_argument(
        "--tokens_per_step", metavar="K", type=values.integer("tokens_per_step", 1),
        help="Tokens committed per step; more is faster and usually worse. LLaDA takes (gen_length / block_length) * "
        "ceil(block_length / K) steps, Dream and DiffuCoder ceil(gen_length / K). Default: 1.")
    group.add_argument(
        "--num_steps", metavar="N", type=values.integer("num_steps", 1),
        help="Decoding steps per sample, the same knob seen from the other side. It decides where both are given; if they "
        "disagree the realised tokens per step are printed and stored. Default: from --tokens_per_step.")
    group.add_argument(
        "--gen_length", metavar="N", type=values.integer("gen_length", 1),
        help="Length of the canvas in tokens: what an answer can be long at most. Default: the protocol's.")
    group.add_argument(
        "--max_new_tokens", metavar="N", type=values.integer("max_new_tokens", 1),
        help="Dream's name for --gen_length. Give either, or both with the same value.")
    group.add_argument(
        "--block_length", metavar="N", type=values.integer("block_length", 1),
        help="LLaDA decodes the canvas in blocks of this many tokens, left to right; it must divide --gen_length. "
        "Algorithms without blocks refuse it. Default: the protocol's.")
    group.add_argument(
        "--temperature", metavar="T", type=values.real("temperature"),
        help="0 takes the likeliest token at every position; above 0 tokens are drawn, from a generator seeded per sample. "
        "Default: the protocol's.")
    group.add_argument(
        "--top_p", metavar="P", type=values.real("top_p"),
        help="Draw only from the likeliest tokens that together have probability P. Has no effect at temperature 0. Default: the protocol's.")
    group.add_argument(
        "--top_k", metavar="N", type=values.integer("top_k", 1),
        help="Draw only from the N likeliest tokens. Has no effect at temperature 0. Default: the protocol's.")
    group.add_argument(
        "--alg_temp", metavar="T", type=values.real("alg_temp"),
        help="Dream family: above 0 the positions to commit are themselves drawn, by softmax(score / T). Default: the protocol's.")
    group.add_argument(
        "--logits_eos_inf", metavar="true|false", nargs="?", const=True, type=values.truth("logits_eos_inf"),
        help="LLaDA family: never propose the end-of-text token (the end of turn still can be). Default: the protocol's.")
    group.add_argument(
        "--confidence_eos_eot_inf", metavar="true|false", nargs="?", const=True, type=values.truth("confidence_eos_eot_inf"),
        help="LLaDA family: end tokens get no confidence, so they are committed last. Default: the protocol's.")
    group.add_argument(
        "--confidence_dtype", metavar="NAME", default="float64",
        help="Precision in which probabilities and scores are computed: float64, float32, or model for that of the logits, which "
        "in bfloat16 ties most confident positions. Default: float64.")
    group.add_argument(
        "--no_early_exit", action="store_true",
        help="Fill the whole canvas even where the answer can no longer change. Answers are the same either way; the result "
        "says how many forward passes the early exit saved.")


def _running(group, values: _Values) -> None:
    group.add_argument(
        "--limit", metavar="N", type=values.integer("limit", 1), help="Only the first N documents, for a trial. Default: all.")
    group.add_argument(
        "--batch_size", metavar="N", type=values.integer("batch_size", 1), default=1,
        help="Samples in flight at a time. At float32 it does not change a token. Default: 1.")
    group.add_argument(
        "--seed", metavar="N", type=values.integer("seed", 0), default=0,
        help="Start of all randomness. Each sample's generator is seeded from this, its prompt and its repeat. Default: 0.")
    group.add_argument(
        "--dtype", metavar="NAME", default="bfloat16",
        help="Precision of the weights and of the forward pass: bfloat16, float16 or float32. Default: bfloat16, as published.")
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:1, ... or cpu. Default: cuda where there is one, else cpu; it is printed.")
    group.add_argument(
        "--data_dir", metavar="DIR", default=os.environ.get("DLLMEXP_DATA_DIR") or None,
        help="Directory with the benchmarks' original files, to run without a network. Default: the environment variable "
        "DLLMEXP_DATA_DIR; unset, data comes from the hub.")
    group.add_argument("--debug", action="store_true", help="Print tracebacks where something fails.")


def _output(group, values: _Values) -> None:
    group.add_argument("--output_dir", metavar="DIR", default="results", help="Where results go. Default: results.")
    group.add_argument("--tag", metavar="NAME", help="Becomes part of the result's file name, to keep variants apart.")
    group.add_argument(
        "--overwrite", action="store_true",
        help="Run again although a finished result is there, and replace it. Without it, a finished result of the same "
        "configuration is reported and kept, and one of another configuration is an error.")
    group.add_argument(
        "--dry_run", action="store_true",
        help="Print the normalised configuration, the schedule and the path of the result, and leave. Loads nothing.")
    group.add_argument("--print_output_path", action="store_true", help="Print the path of the result and leave.")


def parse(argv: Sequence[str] | None, models: Mapping[str, Mapping[str, str]], tasks: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments and the problems with single values. Raises UsageError where argparse cannot go on."""
    values = _Values()
    parser = build_parser(models, tasks, values)
    args, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = [
        f"unknown argument {word!r}{nearest(word.split('=')[0], flags) or '; --help lists them all'}"
        for word in unknown if word.startswith("--")
    ]
    if unknown and not problems:
        problems = [f"unexpected argument {unknown[0]!r}; every value follows its --flag"]
    return args, values.problems + problems


# ---------------------------------------------------------------- meaning

def _choice(flag: str, value: str | None, allowed: Sequence[str], problems: list[str], noun: str = "there are", known: str = "known") -> str | None:
    """`value` where it is allowed; otherwise a problem with the nearest one, and None."""
    if value in allowed:
        return value
    listed = f"{noun}: {', '.join(allowed)}"
    if value is None:
        problems.append(f"--{flag} is required; {listed}")
    else:
        problems.append(f"--{flag} {value!r} is not {known}{nearest(value, allowed)}; {listed}")
    return None


def _one_of_two(args: argparse.Namespace, first: str, second: str, problems: list[str]) -> Any:
    """The value of two names for one thing; a problem naming both where they are given and differ."""
    a, b = getattr(args, first), getattr(args, second)
    if a is not None and b is not None and a != b:
        problems.append(f"--{first} {a} and --{second} {b} are two names for one thing; give one, or the same value")
    return a if a is not None else b


def _decode_config(args: argparse.Namespace, proto: Protocol, given: dict[str, Any], family: str, problems: list[str]) -> DecodeConfig | None:
    """The decoding configuration, or None and its problems."""
    value = {name: getattr(proto, name) if given[name] is None else given[name] for name in PROTOCOL_FLAGS}
    if given["block_length"] is None and not ALGORITHMS[value["algorithm"]].blocks:
        value["block_length"] = None  # the protocol's is meant for its own algorithm
    elif given["block_length"] is None and value["block_length"] is None:
        value["block_length"] = value["gen_length"]
    k = args.tokens_per_step if args.tokens_per_step or args.num_steps else 1
    try:
        schedule = make_schedule(value["algorithm"], value["gen_length"], value["block_length"], k, args.num_steps)
    except ScheduleError as error:
        from_protocol = given["block_length"] is None and value["block_length"] not in (None, value["gen_length"])
        hint = f" (block_length is the {proto.name} protocol's; --block_length changes it)" if from_protocol else ""
        problems += [f"--{text}{hint}" for text in error.problems]
        return None
    config = DecodeConfig(
        schedule, value["temperature"], value["top_p"], value["top_k"], value["alg_temp"],
        confidence_dtype=args.confidence_dtype, logits_eos_inf=bool(value["logits_eos_inf"]),
        confidence_eos_eot_inf=bool(value["confidence_eos_eot_inf"]), early_exit=not args.no_early_exit,
    )
    problems += [f"--{text}" for text in config.problems(family)]
    return config


def _notes(args: argparse.Namespace, config: DecodeConfig) -> list[str]:
    """What the user should be told about flags that act otherwise than they look."""
    notes = [config.schedule.note] if config.schedule.note else []
    if args.predictions:
        given = [f"--{n}" for n in ("alg", "remasking", "tokens_per_step", "num_steps", "gen_length", "max_new_tokens",
                                    "block_length", "temperature", "top_p", "top_k", "alg_temp") if getattr(args, n) is not None]
        return [f"texts are scored, not generated: {', '.join(given)} have no effect"] if given else []
    if config.temperature == 0:
        inactive = [f"{n} {getattr(config, n):g}" for n in ("top_p", "top_k") if getattr(config, n) is not None]
        if inactive:
            notes.append(f"{' and '.join(inactive)} inactive at temperature 0: nothing is drawn")
    return notes


def _overrides(args: argparse.Namespace, proto: Protocol, given: dict[str, Any], decode: DecodeConfig) -> dict[str, dict[str, Any]]:
    """Flags whose value departs from the protocol's. The protocol's tokens_per_step is 1."""
    schedule, inactive = decode.schedule, decode.temperature == 0
    differ = {
        name: {"protocol": getattr(proto, name), "run": value}
        for name, value in given.items()
        if value is not None and value != getattr(proto, name) and not (inactive and name in ("top_p", "top_k"))
    }
    if schedule.tokens_per_step != 1 and schedule.realised_tps != 1:
        differ["tokens_per_step"] = {"protocol": 1, "run": schedule.tokens_per_step or round(schedule.realised_tps, 4)}
    return differ


def resolve(args: argparse.Namespace, problems: list[str], models: Mapping[str, Mapping[str, str]], tasks: Sequence[str]) -> Job:
    """What the arguments mean together. `problems` are those already found; raises UsageError with all of them."""
    problems = list(problems)
    alias = _choice("model_alias", args.model_alias, list(models), problems)
    task = _choice("task", args.task, tasks, problems)
    name = _choice("protocol", args.protocol, PROTOCOLS, problems)
    _choice("dtype", args.dtype, DTYPES, problems, "allowed")
    if _choice("confidence_dtype", args.confidence_dtype, CONFIDENCE_DTYPES, problems, "allowed") is None:
        args.confidence_dtype = "float64"  # one problem is enough
    algorithm = _one_of_two(args, "alg", "remasking", problems)
    gen_length = _one_of_two(args, "gen_length", "max_new_tokens", problems)
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        problems.append(f"--device {args.device!r} is not known; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if args.tag is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.tag):
        problems.append(f"--tag {args.tag!r} becomes part of a file name; allowed: letters, digits, '.', '_', '-', not first a dot")
    if alias is None:
        algorithm is not None and _choice("alg", algorithm, list(ALGORITHMS), problems)
        raise UsageError(problems)
    family = models[alias]["family"]
    if algorithm is not None:
        flag = "alg" if args.alg is not None else "remasking"
        algorithm = _choice(flag, algorithm, algorithms_of(family), problems, f"{alias} has", f"an algorithm of {alias}")
    decode = proto = None
    if task is not None and name is not None:
        proto = protocol(name, alias, task)
        given = {n: getattr(args, n, None) for n in PROTOCOL_FLAGS} | {"algorithm": algorithm, "gen_length": gen_length}
        decode = _decode_config(args, proto, given, family, problems)
    if problems or decode is None:
        raise UsageError(problems)
    notes = tuple(_notes(args, decode))
    if decode.temperature == 0:
        decode = replace(decode, top_p=None, top_k=None)
    overrides = {} if args.predictions else _overrides(args, proto, given, decode)
    checkpoint = getattr(args, models[alias]["flag"]) or models[alias]["checkpoint"]
    return Job(
        _run_config(args, alias, family, checkpoint, proto, decode), decode, proto, overrides, notes,
        Path(args.output_dir), args.tag, args.limit, args.batch_size, args.device,
        Path(args.data_dir) if args.data_dir else None, Path(args.predictions) if args.predictions else None, args.overwrite,
    )


def _run_config(args: argparse.Namespace, alias: str, family: str, checkpoint: str, proto: Protocol, decode: DecodeConfig) -> RunConfig:
    schedule = decode.schedule
    return RunConfig(
        model_alias=alias, family=family, checkpoint=checkpoint, task=args.task, protocol=proto.name, prompt_form=proto.form,
        num_fewshot=proto.num_fewshot, chat_template=proto.chat_template, system=proto.system,
        algorithm=schedule.algorithm, gen_length=schedule.gen_length, block_length=schedule.block_length,
        num_steps=schedule.num_steps, tokens_per_step=schedule.tokens_per_step, quotas=run_lengths(schedule.quotas),
        temperature=decode.temperature, top_p=decode.top_p, top_k=decode.top_k, alg_temp=decode.alg_temp,
        logits_eos_inf=decode.logits_eos_inf, confidence_eos_eot_inf=decode.confidence_eos_eot_inf,
        confidence_dtype=decode.confidence_dtype, early_exit=decode.early_exit, dtype=args.dtype, seed=args.seed,
    )
