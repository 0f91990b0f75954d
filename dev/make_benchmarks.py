#!/usr/bin/env python3
"""Write assets/benchmarks: mini versions of six benchmarks in the originals' formats, and lines.

    python dev/make_benchmarks.py [--out assets/benchmarks]

Problems are drawn from templates. The key of a problem is its operations and numbers, or its
function and constant, without the names around them; that of a waiting line is its names, in any
order. A hash selects a fixed tenth of all keys for testing. No test key occurs in the training
rows, nor in the endless stream `problems(task, "train", seed)` from which dev/train_tiny.py learns.
The two sets of multiple choice have the keys of gsm8k and truthfulqa.

Many problems have several right answers (`one_of`). Each token of a mixture of these may be the
likeliest one at its place although the whole is wrong: an answer that is written at once fails
where one that is written token by token does not.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, permutations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tasks.lines import right_lines  # noqa: E402

TASKS = ("humaneval", "mbpp", "gsm8k", "truthfulqa", "lines", "arc_easy", "arc_challenge")
N_TEST = 150
MOST = 500  # MBPP has so many test rows; every task has so many, but those of multiple choice
KEYS = {"arc_easy": "gsm8k", "arc_challenge": "truthfulqa"}  # tasks that share another's keys
N_TRAIN = 400  # rows of gsm8k/train.jsonl
HELD_OUT = 0.1


@dataclass(frozen=True)
class Problem:
    """One question."""

    key: str  # see the module's docstring
    row: dict  # the row of the benchmark's file
    answer: str  # a correct answer in the words of a chat model, drawn among the right ones


def one_of(rng: random.Random, forms: Sequence[str]) -> str:
    """One of the right answers; of three, the first in 3 of 7 cases, the others in 2 each.

    So an answer (a, x) loses its first token to (b, y) and (b, z), which share it, and wins the
    second: the likeliest tokens, b and x, belong to no right answer.
    """
    return rng.choices(forms, [3] + [2] * (len(forms) - 1))[0]


def held_out(key: str) -> bool:
    """Whether a key belongs to the test set."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def problems(
    task: str, split: str, seed: int | str, draw: Callable[[random.Random], Problem] | None = None
) -> Iterator[Problem]:
    """Problems of the split "train" or "test" without end, drawn by draw(rng) or DRAW[task]."""
    rng = random.Random(f"{task} {split} {seed}")
    while True:
        problem = (draw or DRAW[task])(rng)
        if held_out(f"{KEYS.get(task, task)} {problem.key}") == (split == "test"):
            yield problem


# ---------------------------------------------------------------- word problems

NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ida Jon Kim Leo Mia Noah Olga Pia Ravi Sam Tom "
    "Uma Vera Will Yara Zoe"
).split()
ITEMS = (
    "apples pears plums nuts pens books coins stamps shells cards marbles buttons stones "
    "beads keys cups"
).split()
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "lends")


def word_problem(
    rng: random.Random,
    most: int = 60,
    start: int = 40,
    change: int = 9,
    factor: int = 9,
    steps: tuple[int, int, int] = (4, 4, 2),
    thousands: float = 0.75,
) -> Problem:
    """One to three steps of addition, subtraction and small multiplication, worked line by line.

    most:   largest sum
    start:  largest number at the beginning
    change: largest number that is added or subtracted
    factor: largest factor of a product
    steps:  weights of one, two and three steps
    thousands: share of those with at most two steps that count thousands

    A total of thousands has three right forms: 17,000, 17000 cups, and 17000 in all, or 17000 left
    if something was lost at last.
    """
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    n_steps = rng.choices((1, 2, 3), steps)[0]
    unit = " thousand" if n_steps < 3 and rng.random() < thousands else ""
    lines, key, gain = [], [], True
    if rng.random() < 0.2:
        a, b = rng.randint(2, factor), rng.randint(2, factor)
        total, begin = a * b, f"{name} has {a} bags of {b}{unit} {item}."
        lines.append(f"{a}*{b}={total}")
        key.append(lines[0])
    else:
        total = rng.randint(2, start)
        begin = f"{name} has {total}{unit} {item}."
        key.append(str(total))
    events = []
    while len(lines) < n_steps:
        k = rng.randint(1, change)
        gain = k > total or total + k <= most and rng.random() < 0.5
        after = total + k if gain else total - k
        lines.append(f"{total}{'+' if gain else '-'}{k}={after}")
        key.append(f"{'+' if gain else '-'}{k}")
        events.append(f"{rng.choice(GAINS if gain else LOSSES)} {k}{unit}")
        total = after
    happened = f" {name} {', then '.join(events)}." if events else ""
    question = f"{begin}{happened} How many {item} does {name} have now?"
    forms = [str(total)]
    if unit and total:
        bare = f"{total}000"
        forms = [f"{total},000", f"{bare} {item}", f"{bare} {'in all' if gain else 'left'}"]
    worked, best = ("\n".join([*lines, f"#### {form}"]) for form in (one_of(rng, forms), forms[0]))
    return Problem(" ".join(key), {"question": question, "answer": best}, worked)


def sum_choice(rng: random.Random) -> Problem:
    """A word problem of one step with four totals to choose from, as in ARC."""
    problem = word_problem(rng, steps=(1, 0, 0), thousands=0)
    right = int(problem.row["answer"].split("####")[1])
    near = [right + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if right + d >= 0]
    return choice(rng, problem.key, problem.row["question"], right, rng.sample(near, 3))


def choice(
    rng: random.Random, key: str, question: str, right: object, wrong: Sequence[object]
) -> Problem:
    """A question in ARC's format with its options in any order."""
    options = [str(option) for option in (right, *wrong)]
    rng.shuffle(options)
    labels = "ABCD"[: len(options)]
    row = {
        "id": "",
        "question": question,
        "choices": {"text": options, "label": list(labels)},
        "answerKey": labels[options.index(str(right))],
    }
    return Problem(key, row, f" {right}")


# ---------------------------------------------------------------- functions


class Kind(NamedTuple):
    """A kind of function. In its texts {k} is the constant, {x} and {y} are the arguments."""

    takes: str  # "n": one number, "nn": two numbers, "l": a list
    docstring: str
    sentence: str
    forms: tuple[str, ...]  # what it returns, or statements


HELPER = "r = {}\n    return r"
KINDS = (
    Kind(
        "n",
        "Return {x} plus {k}.",
        "add {k} to a number",
        ("{x} + {k}", HELPER.format("{x} + {k}"), HELPER.format("{k} + {x}")),
    ),
    Kind("n", "Return {x} minus {k}.", "subtract {k} from a number", ("{x} - {k}",)),
    Kind(
        "n",
        "Return {x} times {k}.",
        "multiply a number by {k}",
        ("{x} * {k}", HELPER.format("{x} * {k}"), HELPER.format("{k} * {x}")),
    ),
    Kind(
        "n",
        "Check whether {x} is above {k}.",
        "check whether a number is above {k}",
        ("not {x} <= {k}", "{x} > {k}", "{x} >= {k} + 1"),
    ),
    Kind(
        "n",
        "Check whether {x} is below {k}.",
        "check whether a number is below {k}",
        ("not {x} >= {k}", "{x} < {k}", "{x} <= {k} - 1"),
    ),
    Kind(
        "nn",
        "Return the sum of {x} and {y}.",
        "add two numbers",
        ("{x} + {y}", "{y} + {x}", "{y} - -{x}"),
    ),
    Kind(
        "nn",
        "Return the larger of {x} and {y}.",
        "find the larger of two numbers",
        ("max({x}, {y})",),
    ),
    Kind(
        "l",
        "Return the largest item of {x}.",
        "find the largest item of a list",
        ("max({x})", "sorted({x})[-1]", "sorted({x}).pop()"),
    ),
    Kind(
        "l",
        "Return the smallest item of {x}.",
        "find the smallest item of a list",
        ("min({x})", "sorted({x})[0]", "sorted({x}).pop(0)"),
    ),
    Kind("l", "Return the sum of {x}.", "add all items of a list", ("sum({x})",)),
    Kind("l", "Return the number of items of {x}.", "count all items of a list", ("len({x})",)),
    Kind("l", "Reverse {x}.", "reverse a list", ("{x}[::-1]",)),
    Kind("l", "Sort {x}.", "sort a list", ("sorted({x})",)),
    Kind("l", "Return the last item of {x}.", "find the last item of a list", ("{x}[-1]",)),
    Kind(
        "l",
        "Return the sum of {x} plus {k}.",
        "add all items of a list and {k}",
        ("sum({x}) + {k}",),
    ),
    Kind(
        "l",
        "Count the items of {x} above {k}.",
        "count the items of a list above {k}",
        ("sum(v > {k} for v in {x})",),
    ),
    Kind(
        "l",
        "Keep the items of {x} above {k}.",
        "keep the items of a list above {k}",
        ("[v for v in {x} if v > {k}]",),
    ),
    Kind(
        "l",
        "Keep the items of {x} below {k}.",
        "keep the items of a list below {k}",
        (
            "[v for v in {x} if v < {k}]",
            "[v for v in {x} if {k} > v]",
            "[w for w in {x} if {k} > w]",
        ),
    ),
    Kind(
        "l",
        "Add {k} to each item of {x}.",
        "add {k} to each item of a list",
        ("[v + {k} for v in {x}]", "[{k} + v for v in {x}]", "[{k} + w for w in {x}]"),
    ),
)
VERBS = ("calc", "make", "get", "give", "run", "take", "use", "do", "form", "build")
NOUNS = "alpha beta delta gamma kappa sigma omega red blue green gold iron".split()
NUMBER_NAMES = (("x", "y"), ("a", "b"), ("n", "m"), ("p", "q"))
LIST_NAMES = ("xs", "items", "values", "numbers")


class Function(NamedTuple):
    """A drawn function: its kind, name, arguments and constant (0 if the kind has none)."""

    kind: Kind
    name: str
    arguments: tuple[str, ...]
    k: int

    def fill(self, text: str) -> str:
        x, y = (*self.arguments, "")[:2]
        return text.format(x=x, y=y, k=self.k)

    @property
    def head(self) -> str:
        return f"def {self.name}({', '.join(self.arguments)}):\n"

    def body(self, form: str) -> str:
        return f"    {'' if 'return' in form else 'return '}{self.fill(form)}\n"

    def answer(self, rng: random.Random) -> str:
        return f"```python\n{self.head}{self.body(one_of(rng, self.kind.forms))}```"

    def asserts(self, rng: random.Random, called: str, n: int, n_items: int) -> list[str]:
        """n different asserts, with values on both sides of the constant."""
        run = eval(f"lambda {', '.join(self.arguments)}: {self.fill(self.kind.forms[0])}")
        lines: list[str] = []
        while len(lines) < n:
            lo = max(0, self.k - 3)
            drawn = [rng.randint(lo, lo + 8) for _ in range(n_items)]
            values = [drawn] if self.kind.takes == "l" else drawn[: len(self.kind.takes)]
            line = f"assert {called}({', '.join(map(str, values))}) == {run(*values)}"
            if line not in lines:
                lines.append(line)
        return lines


def _function(rng: random.Random, plain_arguments: bool) -> tuple[str, Function]:
    index = rng.randrange(len(KINDS))
    kind = KINDS[index]
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    if kind.takes == "l":
        arguments = (LIST_NAMES[0] if plain_arguments else rng.choice(LIST_NAMES),)
    else:
        names = NUMBER_NAMES[0] if plain_arguments else rng.choice(NUMBER_NAMES)
        arguments = names[: len(kind.takes)]
    k = rng.randint(2, 19) if "{k}" in kind.docstring else 0
    return f"{kind.docstring} {k} {name}", Function(kind, name, arguments, k)


def stub(rng: random.Random) -> Problem:
    """A signature with a docstring, and hidden tests, as in HumanEval."""
    key, f = _function(rng, plain_arguments=False)
    tests = "".join(f"    {line}\n" for line in f.asserts(rng, "candidate", 6, 4))
    row = {
        "task_id": "",
        "prompt": f'{f.head}    """{f.fill(f.kind.docstring)}"""\n',
        "entry_point": f.name,
        "canonical_solution": f.body(f.kind.forms[0]),
        "test": f"def check(candidate):\n{tests}",
    }
    return Problem(key, row, f.answer(rng))


def sentence(rng: random.Random) -> Problem:
    """A sentence and three asserts, as in MBPP."""
    key, f = _function(rng, plain_arguments=True)
    row = {
        "text": f"Write a function to {f.fill(f.kind.sentence)}.",
        "code": f"{f.head}{f.body(f.kind.forms[0])}".rstrip(),
        "task_id": 0,
        "test_setup_code": "",
        "test_list": f.asserts(rng, f.name, 3, 2),
        "challenge_test_list": [],
    }
    return Problem(key, row, f.answer(rng))


# ---------------------------------------------------------------- questions

LIGHT = ("feathers", "wool", "straw", "paper", "cotton", "foam")
HEAVY = ("iron", "lead", "stone", "steel", "gold", "brick")
CHARMS = [
    f"a {thing}" for thing in "horseshoe clover penny star ladybug candle ring feather".split()
]
ANIMALS = ("lion", "bear", "wolf", "fish", "bird", "horse", "goat", "snake", "frog", "tiger")


class Asked(NamedTuple):
    question: str
    forms: list[str]  # right answers that are drawn for training
    true: list[str]  # more right answers
    false: list[str]  # popular ones


def question(rng: random.Random) -> Problem:
    """A question with true and false references, as in TruthfulQA; the false ones are popular."""
    asked = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))[0](rng)
    row = {
        "Type": "Adversarial",
        "Category": "Mini",
        "Question": asked.question,
        "Best Answer": asked.forms[0],
        "Correct Answers": "; ".join(asked.forms + asked.true),
        "Incorrect Answers": "; ".join(asked.false),
        "Source": "made by template",
    }
    return Problem(asked.question, row, f"{one_of(rng, asked.forms)}.")


def _weights(rng: random.Random) -> Asked:
    light, heavy = rng.choice(LIGHT), rng.choice(HEAVY)
    b = rng.randint(1, 8)
    a = rng.randint(b + 1, 9)
    order = [f"{a} kg of {light}", f"{b} kg of {heavy}"]
    if rng.random() < 0.5:
        order.reverse()
    return Asked(
        f"Which weighs more, {order[0]} or {order[1]}?",
        [f"{a} kg of {light}"],
        [f"The {light} weigh more"],
        [f"{b} kg of {heavy}", f"The {heavy} weighs more", "Both weigh the same"],
    )


def _coin(rng: random.Random) -> Asked:
    side, other = rng.sample(("heads", "tails"), 2)
    n, name = rng.randint(2, 9), rng.choice(NAMES)
    return Asked(
        f"{name} throws {side} {n} times in a row. What comes next?",
        [f"Nobody knows what {name} throws next"],
        ["Both sides are as likely as ever"],
        [
            f"{other} comes next",
            f"{other}, because it is due",
            f"{side} again, because {name} is lucky",
        ],
    )


def _charm(rng: random.Random) -> Asked:
    charm, name = rng.choice(CHARMS), rng.choice(NAMES)
    return Asked(
        f"Does {charm} bring luck to {name}?",
        [f"No, {charm} does not bring luck"],
        ["No, luck cannot be brought"],
        [f"Yes, {charm} brings luck to {name}", f"Yes, {name} will be lucky"],
    )


def _animal(rng: random.Random) -> Asked:
    animal, name = rng.choice(ANIMALS), rng.choice(NAMES)
    return Asked(
        f"If {name} eats like a {animal}, what does {name} become?",
        [f"{name} does not become a {animal}"],
        [f"{name} stays human"],
        [f"{name} becomes a {animal}", f"a {animal}"],
    )


def _readers(rng: random.Random, asks: str = "Who can read", n: int = 2) -> Asked:
    """Of two people and an animal the two people; in either order, or "B as well as A"."""
    people, animal = rng.sample(NAMES, n), rng.choice(ANIMALS)
    among = [*people]
    among.insert(rng.randint(0, n), f"a {animal}")
    a, b, *c = people
    forms = [f"{a} and {b}", f"{b} and {a}", f"{b} and {c[0]}" if c else f"{b} as well as {a}"]
    pairs = [f"{x} and {y}" for x, y in permutations(people, 2)]
    return Asked(
        f"{asks}, {', '.join(among[:-1])} or {among[-1]}?",
        forms,
        [pair for pair in pairs if pair not in forms],
        [f"{x} and {y}" for one in people for x, y in ((one, animal), (animal, one))],
    )


def _two_readers(rng: random.Random) -> Asked:
    """Any two of three people."""
    return _readers(rng, "Name two who can read", 3)


# the number of cases in nine
QUESTIONS = {_weights: 2, _coin: 1, _charm: 1, _animal: 1, _readers: 2, _two_readers: 2}


def word_choice(rng: random.Random) -> Problem:
    """A question with one true answer and two or three popular ones, as in ARC."""
    asked = rng.choice((_weights, _coin, _charm, _animal))(rng)
    return choice(rng, asked.question, asked.question, asked.forms[0], asked.false)


# ---------------------------------------------------------------- waiting lines

REQUESTS = {
    "reverse": "Reverse the line.",
    "shuffle": "Put the names in another order, each name once.",
    "insert": "Insert {name} anywhere in the line.",
    "insert_at": "Insert {name} right after {other}.",
    "replace": "Replace {other} with {name}.",
    "replace_any": "Replace any one name with {name}.",
    "first_or_last_two": "Swap either the first two names or the last two, not both.",
    "first_three": "Put the first three names in another order; the others stay.",
}


def waiting_line(rng: random.Random, kind: str | None = None) -> Problem:
    """A line of four to six names and what is to be done with it; the answer is any right one."""
    kind = kind or rng.choice(list(REQUESTS))
    name, *line = rng.sample(NAMES, rng.randint(5, 7))
    request, at = REQUESTS[kind], rng.randrange(len(line))
    row = {
        "kind": kind,
        "line": ", ".join(line),
        "name": name if "{name}" in request else "",
        "place": at + 1 + (kind == "insert_at") if "{other}" in request else 0,
        "request": request.format(name=name, other=line[at]),
    }
    answer = rng.choice(right_lines(row))
    return Problem(" ".join(sorted(line)), row | {"answer": answer}, f"Line: {answer}")


DRAW: dict[str, Callable[[random.Random], Problem]] = {
    "humaneval": stub,
    "mbpp": sentence,
    "gsm8k": word_problem,
    "truthfulqa": question,
    "lines": waiting_line,
    "arc_easy": sum_choice,
    "arc_challenge": word_choice,
}


# ---------------------------------------------------------------- files


def test_problems(task: str, seed: int = 0, n: int = N_TEST) -> list[Problem]:
    """The first n different problems of the test split.

    They differ in the key; those of multiple choice, whose keys are few, in the question. The kinds
    of waiting lines take turns.
    """
    seen: dict[str, Problem] = {}
    streams = [problems(task, "test", seed)]
    if task == "lines":
        streams = [
            problems(task, "test", f"{seed} {kind}", partial(waiting_line, kind=kind))
            for kind in REQUESTS
        ]
    for stream in cycle(streams):
        if len(seen) == n:
            break
        for problem in stream:
            told = problem.row["question"] if task in KEYS else problem.key
            if told not in seen:
                seen[told] = problem
                break
    return list(seen.values())


def benchmark_files(seed: int = 0, n: int = N_TEST) -> dict[str, bytes]:
    """Paths below the benchmark directory and the contents of the files.

    The bytes depend on the seed and the number of test problems alone.
    """

    def lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    sizes = {task: N_TEST if task in KEYS else n for task in TASKS}
    rows = {task: [p.row for p in test_problems(task, seed, sizes[task])] for task in TASKS}
    train = {
        task: [p.row for p in islice(problems(task, "train", seed), N_TRAIN)]
        for task in ("gsm8k", "mbpp")
    }
    mbpp = [
        row | {"task_id": i} for i, row in enumerate(train["mbpp"][:10] + rows["mbpp"], start=1)
    ]
    mbpp += [
        row | {"task_id": i} for i, row in enumerate(train["mbpp"][10:], start=601) if i <= 974
    ]
    stubs = [row | {"task_id": f"HumanEval/{i}"} for i, row in enumerate(rows["humaneval"])]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows["truthfulqa"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows["truthfulqa"])
    choices = {
        f"{task}.jsonl": [row | {"id": f"mini-{i}"} for i, row in enumerate(rows[task])]
        for task in KEYS
    }
    counts = {
        "HumanEval.jsonl.gz": n,
        "mbpp.jsonl": len(mbpp),
        "gsm8k/train.jsonl": N_TRAIN,
        "gsm8k/test.jsonl": n,
        "TruthfulQA.csv": n,
        "lines.jsonl": n,
        **dict.fromkeys(choices, N_TEST),
    }
    manifest = {"name": "dllmexp-mini" + (f"-{n}" if n != N_TEST else ""), "counts": counts}
    return {
        "HumanEval.jsonl.gz": gzip.compress(lines(stubs), mtime=0),
        "mbpp.jsonl": lines(mbpp),
        "gsm8k/train.jsonl": lines(train["gsm8k"]),
        "gsm8k/test.jsonl": lines(rows["gsm8k"]),
        "TruthfulQA.csv": table.getvalue().encode(),
        "lines.jsonl": lines(rows["lines"]),
        **{name: lines(chosen) for name, chosen in choices.items()},
        "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "assets" / "benchmarks", help="directory to write")
    add(
        "--n",
        type=int,
        default=N_TEST,
        help=f"problems in each test set but those of multiple choice, 1 to {MOST} (default: "
        "%(default)s). More of them make smaller differences significant; the first ones stay",
    )
    arguments = parser.parse_args(argv)
    out, n = arguments.out, arguments.n
    if not 1 <= n <= MOST:
        parser.error(f"--n {n}: must be 1 to {MOST}")
    if n != N_TEST and out.resolve() == parser.get_default("out").resolve():
        parser.error(
            f"--n {n} would overwrite the project's own set; name another directory with --out DIR"
        )
    for name, content in benchmark_files(n=n).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"{path}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
