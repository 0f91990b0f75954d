"""What the arguments mean together: Namespace -> Job, or every problem at once."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options, algorithms_of
from decoding.config import CONFIDENCE_DTYPES, KV_WINDOW, DecodeConfig
from decoding.kv_cache import CACHES
from decoding.schedule import Schedule, ScheduleError, make_schedule
from experiment.arguments import BLOCK_LENGTH, Models, verified
from models.files import family_named
from tasks.protocols import PREFIX, PROTOCOLS, Protocol, protocol
from utils import RunConfig, UsageError, nearest, result_name, run_lengths

DTYPES = ("bfloat16", "float16", "float32")
# an explicit flag of this name wins over the protocol's value of this name
PROTOCOL_FLAGS = (
    "algorithm",
    "gen_length",
    "block_length",
    "temperature",
    "top_p",
    "top_k",
    "alg_temp",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
)
# flags that say how to generate; scored predictions have no use for them
GENERATION_FLAGS = (
    "alg",
    "remasking",
    "tokens_per_step",
    "num_steps",
    "gen_length",
    "max_new_tokens",
    "block_length",
    "temperature",
    "top_p",
    "top_k",
    "alg_temp",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
    "kv_cache",
    "cache_refresh",
    "kv_window",
    "max_lookahead",
    "verifier_ckpt",
)


@dataclass(frozen=True)
class Job:
    """One experiment and how to run it.

    config:    what decides the numbers. decode: its decoding part, ready for decoding.decode.
    overrides: flag -> {"protocol": value, "run": value} for every flag that departs from the protocol.
    notes:     what a user should be told: sentences, printed and stored.
    devices:   one for each worker that this process is to lead, its own first; () where it starts none.
    """

    config: RunConfig
    decode: DecodeConfig
    protocol: Protocol
    overrides: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    output_dir: Path
    tag: str | None
    limit: int | None
    batch_size: int | str
    device: str | None
    devices: tuple[str, ...]
    data_dir: Path | None
    predictions: Path | None
    overwrite: bool
    unsafe_exec: str | None = None
    no_exec: bool = False
    cuda_graphs: bool = False

    @property
    def schedule(self) -> Schedule:
        return self.decode.schedule

    @property
    def path(self) -> Path:
        """Where the result goes."""
        predictions = self.predictions is not None
        return self.output_dir / result_name(
            self.config, predictions=predictions, tag=self.tag, limit=self.limit
        )


class _Check:
    """Collects what is wrong."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)

    def choice(
        self,
        flag: str,
        value: str | None,
        allowed: Sequence[str],
        known="known",
        listing="there are",
    ):
        """`value` where it is allowed; otherwise a problem with the nearest one, and None."""
        if value in allowed:
            return value
        wrong = (
            "is required" if value is None else f"{value!r} is not {known}{nearest(value, allowed)}"
        )
        self.problems.append(f"--{flag} {wrong}; {listing}: {', '.join(allowed)}")
        return None

    def one_of_two(self, args: Namespace, first: str, second: str) -> Any:
        """The value of two names for one thing; a problem naming both where they are given and differ."""
        a, b = getattr(args, first), getattr(args, second)
        if a is not None and b is not None and a != b:
            self.problems.append(
                f"--{first} {a} and --{second} {b} are two names for one thing; give one, or the same value"
            )
        return a if a is not None else b

    def text(self, flag: str, value: str | None, pattern: str, allowed: str) -> None:
        if value is not None and not re.fullmatch(pattern, value):
            self.problems.append(f"--{flag} {value!r}: allowed: {allowed}")


def resolve(args: Namespace, problems: Sequence[str], models: Models, tasks: Sequence[str]) -> Job:
    """What the arguments mean together. `problems` are those already found; raises UsageError with all of them."""
    check = _Check(problems)
    alias = check.choice("model_alias", args.model_alias, list(models))
    other = (args.task or "").startswith(PREFIX) and len(args.task) > len(PREFIX)
    task = args.task if other else check.choice("task", args.task, [*tasks, f"{PREFIX}NAME"])
    if other and args.predictions:
        check.problems.append(f"--predictions: only for {', '.join(tasks)}")
    name = check.choice("protocol", args.protocol, PROTOCOLS)
    check.choice("dtype", args.dtype, DTYPES)
    check.choice("confidence_dtype", args.confidence_dtype, CONFIDENCE_DTYPES)
    if args.kv_cache is not None:
        check.choice("kv_cache", args.kv_cache, list(CACHES))
    check.text("device", args.device, r"cpu|cuda(:\d+)?", "cpu, cuda, cuda:0, cuda:1, ...")
    check.text("unsafe_exec", args.unsafe_exec, "fs|all", "fs, all")
    check.text(
        "devices", args.devices, r"(cpu|\d+)(,(cpu|\d+))*", "a list such as 0,1,2,3 or cpu,cpu"
    )
    if args.device is not None and args.devices is not None:
        check.problems.append(
            f"--device {args.device} and --devices {args.devices}: give one of them"
        )
    name_part = r"(?!(.*_)?limit\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
    check.text(
        "tag",
        args.tag,
        name_part,
        "up to 100 letters, digits, '.', '_', '-', not ending as --limit's name does",
    )
    if not args.output_dir:
        check.problems.append("--output_dir '': a directory is needed; leave it out for results")
    algorithm = check.one_of_two(args, "alg", "remasking")
    gen_length = check.one_of_two(args, "gen_length", "max_new_tokens")
    family = models[alias]["family"] if alias else None
    if algorithm is not None:
        flag = "alg" if args.alg is not None else "remasking"
        which = (
            (algorithms_of(family), f"an algorithm of {alias}", f"{alias} has")
            if alias
            else (list(ALGORITHMS),)
        )
        algorithm = check.choice(flag, algorithm, *which)
    if None in (alias, task, name):
        raise UsageError(check.problems)
    proto = protocol(name, alias, task)
    given = {n: getattr(args, n, None) for n in PROTOCOL_FLAGS} | {
        "algorithm": algorithm,
        "gen_length": gen_length,
    }
    decode = _decode_config(args, proto, given, family, check.problems)
    verifier = _verifier(args, decode, models[alias], check.problems)
    check.problems += [
        f"--{flag} '': a directory or a hub id is needed; leave it out for {models[alias][own]}"
        for flag, own in ((models[alias]["flag"], "checkpoint"), ("verifier_ckpt", "verifier"))
        if getattr(args, flag) == "" and own in models[alias]
    ]
    if check.problems or decode is None:
        raise UsageError(check.problems)
    notes = _notes(args, decode)
    if decode.temperature == 0:
        decode = replace(decode, top_p=None, top_k=None)
    checkpoint = getattr(args, models[alias]["flag"]) or models[alias]["checkpoint"]
    devices = (
        tuple(d if d == "cpu" else f"cuda:{d}" for d in args.devices.split(","))
        if args.devices
        else ()
    )
    return Job(
        _run_config(args, family, checkpoint, verifier, proto, decode),
        decode,
        proto,
        {}
        if args.predictions
        else _overrides(
            args,
            (models[alias]["checkpoint"], checkpoint),
            (verifier and models[alias].get("verifier"), verifier),
            proto,
            given,
            decode,
        ),
        notes,
        output_dir=Path(args.output_dir),
        tag=args.tag,
        limit=args.limit,
        batch_size=args.batch_size,
        device=devices[0] if devices else args.device,
        devices=devices,
        data_dir=Path(args.data_dir) if args.data_dir else None,
        predictions=Path(args.predictions) if args.predictions else None,
        overwrite=args.overwrite,
        unsafe_exec=args.unsafe_exec,
        no_exec=args.no_exec,
        cuda_graphs=args.cuda_graphs,
    )


def _verifier(
    args: Namespace, decode: DecodeConfig | None, model: Mapping[str, str], problems: list[str]
) -> str | None:
    """The verifier's checkpoint where the algorithm has one, else None."""
    if decode is None or ALGORITHMS[decode.schedule.algorithm].verification is None:
        if args.verifier_ckpt is not None and decode is not None and not args.predictions:
            name = decode.schedule.algorithm
            problems.append(
                f"--verifier_ckpt {args.verifier_ckpt}: {name} drafts nothing; these do: {', '.join(verified())}"
            )
        return None
    found = args.verifier_ckpt or model.get("verifier")
    if found is None:
        problems.append(
            f"--verifier_ckpt is required: {args.model_alias} has none of its own for {decode.schedule.algorithm}"
        )
    return found


def _decode_config(
    args: Namespace, proto: Protocol, given: dict[str, Any], family: str, problems: list[str]
) -> DecodeConfig | None:
    """The decoding configuration, or None; what is wrong with it is added to `problems`."""
    value = {
        name: getattr(proto, name) if given[name] is None else given[name]
        for name in PROTOCOL_FLAGS
    }
    source = f"the {proto.name} protocol's"
    if given["block_length"] is None:
        if not ALGORITHMS[value["algorithm"]].blocks:
            value["block_length"] = None  # the protocol's is meant for its own algorithm
        elif value["block_length"] is None:
            value["block_length"] = min(BLOCK_LENGTH, value["gen_length"])
            source = f"the default of {value['algorithm']}"
    try:
        schedule = make_schedule(
            value["algorithm"],
            value["gen_length"],
            value["block_length"],
            args.tokens_per_step,
            args.num_steps,
        )
    except ScheduleError as error:
        from_protocol = given["block_length"] is None and value["block_length"] is not None
        hint = f" (block_length is {source}; --block_length changes it)" if from_protocol else ""
        problems += [f"--{text}{hint}" for text in error.problems]
        return None
    # what is not known is already a problem
    known = args.confidence_dtype in CONFIDENCE_DTYPES
    cache = args.kv_cache or ("window" if args.kv_window is not None else "none")
    window = args.kv_window or (KV_WINDOW if cache == "window" else None)
    config = DecodeConfig(
        schedule,
        value["temperature"],
        value["top_p"],
        value["top_k"],
        value["alg_temp"],
        confidence_dtype=args.confidence_dtype if known else CONFIDENCE_DTYPES[0],
        logits_eos_inf=value["logits_eos_inf"],
        confidence_eos_eot_inf=value["confidence_eos_eot_inf"],
        early_exit=not args.no_early_exit,
        kv_cache=cache if cache in CACHES else "none",
        cache_refresh=args.cache_refresh if cache in CACHES else None,
        kv_window=window if cache in CACHES else None,
        max_lookahead=args.max_lookahead,
        given=tuple(
            (name, getattr(args, name))
            for name in algorithm_options()
            if getattr(args, name) is not None
        ),
    )
    problems += [
        f"--{text}"
        for text in config.problems(family, family_named(family).fixed["end_token_flags"])
    ]
    return config


def _notes(args: Namespace, config: DecodeConfig) -> tuple[str, ...]:
    """What the user should be told about flags that act otherwise than they look."""
    if args.predictions:
        flags = (*GENERATION_FLAGS, *algorithm_options())
        given = ", ".join(f"--{n}" for n in flags if getattr(args, n) is not None)
        return (f"texts are scored, not generated: {given} have no effect",) if given else ()
    notes = [config.schedule.note] if config.schedule.note else []
    if config.temperature == 0:
        unused = [
            f"{n} {v:g}"
            for n, v in (("top_p", config.top_p), ("top_k", config.top_k))
            if v is not None
        ]
        notes += (
            [f"{' and '.join(unused)} inactive at temperature 0: nothing is drawn"]
            if unused
            else []
        )
    return tuple(notes)


def _overrides(
    args: Namespace,
    checkpoints: tuple[str, str],
    verifiers: tuple[str | None, str | None],
    proto: Protocol,
    given: dict[str, Any],
    decode: DecodeConfig,
) -> dict[str, dict[str, Any]]:
    """Flags whose value departs from the protocol's and has an effect.

    checkpoints, verifiers: the alias's own and the one that runs. Every protocol means one token per step, the alias's
    own checkpoint on the hub, bfloat16 weights, float64 scores.
    """
    schedule, inactive = decode.schedule, ("top_p", "top_k") if decode.temperature == 0 else ()
    differ = {
        name: {"protocol": getattr(proto, name), "run": value}
        for name, value in given.items()
        if value is not None and value != getattr(proto, name) and name not in inactive
    }
    if (schedule.tokens_per_step or schedule.realised_tps) != 1:
        realised = float(f"{schedule.realised_tps:.4g}")
        differ["tokens_per_step"] = {"protocol": 1, "run": schedule.tokens_per_step or realised}
    common = {
        "checkpoint": checkpoints,
        "verifier": verifiers,
        "dtype": (DTYPES[0], args.dtype),
        "confidence_dtype": (CONFIDENCE_DTYPES[0], args.confidence_dtype),
        "kv_cache": ("none", decode.kv_cache),
        "cache_refresh": (None, decode.cache_refresh),
        "kv_window": (None, decode.kv_window),
        "max_lookahead": (None, decode.max_lookahead),
    } | {
        n: (ALGORITHMS[schedule.algorithm].options[n].default, value)
        for n, value in decode.options.items()
    }
    return differ | {name: {"protocol": a, "run": b} for name, (a, b) in common.items() if a != b}


def _run_config(
    args: Namespace,
    family: str,
    checkpoint: str,
    verifier: str | None,
    proto: Protocol,
    decode: DecodeConfig,
) -> RunConfig:
    schedule = decode.schedule
    same = (
        "temperature",
        "top_p",
        "top_k",
        "alg_temp",
        "logits_eos_inf",
        "confidence_eos_eot_inf",
        "confidence_dtype",
        "early_exit",
        "kv_cache",
        "cache_refresh",
        "kv_window",
        "max_lookahead",
    )
    return RunConfig(
        model_alias=args.model_alias,
        family=family,
        checkpoint=checkpoint,
        task=args.task,
        dtype=args.dtype,
        seed=args.seed,
        protocol=proto.name,
        prompt_form=proto.form,
        num_fewshot=proto.num_fewshot,
        chat_template=proto.chat_template,
        system=proto.system,
        algorithm=schedule.algorithm,
        gen_length=schedule.gen_length,
        block_length=schedule.block_length,
        num_steps=schedule.num_steps,
        tokens_per_step=schedule.tokens_per_step,
        quotas=run_lengths(schedule.quotas),
        options=decode.options or None,
        compile=args.compile,
        verifier=verifier,
        **{name: getattr(decode, name) for name in same},
    )
