"""The command line.

Every flag comes from an Option of a config dataclass or from an entry of a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from decoding.algorithms import ALGORITHMS, algorithm_options, algorithms_of
from decoding.algorithms import FAMILIES as EVERY_FAMILY
from decoding.config import DecodeConfig
from decoding.likelihood import LikelihoodConfig
from decoding.option import Option, options_in, written
from decoding.schedule import Schedule
from decoding.step_view import Algorithm
from experiment.config import DTYPES, EVALUATED, RunConfig, Settings
from models import FAMILIES, Family
from tasks import TaskSpec
from tasks.protocols import PROTOCOLS, Protocol
from utils import UsageError, nearest, versions

Models = Mapping[str, Mapping[str, Any]]  # MODEL_DEFAULTS of eval.py
NEEDED = {"family", "checkpoint", "flag"}
CELL = [f.name for f in dataclasses.fields(Protocol) if f.name != "name"]
TEXTS = (*sorted(NEEDED), "verifier")
# the keys that an entry of MODEL_DEFAULTS may have
ENTRY = NEEDED | {"verifier", "harness", "dtype", *PROTOCOLS}
BLOCK_LENGTH = 32  # of adaptive algorithms where the protocol has the whole canvas: Fast-dLLM's
ALGORITHM = "options of single algorithms"
# groups of --help that come first, and what holds for all of their flags; the other groups follow
RULES = {
    EVALUATED: "A checkpoint is a directory in the hub's layout, a hub id, or org/name@REVISION.",
    "decoding": "Where a flag is not given, the protocol decides; a flag always wins, and the "
    "result lists it.",
}
EPILOG = """examples:
  python eval.py --model_alias llada --task gsm8k --tokens_per_step 2 --batch_size 8
  python eval.py --model_alias dream --task humaneval --alg entropy --limit 10 --tag try
  python eval.py --model_alias llada --task gsm8k --dry_run         what would run; loads nothing
  python eval.py --model_alias llada --task gsm8k --show_prompt 3   the prompt of document 3
  python eval.py --model_alias tiny-llada --task gsm8k --data_dir assets/benchmarks --dtype float32

exit codes:
  0 complete   2 usage or configuration   3 environment (no GPU, no sandbox)   4 data or checkpoint
  5 finished, but some samples failed   74 not writable or disk full   \
75 another process has the job
  1 unforeseen error   128+n ended by signal n
"""


class Parser(argparse.ArgumentParser):
    """argparse that raises its problem instead of printing usage and leaving."""

    def error(self, message: str):
        raise UsageError(re.sub(r"^argument (--\w+)(/--\w+)*: ", r"\1: ", message))


class _Flags:
    """Adds flags to a parser, by group, and collects all bad values."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser, self.problems = parser, []
        self._groups: dict[str, Any] = {}
        for title in RULES:
            self.group(title)

    def group(self, title: str):
        if title not in self._groups:
            self._groups[title] = self.parser.add_argument_group(title, RULES.get(title))
        return self._groups[title]

    def add(
        self,
        name: str,
        known: Option,
        *others: Option,
        group: str | None = None,
        text: str | None = None,
    ) -> None:
        """The flags of one option. A flag that is not given is None, a switch False.

        others: options of the same name, of other algorithms; a value is read as any of them.
        """
        group = self.group(group or known.group)
        flags = known.names(name)
        for flag in flags:
            text_of = text or known.description
            if flag != flags[0]:
                text_of = (
                    f"Another name for --{flags[0]}. Give either, or both with the same value."
                )
            text_of = text_of.replace("%", "%%")  # argparse has fields such as %(default)s
            if known.switch:
                group.add_argument(f"--{flag}", action="store_true", help=text_of)
                continue
            more: dict[str, Any] = {"nargs": "?", "const": True} if known.truth else {}
            if name != "algorithm":  # `resolve` checks it, by the model's family
                more["type"] = self._reader(flag, known, *others)
            group.add_argument(f"--{flag}", metavar=known.placeholder, help=text_of, **more)

    def word(self, group: str, name: str, metavar: str, text: str, **more: Any) -> None:
        """A flag whose value is checked later."""
        text = text.replace("%", "%%")
        self.group(group).add_argument(f"--{name}", metavar=metavar, help=text, **more)

    def _reader(self, flag: str, *known: Option) -> Callable[[str], Any]:
        def read(text: str):
            for one in known:
                with suppress(ValueError, KeyError):
                    value = one.read(text)
                    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value
            choices = [word for one in known for word in one.choices]
            near = nearest(text, choices) if choices else ""
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            shown = shown or "''"
            allowed = ", or ".join(dict.fromkeys(one.allowed for one in known))
            self.problems.append(f"--{flag} {shown}: must be {allowed}{near}")
            return None

        return read


def build_parser(models: Models, tasks: Sequence[str]) -> tuple[Parser, list[str]]:
    """The parser, and the list to which it adds the bad values that it reads.

    The value of a flag that is not given is None.
    """
    parser = Parser(
        prog="eval.py",
        allow_abbrev=False,
        epilog=EPILOG,
        formatter_class=_Formatter,
        description="Evaluate a masked-diffusion language model on one benchmark and write one "
        "result file.",
    )
    flags = _Flags(parser)
    _evaluated(flags, models, tasks)
    for name, known in options_in(Schedule).items():
        flags.add(name, known, text=known.help + _from_tables(name))
    for name, known in options_in(DecodeConfig).items():
        flags.add(name, known, text=known.description + _from_tables(name))
    for name, users in algorithm_options().items():
        texts: dict[str, list[str]] = {}
        known = [ALGORITHMS[user].options[name] for user in users]
        for user, own in zip(users, known):
            texts.setdefault(f"{own.help} (default {written(own.default)})", []).append(user)
        text = "; ".join(f"{', '.join(users)}: {text}" for text, users in texts.items())
        flags.add(name, *known, group=ALGORITHM, text=f"{text}.")
    checked = ", ".join(verified())
    own = ", ".join(
        f"{_shown(e['verifier'])} for {alias}" for alias, e in models.items() if "verifier" in e
    )
    flags.word(
        ALGORITHM,
        "verifier_ckpt",
        "CHECKPOINT",
        f"Autoregressive model that checks the drafts of {checked}: a checkpoint of Qwen2's "
        f"layout with the model's own tokenizer. Default: {own}.",
    )
    for cls in (LikelihoodConfig, RunConfig, Settings):
        for name, known in options_in(cls).items():
            flags.add(name, known)
    _leaving(flags)
    return parser, flags.problems


class _Version(argparse.Action):
    """Like argparse's own, which wants to know the text before it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **more: Any):
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(versions())
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wide enough for one flag and its metavar on a line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)


def _evaluated(flags: _Flags, models: Models, tasks: Sequence[str]) -> None:
    flags.word(EVALUATED, "model_alias", "NAME", f"The model: {', '.join(models)}. Required.")
    flags.word(
        EVALUATED,
        "task",
        "NAME",
        f"The benchmark: {', '.join(tasks)}; or lm_eval:NAME, another task or group of the "
        "installed lm-eval, with its data from the hub. a,b,c: one after the other with the model "
        "loaded once, one result each. Required.",
    )
    flags.word(
        EVALUATED,
        "protocol",
        "NAME",
        "Where prompts, lengths, algorithm and sampling come from. uniform is the same for all "
        "models, so that they can be compared; official is what the model's authors report with, "
        "so that a published score can be reproduced; fast_dllm is that of Fast-dLLM's evaluation "
        "code, with which others have published speeds. Default: uniform.",
        default="uniform",
    )
    for alias, entry in models.items():
        text = f"Checkpoint of {alias}. Default: {_shown(entry['checkpoint'])}."
        flags.word(EVALUATED, entry["flag"], "CHECKPOINT", text)
    flags.word(
        EVALUATED,
        "plugin",
        "FILE.py",
        "Import a file of your own that adds models, benchmarks, algorithms, families or "
        "estimators; may be repeated. See docs/extending.md.",
        action="append",
        default=[],
    )


def _shown(checkpoint: str) -> str:
    """A checkpoint of the checkout is shown from the checkout."""
    root = Path(__file__).resolve().parent.parent
    return (
        str(Path(checkpoint).relative_to(root)) if checkpoint.startswith(str(root)) else checkpoint
    )


def _leaving(flags: _Flags) -> None:
    """Flags that print something and evaluate nothing."""
    group = flags.group("looking without running")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Print the configuration, the schedule and the path of the result, and exit. "
        "Loads nothing.",
    )
    group.add_argument(
        "--show_prompt",
        metavar="DOC",
        nargs="?",
        const=0,
        type=flags._reader("show_prompt", Option(0, "", whole=True)),
        help="Print the prompt of a document (default 0) as the model gets it, its length and its "
        "stop strings, and exit. Reads the tokenizer, no weights.",
    )
    group.add_argument(
        "--print_output_path", action="store_true", help="Print the path of the result, and exit."
    )
    group.add_argument(
        "--debug", action="store_true", help="Print tracebacks where something fails."
    )
    group.add_argument("--version", action=_Version, help="Print the versions, and exit.")


def _from_tables(name: str) -> str:
    """The part of an option's help that lists algorithms."""
    if name == "algorithm":
        names = [name for name, family in FAMILIES.items() if family.algorithm]
        listed = "; ".join(f"{name} family: {', '.join(algorithms_of(name))}" for name in names)
        return f" {listed}. Default: the protocol's."
    if name == "block_length":
        whole = ", ".join(a for a, b in ALGORITHMS.items() if not b.blocks)
        return (
            f" Default: the whole canvas for {whole}; the protocol's for the others. Where the "
            "protocol has the whole canvas, adaptive algorithms still have blocks of "
            f"{BLOCK_LENGTH}."
        )
    if name == "early_exit":
        ending = ", ".join(a for a, b in ALGORITHMS.items() if b.ends_at_eos)
        return f" {ending} end at the end token in any case, which is part of the algorithm."
    return ""


def verified() -> list[str]:
    """Names of the algorithms that use a verifier."""
    return [name for name, algorithm in ALGORITHMS.items() if algorithm.verification is not None]


def table_problems(models: Models, tasks: Mapping[str, TaskSpec]) -> list[str]:
    """The problems in the entries of the tables; a user or a plugin may have written them."""
    problems, flags = [], {}
    for alias, entry in models.items():
        where = f"MODEL_DEFAULTS[{alias!r}]"
        if not isinstance(entry, Mapping):
            problems.append(f"{where} is no dict but {entry!r:.40}")
            continue
        if missing := NEEDED - entry.keys():
            problems.append(f"{where} lacks {', '.join(sorted(missing))}")
        if odd := [k for k in TEXTS if not isinstance(entry.get(k, ""), str)]:
            problems += [f"{where}: {key} {entry[key]!r:.60} must be a text" for key in odd]
            continue
        problems += [
            f"{where}: unknown key {key!r}{nearest(key, ENTRY)}; "
            f"there are: {', '.join(sorted(ENTRY))}"
            for key in entry.keys() - ENTRY
        ]
        family = entry.get("family")
        if family is not None and family not in FAMILIES:
            problems.append(
                f"{where}: family {family!r} is not known; there are: {', '.join(FAMILIES)}"
            )
        problems += [
            f"{where}: {name} cell of {task!r} has unknown key {key!r}{nearest(key, CELL)}; "
            f"there are: {', '.join(CELL)}"
            for name in PROTOCOLS
            for task, cell in entry.get(name, {}).items()
            for key in cell
            if key not in CELL
        ]
        if (dtype := entry.get("dtype", DTYPES[0])) not in DTYPES:
            problems.append(
                f"{where}: dtype {dtype!r} is not known; there are: {', '.join(DTYPES)}"
            )
        flag = entry.get("flag")
        if flag is not None and not re.fullmatch(r"[a-z][a-z0-9_]*", flag):
            problems.append(f"{where}: flag {flag!r}: allowed: small letters, digits and '_'")
        if flag in flags:
            problems.append(f"{where}: the flag {flag!r} is that of {flags[flag]!r}")
        flags[flag] = alias
    for name, algorithm in ALGORITHMS.items():
        if not isinstance(algorithm, Algorithm):
            problems.append(f"ALGORITHMS[{name!r}] is no Algorithm but {algorithm!r:.40}")
        elif (
            unknown := set()
            if algorithm.families is EVERY_FAMILY
            else (set(algorithm.families) - FAMILIES.keys())
        ):
            known = ", ".join(FAMILIES)
            problems.append(
                f"ALGORITHMS[{name!r}]: unknown family {min(unknown)!r}; there are: {known}"
            )
        else:
            problems += [
                f"ALGORITHMS[{name!r}]: option {own!r} {problem}"
                for own, option in algorithm.options.items()
                if (problem := _option_problem(own, option))
            ]
    good = all(isinstance(algorithm, Algorithm) for algorithm in ALGORITHMS.values())
    for name, family in FAMILIES.items():
        if not isinstance(family, Family) or family.name != name:
            problems.append(f"FAMILIES[{name!r}] is no Family of this name but {family!r:.40}")
        elif good and family.algorithm not in (None, *algorithms_of(name)):
            problems.append(
                f"FAMILIES[{name!r}]: the algorithm {family.algorithm!r} is not defined for it; "
                f"there are: {', '.join(algorithms_of(name))}"
            )
    problems += [
        f"TASKS[{name!r}] is no TaskSpec of this name but {spec!r:.40}"
        for name, spec in tasks.items()
        if not isinstance(spec, TaskSpec) or spec.name != name
    ]
    problems += [
        f"TASKS[{name!r}] has no {part}"
        for name, spec in tasks.items()
        for part in ("forms", "sources")
        if isinstance(spec, TaskSpec) and not (getattr(spec, part) or spec.foreign)
    ]
    return problems


def _option_problem(name: str, option: Any) -> str | None:
    """Why an algorithm cannot have an option, to follow its name, or None."""
    if not isinstance(option, Option):
        return f"is no Option but {option!r:.40}"
    if not name.isidentifier():
        return "has another character than letters, digits and '_'"
    if option.switch or option.flags:
        return "has `switch` or `flags`, which are for the program's own; `truth` is on or off"
    return None


def parse(
    argv: Sequence[str] | None, models: Models, tasks: Mapping[str, TaskSpec]
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the problems with single values.

    Raises UsageError where argparse cannot go on.
    """
    if problems := table_problems(models, tasks):
        raise UsageError(problems)
    try:
        parser, problems = build_parser(models, tasks)
    except argparse.ArgumentError as error:  # two entries of the tables want one flag
        name = ", ".join(error.argument_name.split("/")) if error.argument_name else ""
        raise UsageError(
            f"{name}: {error.message}; rename the flag or the option in its table"
        ) from None
    words = sys.argv[1:] if argv is None else argv
    args, unknown = parser.parse_known_args(words)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    wrong = [
        f"unknown argument {word!r:.60}{_hint(word, flags)}"
        for word in unknown
        if re.match(r"--?[A-Za-z]", word)
    ]
    if unknown and not wrong:
        wrong = [f"unexpected argument {unknown[0]!r:.60}; every value follows its --flag"]
    if args.data_dir is None and (folder := os.environ.get("DLLMEXP_DATA_DIR")):
        args.data_dir = Path(os.path.expanduser(folder))
    if args.system and args.system.encode(errors="replace").decode() != args.system:
        wrong.append(f"--system {args.system!r:.60} is not UTF-8")
    return args, problems + wrong + _thread_problems()


# flags of lm-eval's command line -> ours; None: nothing here is like it
OTHERS = {
    "--model": "--model_alias",
    "--model_args": "--model_alias",
    "--tasks": "--task",
    "--output_path": "--output_dir",
    "--samples": "--limit",
    "--system_instruction": "--system",
    "--include_path": "--plugin",
    **dict.fromkeys(("--log_samples", "--apply_chat_template", "--cache_requests", "--use_cache")),
}


def _hint(word: str, flags: Sequence[str]) -> str:
    """The flag that is meant by an unknown one, where one is close."""
    name = "--" + word.partition("=")[0].lstrip("-").replace("-", "_")
    known = {flag: flag for flag in flags} | OTHERS
    close = difflib.get_close_matches(name[:60], known, n=1, cutoff=0.75)
    found = known[close[0]] if close else None
    return f"; did you mean {found!r}?" if found else "; --help lists them all"


def _thread_problems() -> list[str]:
    """OpenMP takes a list, "4,2"; libraries of lm-eval read the variable as one number."""
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    found = re.match(r"(\d{1,9})\s*(,|$)", given)
    if given and found is None:
        return [f"OMP_NUM_THREADS={given!r:.60}: must be a whole number; unset it or change it"]
    if found:
        os.environ["OMP_NUM_THREADS"] = found[1]
    return []
