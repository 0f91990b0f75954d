"""Resolves the arguments: Namespace -> Job, or every problem at once.

Imports nothing heavy. Of all files only the manifest of a data set is read, for its name.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options, algorithms_of
from decoding.config import KV_WINDOW, DecodeConfig
from decoding.likelihood import ESTIMATORS, MC_NUM, LikelihoodConfig
from decoding.option import options_in
from decoding.schedule import Schedule, ScheduleError, make_schedule
from experiment import plugins
from experiment.arguments import BLOCK_LENGTH, Models, verified
from experiment.config import DTYPES, RunConfig, Settings, result_name
from models import FAMILIES
from tasks import TaskSpec
from tasks.data import data_name
from tasks.installed import is_installed, spec_of
from tasks.protocols import PREFIX, PROTOCOLS, Protocol, protocol
from utils import DllmexpError, ManyProblems, UsageError, file_sha256, nearest

TAG = r"(?!(.*_)?limit\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
# settings that change no answer, or only as another run of the same protocol would
NO_OVERRIDE = ("early_exit", "seed", "strict_exec", "timed_batch", "repeats")
# of RunConfig, flags without effect where texts are given
GENERATING = ("dtype", "seed", "compile", "timed_batch")


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """One experiment and how to run it.

    config:    the settings that decide the numbers.
    spec:      the benchmark.
    overrides: flag -> {"protocol": value, "run": value} for every flag that departs from the
               protocol.
    notes:     sentences for the user, printed and stored.
    default_dtype: the default of the model's alias.
    data_name: of the data set below data_dir, if a manifest gives it one.
    """

    config: RunConfig
    spec: TaskSpec
    protocol: Protocol
    overrides: Mapping[str, dict[str, Any]]
    notes: tuple[str, ...]
    default_dtype: str = DTYPES[0]
    data_name: str | None = None

    @property
    def schedule(self) -> Schedule | None:
        """None where nothing is generated."""
        return self.config.decode and self.config.decode.schedule

    @property
    def path(self) -> Path:
        """Where the result goes."""
        named = {"overrides": self.overrides, "dtype": self.default_dtype, "data": self.data_name}
        named |= {"tag": self.tag, "limit": self.limit}
        return self.output_dir / result_name(self.config, **named)

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """One device for each worker of --devices, the leader's first; () where it is not given."""
        names = self.devices.split(",") if self.devices else ()
        return tuple(name if name == "cpu" else f"cuda:{name}" for name in names)


def resolve(
    args: Namespace, problems: Sequence[str], models: Models, tasks: Mapping[str, TaskSpec]
) -> Job:
    """The job that the arguments describe.

    problems: those already found. Raises UsageError with these and all others.
    """
    found = list(problems)
    alias = _choice("model_alias", args.model_alias, list(models), found)
    name = _choice("protocol", args.protocol, PROTOCOLS, found)
    spec = _benchmark(args, tasks, found)
    found += _setting_problems(args)
    if args.show_prompt is not None and args.predictions is not None:
        found.append("--show_prompt and --predictions: given texts have no prompt; leave one out")
    given = _given(args, found)
    by_likelihood = spec is not None and spec.kind == "choice"
    if spec is not None:
        found += _foreign_options(args, given, spec)
    if args.predictions is not None:
        given = dict.fromkeys(given)  # nothing is generated, which a note says
    if alias and given["algorithm"] is not None:
        own = algorithms_of(models[alias]["family"])
        flag = "alg" if args.alg is not None else "remasking"
        of = (f"an algorithm of {alias}", f"{alias} has")
        given["algorithm"] = _choice(flag, given["algorithm"], own, found, *of)
    if alias is None or spec is None or name is None:
        raise UsageError(found)
    entry = models[alias]
    family = FAMILIES[entry["family"]]
    try:
        proto = protocol(name, alias, models, spec, family)
    except UsageError as error:
        raise UsageError([*found, *error.problems]) from None
    decode = likelihood = None
    if by_likelihood:
        value = {n: getattr(proto, n, None) if v is None else v for n, v in given.items()}
        likelihood = _likelihood_config(given, value, proto, alias, family, found)
    else:
        value, source = _values(given, proto)
        decode = _decode_config(args, given, value, source, family, found)
    found += _repeats_problems(args, decode, spec)
    verifier = _verifier(args, decode, entry, found)
    if given["num_fewshot"] and not spec.has_examples:
        found.append(
            f"--num_fewshot {given['num_fewshot']}: {spec.name} has no documents for worked "
            "examples, only those that are evaluated; leave it out"
        )
    found += [
        f"--{flag} '': a directory or a hub id is needed; leave it out for {entry[own]}"
        for flag, own in ((entry["flag"], "checkpoint"), ("verifier_ckpt", "verifier"))
        if getattr(args, flag) == "" and own in entry
    ]
    if found or (decode is None and likelihood is None):
        raise UsageError(found)
    checkpoint = getattr(args, entry["flag"]) or entry["checkpoint"]
    predictions = args.predictions is not None
    defaults = {name: known.default for name, known in options_in(RunConfig).items()}
    defaults["dtype"] = entry.get("dtype", defaults["dtype"])
    used = {"model": alias, "task": spec.name}
    if decode is not None:
        used["algorithm"] = decode.schedule.algorithm
    if likelihood is not None:
        used["estimator"] = likelihood.estimator
    config = RunConfig(
        model_alias=alias,
        family=family.name,
        checkpoint=checkpoint,
        task=spec.name,
        protocol=proto.name,
        prompt_form=proto.form,
        start_token=proto.start_token,
        extraction=proto.extraction,
        decode=None if predictions or decode is None else decode.at_its_temperature(),
        likelihood=likelihood,
        verifier=None if predictions else verifier,
        plugins=plugins.used_by(used | {"family": family.name}),
        harness=None if predictions else harness_identity(entry.get("harness")),
        **{
            n: value[n] if o.protocol else _or_default(getattr(args, n), defaults[n])
            for n, o in options_in(RunConfig).items()
        },
    )
    own = (entry["checkpoint"], verifier and entry.get("verifier"))
    return Job(
        config=config,
        spec=spec,
        protocol=proto,
        overrides={}
        if predictions
        else _overrides(config, proto, given, own, defaults["dtype"], family),
        default_dtype=defaults["dtype"],
        data_name=None if spec.foreign or not args.data_dir else data_name(args.data_dir),
        notes=_notes(args, given, decode, models, alias, spec),
        **{n: _or_default(getattr(args, n), o.default) for n, o in options_in(Settings).items()},
    )


def harness_identity(harness: type | str | None) -> dict[str, str] | None:
    """{"name", "sha256"} of an entry's own harness; None where the entry uses the family's.

    harness: a class, or "module:Class".
    Raises UsageError where its file cannot be found.
    """
    if harness is None:
        return None
    file = None
    if isinstance(harness, str):
        name, (module, _, cls) = harness, harness.partition(":")
        with suppress(ImportError, ValueError):  # of a parent package; of a malformed name
            found = sys.modules.get(module) or importlib.util.find_spec(module)
            file = cls and (getattr(found, "__file__", None) or getattr(found, "origin", None))
    elif isinstance(harness, type):
        with suppress(TypeError, OSError):  # a class of Python's own
            file = inspect.getfile(harness)
            # eval.py has two names, and one identity
            module = Path(file).stem if harness.__module__ == "__main__" else harness.__module__
            name = f"{module}:{harness.__qualname__}"
    if not file or not Path(file).is_file():
        raise UsageError(f'harness {harness!r} is not found; expected a class or "module:Class"')
    return {"name": name, "sha256": file_sha256(file)}


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _choice(
    flag: str,
    value: str | None,
    allowed: Sequence[str],
    problems: list[str],
    known: str = "known",
    listing: str = "there are",
) -> str | None:
    """`value` if it is allowed; otherwise None, and a problem that suggests the nearest choice."""
    if value in allowed:
        return value
    wrong = "is required" if value is None else f"{value!r} is not {known}{nearest(value, allowed)}"
    problems.append(f"--{flag} {wrong}; {listing}: {', '.join(allowed)}")
    return None


def _benchmark(
    args: Namespace, tasks: Mapping[str, TaskSpec], problems: list[str]
) -> TaskSpec | None:
    task = args.task or ""
    if not task.startswith(PREFIX) or task == PREFIX:
        known = _choice("task", args.task, [*tasks, f"{PREFIX}NAME"], problems)
        if known is None and is_installed(task):
            problems[-1] = f"--task {task!r} is not known; did you mean {PREFIX + task!r}?"
        return tasks.get(known)
    if args.predictions:
        problems.append(f"--predictions: not for {task}, only for {', '.join(tasks)}")
    try:
        return spec_of(task)
    except DllmexpError as error:
        raise ManyProblems([error, *([UsageError(problems)] if problems else [])]) from None


def _setting_problems(args: Namespace) -> list[str]:
    """The problems with settings that are given as text."""
    patterns = (
        ("device", r"cpu|cuda(:\d+)?", "cpu, cuda, cuda:0, cuda:1, ..."),
        ("devices", r"(cpu|\d+)(,(cpu|\d+))*", "a list such as 0,1,2,3 or cpu,cpu"),
        (
            "tag",
            TAG,
            "1 to 100 letters, digits, '.', '_', '-', with a letter or digit first and not ending "
            "in limit<N>, which --limit N adds",
        ),
    )
    problems = [
        f"--{flag} {getattr(args, flag)!r}: allowed: {allowed}"
        for flag, pattern, allowed in patterns
        if getattr(args, flag) is not None and not re.fullmatch(pattern, getattr(args, flag))
    ]
    if args.device is not None and args.devices is not None:
        problems.append(f"--device {args.device} and --devices {args.devices}: give one of them")
    others = [f for f in ("print_output_path", "dry_run") if getattr(args, f)]
    if args.show_prompt is not None and others:
        problems.append(f"--show_prompt and --{others[0]}: both print and exit; give one of them")
    if args.timed_batch is not None and args.batch_size not in (None, args.timed_batch):
        both = f"--batch_size {args.batch_size} and --timed_batch {args.timed_batch}"
        problems.append(f"{both}: both are the samples in flight; give one of them")
    return problems


def _repeats_problems(args: Namespace, decode: DecodeConfig | None, spec: TaskSpec) -> list[str]:
    """The problem with several samples a document where there is only one, in one sentence."""
    why = None
    if (args.repeats or 1) > 1:
        if spec.kind == "choice":
            why = f"{spec.name} is scored by likelihood, nothing is sampled; leave it out"
        elif args.predictions is not None:
            why = "--predictions has one text per document; leave one of them out"
        elif decode is not None and decode.temperature == 0:
            why = "all samples of a document are the same at temperature 0; --temperature 0.2 draws"
    return [f"--repeats {args.repeats}: {why}"] if why else []


def _given(args: Namespace, problems: list[str]) -> dict[str, Any]:
    """Option that a protocol may decide -> the value of its flag, None where it is not given.

    These are the options of the schedule, of the loop, of likelihoods and of the prompt. Where both
    flags of an option are given and differ, a problem names both.
    """
    given = {}
    prompt = {name: known for name, known in options_in(RunConfig).items() if known.protocol}
    decoding = options_in(Schedule) | options_in(DecodeConfig)
    for name, known in (decoding | options_in(LikelihoodConfig) | prompt).items():
        if known.negated:
            given[name] = False if getattr(args, *known.names(name)) else None
            continue
        values = {f: v for f in known.names(name) if (v := getattr(args, f)) is not None}
        if len(set(values.values())) > 1:
            both = " and ".join(f"--{flag} {value}" for flag, value in values.items())
            problems.append(f"{both} are two names for one thing; give one, or the same value")
        given[name] = next(iter(values.values()), None)
    return given


def _foreign_options(args: Namespace, given: Mapping[str, Any], spec: TaskSpec) -> list[str]:
    """The problem with options that have no meaning for the benchmark, in one sentence."""
    own = options_in(LikelihoodConfig)
    if spec.kind != "choice":
        flags = [f for n in own if given[n] is not None for f in _flags_of(n)]
        why = f"{spec.name} is scored by its generated answers, not by likelihood"
    else:
        names = [*options_in(Schedule), *options_in(DecodeConfig)]
        flags = [f for n in names for f in _flags_of(n) if getattr(args, f) not in (None, False)]
        more = (*algorithm_options(), "verifier_ckpt", "cuda_graphs", "predictions")
        flags += [f for f in more if getattr(args, f) not in (None, False)]
        options = ", ".join(f"--{f}" for n in own for f in _flags_of(n))
        why = f"{spec.name} is scored by likelihood, nothing is generated; its options: {options}"
    listed = ", ".join(f"--{flag}" for flag in dict.fromkeys(flags))
    return [f"{listed}: leave out; {why}"] if flags else []


def _likelihood_config(
    given: Mapping[str, Any],
    value: Mapping[str, Any],
    proto: Protocol,
    alias: str,
    family,
    problems: list[str],
) -> LikelihoodConfig | None:
    """How likelihoods are computed, or None; its problems are added to `problems`."""
    name = value["estimator"] or family.likelihood
    if name is None:
        problems.append(
            f"--model_alias {alias}: the {family.name} family has no estimator of likelihoods; "
            f"--likelihood names one: {', '.join(ESTIMATORS)}"
        )
        return None
    drawn = (value["mc_num"] or MC_NUM) if ESTIMATORS[name].draw else given["mc_num"]
    config = LikelihoodConfig(name, drawn, value["cfg_scale"] or 0.0, proto.name == "official")
    problems += [f"--{text}" for text in config.problems()]
    return config


def _values(given: Mapping[str, Any], proto: Protocol) -> tuple[dict[str, Any], str]:
    """The value of each option, and the source of the block length.

    An option without a flag has the protocol's value.
    """
    value = {
        name: getattr(proto, name, None) if flag is None else flag for name, flag in given.items()
    }
    source = f"the {proto.name} protocol's"
    algorithm = ALGORITHMS[value["algorithm"]]
    if given["block_length"] is None and not algorithm.blocks:
        value["block_length"] = None  # the protocol's is meant for its own algorithm
    elif value["block_length"] is None and algorithm.blocks and algorithm.schedule == "adaptive":
        value["block_length"] = BLOCK_LENGTH
        source = f"the default of {value['algorithm']}"
    if given["block_length"] is None and value["block_length"] is not None:
        value["block_length"] = min(value["block_length"], value["gen_length"])
    return value, source


def _decode_config(
    args: Namespace,
    given: Mapping[str, Any],
    value: Mapping[str, Any],
    source: str,
    family,
    problems: list[str],
) -> DecodeConfig | None:
    """The decoding configuration, or None; its problems are added to `problems`."""
    names = ("gen_length", "block_length", "num_steps", "tokens_per_step")
    asked = {name: value[name] for name in names}
    if (asked["num_steps"] or 0) > asked["gen_length"]:
        problems.append(
            f"--num_steps {asked['num_steps']} is more than the {asked['gen_length']} positions "
            "of the canvas: a step commits at least one of them"
        )
        return None
    try:
        schedule = make_schedule(value["algorithm"], **asked)
    except ScheduleError as error:
        implied = given["block_length"] is None and value["block_length"] is not None
        helps = implied and _possible(value["algorithm"], **asked | {"block_length": None})
        hint = f" (block_length is {source}; --block_length changes it)" if helps else ""
        problems += [f"--{text}{hint}" for text in error.problems]
        return None
    settings = {
        name: known.default if value[name] is None else value[name]
        for name, known in options_in(DecodeConfig).items()
    }
    if settings["kv_window"] is not None and given["kv_cache"] is None:
        settings["kv_cache"] = "window"
    if settings["kv_cache"] == "window" and settings["kv_window"] is None:
        settings["kv_window"] = KV_WINDOW
    # after a refused --alg the algorithm is the protocol's, whose options nobody has given
    refused = given["algorithm"] is None and {args.alg, args.remasking} != {None}
    names = () if args.predictions or refused else algorithm_options()
    own = [(name, v) for name in names if (v := getattr(args, name)) is not None]
    config = DecodeConfig(schedule, given=tuple(own), **settings)
    problems += [f"--{text}" for text in config.problems(family.name, family.end_token_flags)]
    return config


def _possible(algorithm: str, **asked: int | None) -> bool:
    """Whether there is such a schedule."""
    try:
        make_schedule(algorithm, **asked)
    except ScheduleError:
        return False
    return True


def _verifier(
    args: Namespace, decode: DecodeConfig | None, entry: Mapping[str, Any], problems: list[str]
) -> str | None:
    """The verifier's checkpoint where the algorithm has one, else None."""
    name = decode and decode.schedule.algorithm
    if decode is None or ALGORITHMS[name].verification is None:
        if args.verifier_ckpt is not None and decode is not None and not args.predictions:
            problems.append(
                f"--verifier_ckpt {args.verifier_ckpt}: {name} drafts nothing; "
                f"these do: {', '.join(verified())}"
            )
        return None
    found = args.verifier_ckpt or entry.get("verifier")
    if found is None:
        problems.append(
            f"--verifier_ckpt is required for {name}: {args.model_alias} has no default; give a "
            "checkpoint in Qwen2's layout with the model's tokenizer"
        )
    return found


def _notes(
    args: Namespace,
    given: Mapping[str, Any],
    decode: DecodeConfig | None,
    models: Models,
    alias: str,
    spec: TaskSpec,
) -> tuple[str, ...]:
    """Notes for the user: flags without effect, unexpected effects, the benchmark's own note."""
    others = [
        f"--{entry['flag']}"
        for other, entry in models.items()
        if other != alias and getattr(args, entry["flag"]) not in (None, entry["checkpoint"])
    ]
    notes = [f"{', '.join(others)}: no effect, the model is {alias}"] if others else []
    if args.predictions:
        named = [*given, *algorithm_options()]
        flags = [f for n in named for f in _flags_of(n) if getattr(args, f) not in (None, False)]
        more = ("verifier_ckpt", models[alias]["flag"], *GENERATING)
        flags += [n for n in more if getattr(args, n) not in (None, False)]
        if flags:
            listed = ", ".join(f"--{flag}" for flag in flags)
            notes.append(f"texts are scored, not generated: {listed} have no effect")
    elif decode is not None:
        notes += [decode.schedule.note] if decode.schedule.note else []
        if decode.temperature == 0:
            unused = [(n, v) for n in ("top_p", "top_k") if (v := getattr(decode, n)) is not None]
            listed = " and ".join(f"{name} {value:g}" for name, value in unused)
            notes += (
                [f"no effect at temperature 0, where nothing is drawn: {listed}"] if unused else []
            )
            notes += _end_first(decode, FAMILIES[models[alias]["family"]])
    if spec.foreign and args.data_dir:
        notes.append(f"data_dir {args.data_dir} has no effect: lm-eval reads its data from the hub")
    if args.strict_exec and args.no_exec:
        notes.append("strict_exec has no effect with no_exec: no program is run")
    return tuple(notes + ([spec.note] if spec.note else []))


def _end_first(decode: DecodeConfig, family) -> list[str]:
    """A note where a family without a rule for end tokens runs one whole canvas at temperature 0.

    The model then often commits an end token far right first, and the answer ends there. Users
    report GSM8K 35 to 58 instead of 77 to 82 for Dream (DreamLM/Dream issues 51, 56, 72).
    """
    schedule = decode.schedule
    if schedule.n_blocks > 1 or not family.blocks or family.end_token_flags:
        return []
    if not ALGORITHMS[schedule.algorithm].scores or schedule.gen_length == 1:
        return []
    return [
        f"one block over the whole canvas at temperature 0: the {family.name} family may commit "
        "end tokens before the answer, which lowers scores; "
        f"--block_length {min(family.blocks, (schedule.gen_length + 1) // 2)}, "
        "--alg leftright or a temperature above 0 avoids it"
    ]


def _flags_of(name: str) -> tuple[str, ...]:
    parts = (Schedule, DecodeConfig, LikelihoodConfig, RunConfig)
    known = next((o for part in parts if (o := options_in(part).get(name))), None)
    return known.names(name) if known else (name,)


def _overrides(
    config: RunConfig,
    proto: Protocol,
    given: Mapping[str, Any],
    own: tuple[str, str | None],
    dtype: str,
    family,
) -> dict[str, dict[str, Any]]:
    """Flags with an effect and a value other than the protocol's.

    own, dtype: the alias's checkpoint and verifier, and its dtype. Every protocol means these, one
    token per step, float64 scores, no cache; of likelihoods the family's own estimator.
    """
    decode, likelihood = config.decode, config.likelihood
    schedule = decode and decode.schedule
    # at temperature 0 they have no effect
    inactive = {"top_p", "top_k"} if decode is None or decode.temperature == 0 else set()
    if likelihood is not None:
        inactive |= {"estimator", "mc_num", "cfg_scale"}  # below, with their defaults
    pairs: dict[str, tuple[Any, Any]] = {}
    for f in fields(Protocol):
        if given.get(f.name) is not None and f.name not in inactive:
            pairs[f.name] = getattr(proto, f.name), given[f.name]
    if likelihood is not None:
        usual = {"estimator": family.likelihood, "mc_num": MC_NUM, "cfg_scale": 0.0}
        for name, default in usual.items():
            meant = getattr(proto, name)
            pairs[name] = default if meant is None else meant, getattr(likelihood, name)
    if schedule and (schedule.tokens_per_step or schedule.realised_tps) != 1:
        realised = float(f"{schedule.realised_tps:.4g}")
        pairs["tokens_per_step"] = 1, schedule.tokens_per_step or realised
    pairs["checkpoint"], pairs["verifier"] = (own[0], config.checkpoint), (own[1], config.verifier)
    for part in filter(None, (config, decode)):
        for name, known in options_in(type(part)).items():
            if name not in pairs and not known.protocol and name not in NO_OVERRIDE:
                pairs[name] = known.default, getattr(part, name)
    pairs["dtype"] = dtype, config.dtype
    if decode is not None:
        defaults = ALGORITHMS[schedule.algorithm].options
        pairs |= {name: (defaults[name].default, value) for name, value in decode.options.items()}
    return {name: {"protocol": a, "run": b} for name, (a, b) in pairs.items() if a != b}
