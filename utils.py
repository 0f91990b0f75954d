"""How answers are read; errors and exit codes, the run configuration, environment, safe writes.

To change how the answers of a benchmark are read, change "answer patterns" below: one function or
pattern per benchmark, from what a model wrote to what is scored. Raise SCORING_VERSION with it:
finished results are then scored again from their kept samples.
No torch. Everything here is cheap to import, so that `--help` and bad input answer at once.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- answer patterns

# chat end tokens that a text may have written out
END_TOKEN = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|dlm_pad|start_header_id)\|>")
# group 1: the language of an opening fence
CODE_FENCE = re.compile(r"```(?:([\w+-]*)[ \t]*(?=\n|$))?")
# around the code in MBPP's worked examples: alone on a line, or the end mark behind the code
CODE_BEGIN = re.compile(r"^[ \t]*(?:\[BEGIN\]|BEGIN[ \t]*$)", re.MULTILINE)
CODE_END = re.compile(
    r"^(?:[ \t]*(?:\[DONE\]|DONE\]?[ \t]*$)|[^#\n]*[ \t'\"]\[DONE\][ \t]*$)", re.MULTILINE
)
# what a model thinks before it answers
THOUGHT = re.compile(r"^[ \t]*<think>.*?(?:</think>|\Z)", re.DOTALL | re.MULTILINE)
# the end of a thought that the prompt has begun; group 1: its line is indented
END_OF_THOUGHT = re.compile(r"^([ \t]?).*</think>", re.MULTILINE)
# a string on one line, group 2: its closing quote; in one the marks of a chat are a program's own
STRING = re.compile(r"(['\"])(?:\\.|(?!\1)[^\\\n])*(\1)?")
QUOTED = re.compile(r"(?<![\w`])(?:[rbfuRBFU]{1,2}(?=['\"]))?(['\"`])(?:\\.|(?!\1)[^\\\n])*(\1)?")
COMMENT = re.compile(r"(?<!\S)#(?![#\d]).*")
BEGIN_OF_CODE = re.compile(r"```|^[ \t]*(?:async def|def|class)[ \t]+\w+[ \t]*[(:]", re.MULTILINE)
# Markdown's quotation marks, and the marks of an interactive session
QUOTATION, SESSION = re.compile(r"^> ?(?!>>)", re.M), re.compile(r"^(?:>>>|\.\.\.)(?: |$)", re.M)
MAX_READ = 64_000  # characters of an answer: a program in the first, a number in the last of them
# The last match is the answer: lm-eval's "flexible-extract". Its "strict-match" wants the closing
# phrase of the worked examples ("#### 18"). lm-eval's own filters apply both, see tasks/gsm8k.py.
GSM8K_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
# "exact_match,numeric" reads a number as a careful reader does: sign, currency, thousands, decimals
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[$\u00a3\u20ac]-?)?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
NUMBER_ALONE = re.compile(rf"{NUMBER.pattern}%?\.?[ \t]*(?:\n|\Z)")  # on its line
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
# not "#### 1. Add them"; in "#### 9 * 2 = 18" a calculation
HASHES = re.compile(rf"####[ \t]*(?:\*\*)?({NUMBER.pattern})(?![.:)][ \t]*\w)")
OPERATOR = re.compile(r"[ \t]*(?:[-+*/x\u2212\u00d7\u00f7]|\\times|\\cdot)")
# "m^2" and "m^{2}"; what numbers a list in bold, "**2. Add:** 9 + 9 = 18"; marks that no number has
EXPONENT = re.compile(r"\^[ \t]*(?:\{[^{}]*\}|-?\d+)")
ITEM = re.compile(r"^[ \t]*(?:[-*+][ \t]+)?\*\*\d[.):](?=[ \t*][^\n]*\d)", re.MULTILINE)
UNBOLD = re.compile(rf"\*\*(?!{NUMBER.pattern})|(?<=\w)\*\*")
# "18 dollars (9 eggs * $2)": how it is calculated, without a result
BRACKETS = re.compile(r"(?<!\\)\(([^()=]*)\)")
CALCULATION = re.compile(r"[*+\u00d7\u00f7]|\\times|\\cdot|\d[ \t]*[x/][ \t]*\$?\d")
ANSWER_IS = re.compile(r"\banswer(?:[ \t]+\w+){0,5}[ \t]+is\b:?\s*", re.IGNORECASE)
ANSWER = re.compile(r"\banswer[ \t]*[:=]\s*", re.IGNORECASE)
# "the total is 160 minutes, i.e. 2 hours": group 1 is the answer if no calculation follows it
TOTAL_IS = re.compile(
    r"\b(?:total|cost|price|sum|amount|result|profit)\b[^.!?\n]{0,60}?"
    rf"\b(?:is|was|equals|comes[ \t]+to)[ \t:]+({NUMBER.pattern})",
    re.IGNORECASE,
)
GOES_ON = re.compile(
    r"[=+*/%\u00d7\u00f7]|\b(?:and|so|but|then|which|that|is|are|was|were|gives|makes|equals"
    r"|each|every|per|more|less|fewer|times|plus|minus|percent)\b",
    re.IGNORECASE,
)
# what a writer rules out: "not 12 but 366", "366, not 12"
RULED_OUT = re.compile(
    rf"\bnot\b(?:[^.!?;\n]{{0,60}}?\bbut\b|[ \t]+(?:{NUMBER.pattern}))", re.IGNORECASE
)
SENTENCE_END = re.compile(
    r"(?<!i\.e)(?<!e\.g)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?](?=\s|$)|\n"
)
# what follows an answer that stands first
EXPLANATION = re.compile(
    r"^[ \t*#]*(?:Explanation|Reasoning|Justification|Solution)\b", re.MULTILINE | re.IGNORECASE
)
NEXT_QUESTION = re.compile(r"^(?:Question|Q):", re.MULTILINE)
# a waiting line is nothing but names with one of BETWEEN between two of them
NAME, BETWEEN = r"[^\W\d_a-z][\w'-]*", r"(?:,\s*(?:and\s+)?|\s+and\s+|\s*(?:->|\u2192)\s*)"
NAMES = re.compile(f"{NAME}(?:{BETWEEN}{NAME})*")
LEAD_IN = re.compile(r"^.*(?::|\bis)(?:\s|$)")  # "The new line is Ada, Ben"
# Markdown, brackets, quotation marks, and what numbers a list
MARKS = re.compile(r"[*_`\"\[\]]|(?<!\w)'|'(?!\w)|^\s*-\s|(?<!\w)\d+[.)](?=\s)")


@dataclass(frozen=True)
class Extracted:
    """A program found in an answer.

    code:    the source, "" for an empty answer.
    how:     "fence" | "text" | "body" (completed with the prompt) | "none": no program was found,
             code is raw text.
    why_cut: what was left out of the answer and why, "" if nothing; reasons are joined with "; ".
    """

    code: str
    how: str
    why_cut: str


def humaneval_program(
    answer: str, doc: Mapping[str, Any], *, tests: str, prefill: str = ""
) -> Extracted:
    """The program in an answer to HumanEval: the function asked for, what it and the tests need.

    doc: the row, with "prompt" and "entry_point". tests: source of the tests.
    prefill: the beginning of the answer, where the prompt form gives one; answer continues it.
    """
    from tasks.programs import called_names

    roots = called_names(tests)
    return extract_code(answer, doc["entry_point"], doc["prompt"], roots=roots, prefill=prefill)


def mbpp_program(
    answer: str, doc: Mapping[str, Any], *, tests: str, prefill: str = ""
) -> Extracted:
    """The same for MBPP. The function asked for is the first one that the asserts call.

    doc: the row, with "test_list". tests: set-up code and asserts.
    """
    from tasks.programs import called_names

    asked = called_names("\n".join(doc["test_list"]))
    entry_point = asked[0] if asked else None
    return extract_code(answer, entry_point, roots=called_names(tests), prefill=prefill)


def minerva_answer(answer: str) -> str | None:
    """What the last closed \\boxed{...} of an answer to MATH holds; None without one."""
    text = answer_part(answer)[0][-MAX_READ:]
    for begin in reversed([found.end() for found in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
    return None


def gsm8k_number(answer: str) -> str | None:
    """The number that an answer to GSM8K ends up with, in plain digits; None without one.

    The first of these that is there: the last \\boxed{...}, the last "#### ...", what follows the
    last "the answer is" (or "Answer:" where a single sentence or a line with a number alone
    follows, apart from an explanation), a bold number of the last line with a number, what its last
    sentence says that a total, cost, price, sum, amount, result or profit is, the last number.
    Other sentences in which the answer is not the last number are not told apart. A number after
    "not" is none, nor are thoughts, a next question, exponents, the bold number of a list's item
    and a calculation in brackets without its result.
    """
    text, _ = answer_part(answer)
    for old, new in (("{,}", ","), ("\\,", ","), ("\\!", ""), ("\\$", "$"), ("\\%", "%")):
        text = text.replace(old, new)
    first = NUMBER.search(text)
    if first is None:
        return None
    if question := NEXT_QUESTION.search(text, first.end()):
        text = text[: question.start()]
    text = text[-MAX_READ:]
    for pattern, to in ((RULED_OUT, " "), (EXPONENT, " "), (ITEM, " "), (BRACKETS, _no_answer)):
        kept = pattern.sub(to, text)
        text = kept if NUMBER.search(kept) else text
    for boxed in reversed(BOXED.findall(text)):
        if found := _result(boxed):
            return _plain(found)
    plain = UNBOLD.sub("", text).replace("\\boxed", "")
    *_, last = [None, *HASHES.finditer(plain)]
    if last:
        rest = plain[last.end(1) :].partition("\n")[0]
        calculation = rest if OPERATOR.match(rest) and "=" in rest else ""
        return _plain(_result(last.group(1) + calculation))
    *_, last = [None, *ANSWER_IS.finditer(plain)]
    sentence = SENTENCE_END.split(plain[last.end() :], 1)[0] if last else ""
    if not NUMBER.search(sentence):
        *_, last = [None, *ANSWER.finditer(plain)]
        rest = EXPLANATION.split(plain[last.end() :], 1)[0].strip() if last else ""
        sentence, *more = SENTENCE_END.split(rest, 1)
        alone = NUMBER_ALONE.match(rest.removeprefix("**"))
        if any(re.search(r"[^\W_]", part) for part in more) and not alone:
            sentence = ""
    if found := _result(sentence):
        return _plain(found)
    for line in reversed(text.split("\n")):
        if numbers := list(NUMBER.finditer(line)):
            if bold := _bold(line):
                return _plain(bold[-1])
            sentence = next(s for s in reversed(SENTENCE_END.split(line)) if NUMBER.search(s))
            *_, total = [None, *TOTAL_IS.finditer(sentence)]
            if total and not GOES_ON.search(sentence, total.end()):
                return _plain(NUMBER.search(total.group(1)))
            return _plain(numbers[-1])
    return None


def _no_answer(brackets: re.Match) -> str:
    """A calculation in brackets as nothing, other brackets as they are."""
    inside = brackets.group(1)
    calculates = CALCULATION.search(inside) and len(NUMBER.findall(inside)) > 1
    return " " if calculates else brackets.group()


def _result(text: str) -> re.Match | None:
    """The first number behind the last sign of equality: 18 in "9 * 2 = 18 dollars".

    Without such a sign it is the only number in bold, if there is one.
    """
    if "=" not in text and len(bold := _bold(text)) == 1:
        return bold[0]
    return NUMBER.search(text.rpartition("=")[2]) or NUMBER.search(text)


def _bold(text: str) -> list[re.Match]:
    return [n for n in NUMBER.finditer(text) if text.endswith("**", 0, n.start())]


def _plain(number: re.Match) -> str:
    """A match of NUMBER in plain digits: no thousands, no zeros behind the decimals."""
    digits = number.group(1).replace(",", "")
    whole, _, decimals = digits.partition(".")
    sign = "-" if set("-\u2212") & set(number.group()) else ""
    return sign + (whole.lstrip("0") or "0") + ("." + decimals).rstrip("0").rstrip(".")


def truthfulqa_answer(answer: str) -> str:
    """A TruthfulQA answer without thoughts and a leading "A:", up to the next question."""
    text, _ = answer_part(answer)
    return text.strip().removeprefix("A:").split("\nQ:")[0].strip()


def lines_names(answer: str) -> list[str]:
    """The names of the last list in an answer, as one text line or one name a line; [] without one.

    A text line counts whole, without a lead-in: in "Ada Ada, Ben" or "Ada, , Ben" there is no list.
    """
    text, _ = answer_part(answer)
    names: list[str] = []
    alone = False  # the text line before has one name
    for line in text[-MAX_READ:].split("\n"):
        line = LEAD_IN.sub("", MARKS.sub("", line)).strip().removesuffix(".")
        if not line:
            continue
        found = re.split(BETWEEN, line) if NAMES.fullmatch(line) else []
        if found:
            names = names + found if alone and len(found) == 1 else found
        alone = len(found) == 1
    return names


def extract_code(
    answer: str,
    entry_point: str | None = None,
    prompt: str = "",
    *,
    roots: Iterable[str] = (),
    prefill: str = "",
) -> Extracted:
    """The program in an answer. See tasks/programs.py for how it is found.

    Chat models wrap code in prose and fences, restate the function or give only its body, add
    examples that run at import, and end with chat tokens.
    Of several definitions of it the last complete one counts. What stands in <think>...</think> is
    no answer.
    entry_point: the function asked for; None takes the first piece that defines anything, whole.
    prompt:      source that the answer may continue (HumanEval), or "".
    roots:       further names that the tests use and that must be kept.
    prefill:     the beginning of the answer, which the prompt gave; answer continues it.
    """
    from tasks.programs import find_program

    answer, cuts = answer_part(answer)
    if len(answer) > MAX_READ:
        answer = answer[:MAX_READ]
        cuts.append(f"what follows {MAX_READ} characters")
    if not answer.strip():
        return Extracted("", "none", "; ".join([*cuts, "empty answer"]))
    begun, source = unix_lines(prefill), unix_lines(prompt)
    first = None
    for part, why in code_parts(answer):
        text = begun + part
        code, how = find_program(text, code_blocks(text), entry_point, source, frozenset(roots))
        first = first or (part, code, how, why)
        if how != "none":
            answer = part
            break
    else:
        answer, code, how, why = first
    cuts += why
    if how != "none":
        kept, lines = (text.replace("\\_", "_").split("\n") for text in (code, answer))
        kept = {"", *(line.strip() for line in kept)}
        lines = (line.strip() for line in lines if "```" not in line)
        cuts += ["text outside the program"] if any(line not in kept for line in lines) else []
    return Extracted(code, how, "; ".join(cuts))


def code_parts(answer: str) -> Iterator[tuple[str, list[str]]]:
    """Readings of an answer as a text with code, the likeliest first, and why the rest was cut.

    The first is the text between [BEGIN] and [DONE], without the quotes around the worked examples
    of OpenCompass's MBPP. The others are for answers in which no program is found so: the whole
    text, Markdown quotations and interactive sessions without their marks, and escaped underscores.
    """
    begin = CODE_BEGIN.search(answer)
    text = answer[begin.end() :] if begin else answer
    end, cuts = CODE_END.search(text), []
    if end:
        text = text[: end.start() + end.group().rfind("DONE")].removesuffix("[")
        cuts.append("[DONE]")
    quoted = text.strip()
    # a stop string may have removed [DONE]: then code must follow the quote
    if begin or end or re.match(r"['\"]\s*(?:import|from|def|class|@)\b", quoted):
        text = _without_quotes(text)
    yield text, cuts
    readings = (
        answer,
        QUOTATION.sub("", answer),
        SESSION.sub("", QUOTATION.sub("", answer)),
        text.replace("\\_", "_"),
    )
    for reading in dict.fromkeys(readings):
        if reading != text:
            yield reading, []


def _without_quotes(text: str) -> str:
    """A marked program without the quotes around it; one of them may be missing."""
    stripped = text.strip()
    first, last = stripped.partition("\n")[0], stripped.rpartition("\n")[2]
    if len(stripped) > 1 and stripped[0] == stripped[-1] and _is_quote(stripped[:3]):
        unquoted = stripped[1:]  # its last quote may be the end of a string
        return unquoted[:-1] if _is_open(unquoted.rpartition("\n")[2]) else unquoted
    if _is_quote(first[:3]) and not _is_open(first[1:]):
        return stripped[1:]
    if _is_quote(last[-1:]) and last[-3:] != last[-1] * 3 and _is_open(last):
        return stripped[:-1]
    return text


def _is_open(line: str) -> bool:
    """Whether a quote in the line has no partner."""
    return any(found.group(2) is None for found in STRING.finditer(line))


def _is_quote(start: str) -> bool:
    return start[:1] in ("'", '"') and start != start[0] * 3


def code_blocks(text: str) -> list[str]:
    """Contents of the fenced blocks. The last may be open.

    A fence with a language opens a block even where one is open.
    """
    blocks: list[str] = []
    start: int | None = None
    for fence in CODE_FENCE.finditer(text):
        if start is not None:
            blocks.append(text[start : fence.start()])
        start = fence.end() if start is None or fence.group(1) else None
    if start is not None:
        blocks.append(text[start:])
    return [b for b in blocks if b.strip()]


def unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def answer_part(answer: str) -> tuple[str, list[str]]:
    """The text before the first chat end token without thoughts, and why the rest was cut.

    An end token in quotes on its line is part of a program; so is `</think>`, and in a comment or
    an indented line of code. End tokens that a model has generated are cut by their ids before.
    """
    text, cuts = unix_lines(answer), []
    # most answers have no such mark, and finding the quotes in five megabytes takes seconds
    if END_TOKEN.search(text) and (end := END_TOKEN.search(QUOTED.sub(_blank, text))):
        text = text[: end.start()]
        cuts.append(f"end token {end.group()}")
    spoken = THOUGHT.sub("", text)
    if "</think>" in spoken:
        bare = COMMENT.sub(_blank, QUOTED.sub(_blank, spoken))
        code = BEGIN_OF_CODE.search(spoken)
        begun = code.start() if code else len(spoken)
        ends = END_OF_THOUGHT.finditer(bare)
        ends = [m.end() for m in ends if not m.group(1) or m.end() <= begun]
        spoken = spoken[max(ends, default=0) :]
    if spoken != text:
        cuts.append("<think>")
    return spoken, cuts


def _blank(found: re.Match) -> str:
    return found.group() if found.lastindex == 1 else " " * len(found.group())


SCHEMA_VERSION = 2  # of the result file
# raised with a change of decoding that can change a token: kept samples are then made anew
ENGINE_VERSION = 3
# raised with a change of scoring: results are then scored anew from the kept samples
SCORING_VERSION = 4


# ---------------------------------------------------------------- errors and exit codes

EXIT_COMPLETE, EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_DATA, EXIT_INCOMPLETE, EXIT_OUTPUT, EXIT_BUSY = (
    0,
    2,
    3,
    4,
    5,
    74,
    75,
)


class DllmexpError(Exception):
    """An error that the user can mend.

    problems:  one line each.
    exit_code: the exit code of the process.
    """

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class UsageError(DllmexpError):
    """The command line or the configuration is not valid."""

    exit_code = EXIT_USAGE


class EnvironmentProblem(DllmexpError):
    """This machine lacks something: a GPU, a sandbox, a package."""

    exit_code = EXIT_ENVIRONMENT


class BadDataError(DllmexpError):
    """Benchmark files, predictions or a checkpoint are missing or malformed."""

    exit_code = EXIT_DATA


class OutputError(DllmexpError):
    """The result cannot be written: no permission, no space."""

    exit_code = EXIT_OUTPUT


class BusyError(DllmexpError):
    """Another process has the same job."""

    exit_code = EXIT_BUSY


class ManyProblems(DllmexpError):
    """Problems of several kinds found in one go; ends with the lowest of their exit codes.

    One that is found twice is said once.
    """

    def __init__(self, errors: Sequence[DllmexpError]):
        super().__init__(dict.fromkeys(p for e in errors for p in e.problems))
        self.exit_code = min(e.exit_code for e in errors)


def nearest(value: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `allowed`, or "" where nothing is close."""
    names = {name.casefold(): name for name in allowed}
    # --vresion and --partition have 0.6
    close = difflib.get_close_matches(value[:100].casefold(), names, n=1, cutoff=0.61)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def numbered(n: int, name: str) -> str:
    """`1 experiment`, `2 experiments`; `2 passes`."""
    ending = "es" if name.endswith("s") else "s"
    return f"{n} {name}{ending * (n != 1)}"


def parse_fault(error: Exception) -> str:
    """Why a text cannot be parsed; Python's own words name its settings instead."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    digits = re.search(r"limit \((\d+)", str(error))  # Python 3.10 says no "digits"
    return f"an integer has more than {digits[1]} digits" if digits else str(error)


def terminal_columns() -> int:
    """Columns of the terminal that stdout is; 0 for another stdout."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


# ---------------------------------------------------------------- configuration


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by the error's class name or message: torch is not imported here."""
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "HIP out of memory",
        "Triton Error [CUDA]: out of memory",
    )
    return (
        isinstance(error, MemoryError)
        or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def sha256(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sample_seed(seed: int, prompt: str, repeat: int) -> int:
    """Seed of one sample, 63 bits. It does not depend on order, batch, limit or process."""
    return int(sha256([seed, prompt, repeat])[:16], 16) >> 1


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each difference of two configurations; dots join nested keys."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differing_keys(a, b)]
        elif a != b:
            lines.append(f"{key}: " + " -> ".join(_shortened(a, b)))
    return lines


def _shortened(a: Any, b: Any) -> list[str]:
    """Two values as JSON of at most 40 characters, from where they differ if that is further on."""
    texts = [json.dumps(value, ensure_ascii=True) for value in (a, b)]
    same = len(os.path.commonprefix(texts))
    start = same - 10 if same > 30 and max(map(len, texts)) > 40 else 0
    texts = ["..." * (start > 0) + text[start:] for text in texts]
    return [text if len(text) <= 40 else text[:37] + "..." for text in texts]


# ---------------------------------------------------------------- environment

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "lm-eval",
    "datasets",
    "numpy",
    "sacrebleu",
    "rouge-score",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the directory of this file; None without git or a repository."""
    folder = str(Path(__file__).resolve().parent)
    try:
        run = subprocess.run(  # git refuses a repository of another user unless it is named safe
            ["git", "-C", folder, "-c", f"safe.directory={folder}", *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use; on macOS, which does not tell, all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> str:
    """The commit of this checkout, and the versions of formats and packages, in a line."""
    commit = _git("describe", "--always", "--dirty", "--abbrev=12") or "(no git repository)"
    ours = f"engine {ENGINE_VERSION}, scoring {SCORING_VERSION}, results {SCHEMA_VERSION}"
    packages = (f"{name} {_version(name)}" for name in ("torch", "transformers", "lm-eval"))
    return "; ".join([f"dllmexp {commit}", ours, ", ".join(packages)])


def environment() -> dict[str, Any]:
    """Package versions, git state and CPU: a number may depend on these and its configuration."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "cpu_count": available_cores(),
        "command": list(sys.argv),
    }


# ---------------------------------------------------------------- files


def safe_streams() -> None:
    """Streams that take any name, and are never another file's.

    A locale may lack the letters of a name. A process without stdin, stdout or stderr gets
    /dev/null in their place: the next file that is opened would have the descriptor, and with it
    what is printed.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            stream = open(fd, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def file_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file. Raises OSError for anything else: a FIFO would block."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a regular file. Raises as `file_bytes`."""
    return hashlib.sha256(file_bytes(path)).hexdigest()


def readable_json(value: dict[str, Any]) -> str:
    """JSON with one line per top-level key, and one per entry of a list of objects."""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=True, allow_nan=False)

    def entry(value: Any) -> str:
        rows = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        return "[\n  " + ",\n  ".join(map(one, value)) + "\n ]" if rows else one(value)

    return "{\n" + ",\n".join(f" {one(key)}: {entry(v)}" for key, v in value.items()) + "\n}\n"


def atomic_write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write JSON so that `path` always holds either its old content or all of `value`.

    A temporary file in the same directory, fsync, rename, fsync of the directory. Raises
    OutputError where that fails.
    """
    path, text = Path(path), readable_json(value)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="ascii",
            dir=path.parent,
            prefix=f".{path.name}.",
            suffix=".tmp",
            delete=False,
        ) as out:
            temporary = Path(out.name)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; {way_out(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make a new name survive a power loss, where the file system can sync a directory."""
    with suppress(OSError), ExitStack() as stack:
        stack.callback(os.close, handle := os.open(directory, os.O_RDONLY))
        os.fsync(handle)


def way_out(error: OSError) -> str:
    """What helps where a file cannot be written."""
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of a file (ulimit -f)"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space or give another --output_dir" if full else "give another --output_dir"


def output_problem(directory: str | Path) -> str | None:
    """The reason why `directory` cannot be written to, or None.

    Makes the directory, and writes, syncs and removes a probe.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe.", suffix=".tmp") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return f"--output_dir {directory} cannot be written: {error.strerror}; {way_out(error)}"
    return None
