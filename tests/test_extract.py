"""How answers are read: the program in an answer, names that tests ask for, short answers."""

import json
import threading
import time
from pathlib import Path

import pytest

from sandbox import judge_many
from sandbox.names import without_warnings
from tasks import humaneval, mbpp
from tasks.data import load_data
from tasks.evalplus import MAX_LINES, evalplus, verbatim
from tasks.programs import called_names
from utils import (
    extract_code,
    gsm8k_number,
    humaneval_program,
    mbpp_program,
    truthfulqa_answer,
)

QUADRATIC_S = 20  # linear readers take under 2 s of processor time here, quadratic ones minutes

FENCE = "```"
GOOD = "def f(xs):\n    return sum(xs)\n"
EARLY = "def f(xs):\n    if not xs:\n        return 0\n"
BAD = "def f(xs):\n    return len(xs)\n"
PROMPT = (
    "from typing import List\n\n\ndef helper(x):\n    return 2 * x\n\n\n"
    'def f(xs: List[int]) -> int:\n    """The sum.\n    >>> f([1, 2])\n    3\n    """\n'
)


def fenced(code: str, tag: str = "python") -> str:
    return f"{FENCE}{tag}\n{code}{FENCE}\n"


def value(code: str, expression: str = "f([1, 2])"):
    namespace: dict = {}
    exec(code, namespace)
    return eval(expression, namespace)


ANSWERS = {
    "bare": (GOOD, "text"),
    "fence": (fenced(GOOD), "fence"),
    "fence in prose": (f"Sure! Here it is:\n\n{fenced(GOOD)}\nIt adds them up.", "fence"),
    "fence without a tag": (fenced(GOOD, ""), "fence"),
    "open fence": (f"Sure:\n{FENCE}python\n{GOOD}", "fence"),
    "open fence, then prose": (
        f"Sure:\n{FENCE}python\n{GOOD}\nThis function adds them up.\nThat is all.",
        "fence",
    ),
    "writes a file, then uses it": (
        "import shutil\nopen('a', 'w').write('x')\nshutil.copy2('a', 'b')\n" + GOOD,
        "text",
    ),
    "fence on one line": (f"{FENCE}def f(xs): return sum(xs){FENCE}", "fence"),
    "indented fence": (
        f"1. So:\n\n   {FENCE}python\n   def f(xs):\n       return sum(xs)\n   {FENCE}\n",
        "fence",
    ),
    "windows line ends": (fenced(GOOD).replace("\n", "\r\n"), "fence"),
    "prose, no fence": (f"Here is the code\n\n{GOOD}\nNote: it works\nDone", "text"),
    "prompt in a docstring": (
        GOOD.replace("\n", '\n    """\n    >>> f([1])\n    """\n', 1),
        "text",
    ),
    "fence in a docstring": (
        fenced(
            GOOD.replace("\n", f'\n    """\n    {FENCE}\n    f([1])\n    {FENCE}\n    """\n', 1)
        ),
        "text",
    ),
    "whole file": (PROMPT + "    return sum(xs)\n", "text"),
    "whole file in a fence": (fenced(PROMPT + "    return sum(xs)\n"), "fence"),
    "stub first": (fenced(PROMPT) + "and now\n" + fenced(GOOD), "fence"),
    "restated below the stub": (PROMPT + "\n\n" + GOOD, "text"),
    "helper in another fence": (
        fenced("def add(xs):\n    return sum(xs)\n") + fenced("def f(xs):\n    return add(xs)\n"),
        "fence",
    ),
    "helper below": (
        fenced("def f(xs):\n    return add(xs)\n\ndef add(xs):\n    return sum(xs)\n"),
        "fence",
    ),
    "helper of the prompt": (fenced("def f(xs):\n    return helper(sum(xs)) // 2\n"), "fence"),
    "imports above the function": (
        fenced("import math\n\n" + GOOD.replace("sum", "math.fsum")),
        "fence",
    ),
    "imports in the prose": (
        f"import math\n\nand then\n\n{GOOD.replace('sum', 'math.fsum')}",
        "text",
    ),
    "future import": (
        fenced("from __future__ import annotations\n" + GOOD.replace("xs)", "xs: Later)", 1)),
        "fence",
    ),
    "example calls": (
        fenced(GOOD + "\nprint(f(input()))\nassert f([1]) == 7\nx = f(None)\n"),
        "fence",
    ),
    "doctest main": (fenced(GOOD + "\nif __name__ == '__main__':\n    import nothing\n"), "fence"),
    "main function": (fenced(GOOD + "\ndef main():\n    f(None)\n\nmain()\n"), "fence"),
    "constants": (fenced("K = 1\n" + GOOD.replace("sum(xs)", "K * sum(xs)")), "fence"),
    "table filled at import": (
        fenced(
            "t = []\nfor i in range(9):\n    t.append(i)\n" + GOOD.replace("sum(xs)", "t[sum(xs)]")
        ),
        "fence",
    ),
    "global made by a function": (
        fenced(
            "def init():\n    global k\n    k = 1\ninit()\n"
            + GOOD.replace("sum(xs)", "k * sum(xs)")
        ),
        "fence",
    ),
    "module set up": (fenced("import sys\nsys.setrecursionlimit(1000)\n" + GOOD), "fence"),
    "name looked up": (
        fenced("def g(xs):\n    return sum(xs)\ndef f(xs):\n    return globals()['g'](xs)\n"),
        "fence",
    ),
    "decorator": (fenced("def d(g):\n    return g\n@d\n" + GOOD), "fence"),
    "wrapped afterwards": (fenced(GOOD + "f = (lambda g: g)(f)\n"), "fence"),
    "lambda": ("f = lambda xs: sum(xs)", "text"),
    "body": ("    t = 0\n    for x in xs:\n        t += x\n    return t\n", "body"),
    "body, then prose": ("    return sum(xs)\n\nThis adds them up.", "body"),
    "body, then another function": ("    return sum(xs)\n\n\ndef g():\n    return 1\n", "body"),
    "body without its first indentation": (
        "t = 0\n    for x in xs:\n        t += x\n    return t",
        "body",
    ),
    "body without indentation": ("t = 0\nfor x in xs:\n    t += x\nreturn t", "body"),
    "body with tabs": ("\tt = sum(xs)\n\treturn t", "body"),
    "body in a fence": ("So:\n" + fenced("return sum(xs)\n"), "body"),
    "end token": (f"{fenced(GOOD)}<|im_end|>\n<|endoftext|>", "fence"),
    "end token inside": (GOOD.rstrip() + "<|eot_id|><|dlm_pad|> def f(", "text"),
    "opencompass": ("[BEGIN]\n '" + GOOD + "' \n[DONE] \n\n def f(xs): return 0", "text"),
    "opencompass without [BEGIN], cut at [DONE]": ("'" + GOOD + "' \n", "text"),
    "ends in a backslash": (fenced("K = 1\\\n\n" + GOOD + "\nprint(f)\n"), "fence"),
    "body with a local variable of its name": (
        "    f = xs[0]\n    for x in xs[1:]:\n        f += x\n    return f\n",
        "body",
    ),
    "fenced body with a local variable of its name": (
        "So:\n" + fenced("    f = xs[0]\n    for x in xs[1:]:\n        f += x\n    return f\n"),
        "body",
    ),
    "body with a local function of its name": (
        "    def f(t, xs):\n        return f(t + xs[0], xs[1:]) if xs else t\n"
        "    return f(0, xs)\n",
        "body",
    ),
    "a constant of its name, then the body": (
        "f = 0\n    for x in xs:\n        f += x\n    return f",
        "body",
    ),
    "several definitions": (f"{fenced(BAD)}No, in full:\n{fenced(GOOD)}", "fence"),
    "corrected version": (f"{BAD}\nCorrected version:\n\n{GOOD}", "text"),
    "the last definition is cut": (
        f"{fenced(GOOD)}In full:\n{FENCE}python\ndef f(xs):\n    t = 0\n    for x in",
        "fence",
    ),
    "a cut definition below": (f"{GOOD}\n\ndef f(xs):\n    t = 0\n    for x in", "text"),
    "a stub below": (GOOD + "\n\ndef f(xs):\n    pass\n", "text"),
    "draft in a thought": (f"<think>\n{fenced(BAD)}</think>\n{GOOD}", "text"),
    "draft in a thought that the prompt began": (f"So\n{fenced(BAD)}</think>\n\n{GOOD}", "text"),
    "fence glued to the code": (GOOD.rstrip() + FENCE, "text"),
    "fence glued to the code, then prose": (GOOD.rstrip() + f"{FENCE}\nIt adds them up.", "text"),
    "fence glued to a body": ("    t = sum(xs)\n    return t" + FENCE, "body"),
    "fence glued to a body that may return early": (
        "    if not xs:\n        return 0\n    t = sum(xs)\n    return t" + FENCE,
        "body",
    ),
    "fence glued to a function that may return early, then prose": (
        f"def f(xs):\n    if not xs:\n        return 0\n    return sum(xs){FENCE}\nThat is all.",
        "text",
    ),
    "a body, then a fence with an example": (
        f"    if xs:\n        return sum(xs)\n    return 0\n{FENCE}\nprint(f(input()))\n",
        "body",
    ),
    "end token in a string": (
        GOOD.replace("    r", "    t = 'a <|endoftext|> b'.split(\"<|im_end|>\")\n    r"),
        "text",
    ),
    "end token behind an apostrophe": (GOOD + "It's done.<|im_end|>I'm 'f' <|im_end|>", "text"),
    "end of a thought in a comment": (
        GOOD.replace("    r", "    # strip up to </think> here\n    r"),
        "text",
    ),
    "end of a thought in a comment of a body": (
        "    t = sum(xs)  # up to </think> here\n    return t\n",
        "body",
    ),
    "end of a thought in a string": (
        fenced(GOOD.replace("    r", "    t = 'a </think> b'\n    r")),
        "fence",
    ),
    "end of a thought in a docstring": (
        GOOD.replace("    r", '    """The text\n    up to </think> is left out.\n    """\n    r'),
        "text",
    ),
    "thought that the prompt began, ended by a sentence": (
        f"It's simple:\n\n{fenced(BAD)}So that's it. </think>\n\n{GOOD}",
        "text",
    ),
    "indented without a fence": (
        "Here it is:\n\n    import math\n\n    def f(xs):\n"
        "        return int(math.fsum(xs))\n\nDone.",
        "text",
    ),
    "quotation": ("Here it is:\n> " + GOOD.replace("\n    ", "\n>     "), "text"),
    "fence in a quotation": (
        "Here it is:\n" + "".join(f"> {line}\n" for line in fenced(GOOD).split("\n")),
        "fence",
    ),
    "interactive session": (
        fenced(f">>> {GOOD.replace(chr(10) + ' ', chr(10) + '...  ')}...\n>>> f([1])\n1\n"),
        "fence",
    ),
    "ends itself": (fenced("import sys\n" + GOOD + "\nprint(f([1]))\nsys.exit(0)\n"), "fence"),
    "ends itself otherwise": (
        fenced("import os\n" + GOOD + "\nif True:\n    os._exit(0)\n"),
        "fence",
    ),
    "raises SystemExit": (fenced(GOOD + "\nraise SystemExit\n"), "fence"),
    "raises SystemExit of a module": (
        fenced("import builtins\n" + GOOD + "\nraise builtins.SystemExit(0)\n"),
        "fence",
    ),
    "ends itself by an imported name": (
        fenced("from os import _exit\n" + GOOD + "\n_exit(0)\n"),
        "fence",
    ),
    "ends itself by every name of a module": (
        fenced("from os import *\n" + GOOD + "\n_exit(0)\n"),
        "fence",
    ),
    "ends itself by another name of the module": (
        fenced("import sys as s\n" + GOOD + "\nif True:\n    s.exit(0)\n"),
        "fence",
    ),
    "ends itself on one line": (
        fenced("import os\n" + GOOD + "\nfrom os import _exit as e; e(0)\n"),
        "fence",
    ),
    "marks inside the program": (
        GOOD.replace(
            "    r", "    # [BEGIN]\n    a = '[DONE]'\n    b = \"[BEGIN] 'x'\"  # [DONE]\n    r"
        ),
        "text",
    ),
    "opencompass, closing quote missing": ("[BEGIN]\n '" + GOOD + " \n[DONE]", "text"),
    "opencompass, opening quote missing": ("[BEGIN]\n " + GOOD.rstrip() + "' \n[DONE]", "text"),
    "opencompass, closing quote missing behind a string": (
        f"[BEGIN]\n '{EARLY}    return sum(xs) if xs else 'none'\n[DONE]",
        "text",
    ),
    "opencompass, closing quote behind a string": (
        f"[BEGIN]\n '{EARLY}    return sum(xs) if xs else 'none''\n[DONE]",
        "text",
    ),
    "opencompass, both quotes, an apostrophe in a string": (
        f"[BEGIN]\n '{EARLY}    return sum(xs) if xs else \"it's\"'\n[DONE]",
        "text",
    ),
    "opencompass, opening quote missing, an apostrophe in a string": (
        f"[BEGIN]\n {EARLY}    return sum(xs) if xs else \"it's\"'\n[DONE]",
        "text",
    ),
    "opencompass without brackets": ("BEGIN\n '" + GOOD + "' \nDONE", "text"),
    "opencompass, half a bracket": ("[BEGIN]\n '" + GOOD + "' \nDONE]", "text"),
    "opencompass, cut": ("[BEGIN]\n '" + GOOD, "text"),
    "escaped underscores": (fenced("def f(my\\_list):\n    return sum(my\\_list)\n"), "fence"),
    "escaped underscores in one of two functions": (
        fenced(
            "def g(xs):\n    if not xs:\n        return 0\n"
            "    my\\_sum = sum(xs)\n    return my\\_sum\n"
            "def f(xs):\n    return g(xs)\n"
        ),
        "fence",
    ),
    "escaped underscores below a clean part": (
        "Here:\n\ndef f(xs):\n    t = 0\n"
        "    my\\_sum = sum(xs)\n    return t + my\\_sum\n\nIt adds.",
        "text",
    ),
    "escaped underscores in a body": (
        "    if not xs:\n        return 0\n    my\\_sum = sum(xs)\n    return my\\_sum\n",
        "body",
    ),
    "escaped underscores above a comment at the margin": (
        fenced("def f(xs):\n    my\\_sum = sum(xs)\n# my\\_sum\n    return my\\_sum\n"),
        "fence",
    ),
    "escaped underscores around a text at the margin": (
        fenced("def f(xs):\n    my\\_text = '''\na text\n'''\n    return sum(xs)\n"),
        "fence",
    ),
    "escaped underscores of a decorator": (
        fenced("def my\\_d(g):\n    return lambda xs: g(xs) + 1\n@my\\_d\n" + BAD),
        "fence",
    ),
    "a backslash in a string beside escaped underscores": (
        fenced(
            "def g(xs):\n    my\\_xs = xs\n    return my\\_xs\n"
            "def f(xs):\n    return sum(g(xs)) if r'\\_' != '_' else 0\n"
        ),
        "fence",
    ),
    "two statements on a line": (
        fenced("a = 1; b = 2\n" + GOOD.replace("sum(xs)", "sum(xs) * a")),
        "fence",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_program_is_found_and_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, how = ANSWERS[name]
    found = extract_code(text, "f", PROMPT)
    assert found.how == how
    assert value(found.code) == 3


@pytest.mark.parametrize(
    "name", [n for n, (_, how) in ANSWERS.items() if how != "body" and "prompt" not in n]
)
def test_it_is_found_without_a_prompt_too(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert value(extract_code(ANSWERS[name][0], "f").code) == 3


@pytest.mark.parametrize(
    "text, why",
    [
        (GOOD, ""),
        (fenced(GOOD), ""),
        ("    return sum(xs)\n", ""),
        (GOOD + "<|im_end|>junk", "end token <|im_end|>"),
        (f"Sure!\n{fenced(GOOD)}", "text outside the program"),
        (f"{fenced(GOOD)}Bye.<|endoftext|>", "end token <|endoftext|>; text outside the program"),
        (fenced(GOOD.replace("xs", "my\\_xs")), ""),
        ("", "empty answer"),
        ("<|im_end|>" + GOOD, "end token <|im_end|>; empty answer"),
    ],
)
def test_why_cut_says_what_was_left_out(text, why):
    assert extract_code(text, "f", PROMPT).why_cut == why


def test_a_program_without_anything_to_drop_comes_back_as_it_is():
    code = "# adds\nimport math  # unused\n\n\ndef f(xs):\n\n    # a comment\n    return sum(xs)\n"
    assert extract_code(fenced(code), "f").code == code


@pytest.mark.parametrize(
    "text", ["I cannot help.", "def f(xs:\n", fenced("x ="), "def f(xs):\n    return " + "(" * 3000]
)
def test_no_program_gives_the_raw_text(text):
    found = extract_code(text, "f", PROMPT)
    assert found.how == "none" and found.code.strip() in text


@pytest.mark.parametrize(
    "prefill, answer",
    [
        (f"Here:\n{FENCE}python\n{PROMPT}\n", "    return sum(xs)\n" + FENCE),
        (f"Here:\n{FENCE}python\n{PROMPT}\n", "    return sum(xs)\n"),
        (f"Here:\n{FENCE}python\n{PROMPT}\n", GOOD),
        (f"Here:\n{FENCE}python\n{PROMPT}\n", "Sure!\n" + fenced(GOOD)),
        (f"Here:\n{FENCE}python\n", GOOD + FENCE),
        (f"Here:\n{FENCE}python\n", GOOD),
        (f"Here:\n{FENCE}python\n", fenced(GOOD)),
    ],
)
def test_an_answer_that_was_begun_for_the_model(prefill, answer):
    """The fence is open before the answer starts; the prefill is no text outside the program."""
    found = extract_code(answer, "f", PROMPT, prefill=prefill)
    assert value(found.code) == 3 and "Here" not in found.why_cut


def test_a_stub_that_imports_is_still_a_stub():
    """HumanEval/115 imports math in the function above the docstring."""
    prompt = 'def f(xs):\n    import math\n    """The sum."""\n'
    assert (
        value(
            extract_code(
                "Sure!\n" + fenced(GOOD), "f", prompt, prefill=f"{FENCE}python\n{prompt}\n"
            ).code
        )
        == 3
    )


def test_names_that_the_tests_use_are_kept():
    code = "class Node:\n    pass\n\ndef unused():\n    pass\n\n" + GOOD
    assert "Node" in extract_code(code, "f", roots=["Node"]).code
    assert "unused" not in extract_code(code, "f", roots=["Node"]).code


@pytest.mark.parametrize(
    "text", ["x = (\n" * 400, "if x:\n" * 400, "'''\n" * 401, "for the sake of it\n" * 400]
)
def test_degenerate_text_is_given_up_quickly(text):
    start = time.process_time()
    assert extract_code(text, "f", PROMPT).how == "none"
    assert time.process_time() - start < 5


N = 5_000_000
LONG = {
    "spaces": "a" + " " * N,
    "digits": "1" * N,
    "functions": GOOD * (N // len(GOOD)),
    "assignments": "a = " * (N // 4) + "1",
    "chained": "\n".join(f"a{i} = a{i - 1}" for i in range(1, N // 18)) + "\n" + GOOD,
    "brackets": "x = (\n" * (N // 6),
    "strings": "x = '''\n" * (N // 8 + 1),
    "fences": FENCE * (N // 3),
    "blocks": fenced(GOOD) * (N // len(fenced(GOOD))),
    "quotations": "> x\n" * (N // 4),
    "sessions": ">>> x\n" * (N // 6),
    "prose": "for the sake of it\n" * (N // 19),
    "escapes": "x\\_ = '\\_\n" * (N // 9),
    "escaped functions": GOOD.replace("xs", "my\\_xs") * (N // 50),
    "escaped decorators": "@d\\_\n" * (N // 5),
    "escaped quotes": '\\"' * (N // 2),
    "ends of thoughts": " </think>" * (N // 9),
    "quoted end tokens": "'<|im_end|>'" * (N // 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_an_answer_of_five_megabytes_takes_linear_time(name):
    start = time.process_time()
    extract_code(LONG[name], "f", PROMPT)
    assert time.process_time() - start < QUADRATIC_S


def test_chained_assignments_are_followed_in_linear_time():
    chain = "a0 = 0\n" + "".join(f"a{i} = a{i - 1}\n" for i in range(1, 4000))
    start = time.process_time()
    code = extract_code(chain + GOOD.replace("sum(xs)", "sum(xs) + a3999"), "f").code
    assert value(code) == 3 and time.process_time() - start < 5


@pytest.mark.parametrize(
    "text", ["f = 3\n", "f = [1]\n", "def f(xs):\n    pass\n", "<think>\n" + GOOD, f"> {BAD[:9]}"]
)
def test_what_is_no_definition(text):
    assert extract_code(text, "f").how == "none"


@pytest.mark.parametrize(
    "tests, names",
    [
        ("assert f(1) == 2", ["f"]),
        ("assert set(f(a)) == set((1, 2))\nassert g(1)", ["f", "g", "a"]),
        ("import math\nroot = Node(1)\nassert math.isclose(f(root), 1)", ["Node", "f"]),
        ("assert sum(10, 15) == 6", ["sum"]),  # MBPP/126 asks for a function of this name
        ("assert len(f(1)) == 6", ["f"]),
        ("def check(candidate):\n    assert candidate(1) == other(1)\ncheck(f)", ["other", "f"]),
        # its own names, wherever they are bound, are not asked for; the same name elsewhere is
        ("async def check():\n    assert f(1)\nasyncio.run(check())", ["f", "asyncio"]),
        ("try:\n    f(1)\nexcept ValueError as e:\n    assert str(e)", ["f"]),
        ("assert all(f(x) for x in [1, 2])\nassert x == f(2)", ["f", "x"]),
    ],
)
def test_names_asked_for_by_tests(tests, names):
    assert called_names(tests) == names


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Nothing happens.", "Nothing happens."),
        ("A: Nothing happens.", "Nothing happens."),
        ("\n\nA: Nothing happens.\n\nQ: Next?", "Nothing happens."),
        ("Nothing happens.\nQ: Next?\nA: No.", "Nothing happens."),
        ("Two\nlines.", "Two\nlines."),
        ("A good question!\n\nNothing happens.", "A good question!\n\nNothing happens."),
        ("<think>\nIs it?\n</think>\nNothing happens.", "Nothing happens."),
        ("Yes.<|im_end|><|endoftext|>", "Yes."),
        ("A: A: twice", "A: twice"),
        ("", ""),
    ],
)
def test_short_answers_are_cleaned(text, answer):
    assert truthfulqa_answer(text) == answer


def test_each_code_benchmark_knows_its_entry_point_and_what_its_tests_need():
    answer = fenced("class Node:\n    pass\n\ndef unused():\n    pass\n\n" + GOOD)
    doc = {"prompt": "def f(xs):\n", "entry_point": "f", "test_list": ["assert f(Node()) == 1"]}
    for found in (
        humaneval_program(answer, doc, tests="check(f, Node)"),
        mbpp_program(answer, doc, tests="assert f(Node()) == 1"),
    ):
        assert "class Node" in found.code and "def f" in found.code and "unused" not in found.code
    prefill = f"Here:\n{FENCE}python\ndef f(xs):\n"
    assert (
        value(humaneval_program("    return sum(xs)\n", doc, tests="", prefill=prefill).code) == 3
    )
    assert value(mbpp_program("    return sum(xs)\n", doc, tests="", prefill=prefill).code) == 3


@pytest.mark.parametrize(
    "helper",
    [
        "async def g(xs):\n    return sum(xs)",
        "if (g := sum):\n    pass",
        "[g := sum for _ in [1]]",
        "match sum:\n    case g:\n        pass",
        "class A:\n    g = sum\ng = A.g",
    ],
)
def test_a_helper_is_kept_however_it_is_bound(helper):
    code = f"def unused():\n    pass\n{helper}\ndef f(xs):\n    return g(xs)\n"
    found = extract_code(fenced(code), "f").code
    assert helper in found and "unused" not in found


def test_a_variable_of_a_comprehension_needs_no_statement_of_its_name():
    """Python 3.12 and newer list it among the names of the module."""
    code = "x = print\nt = [x for x in (1, 2)]\ndef f(xs):\n    return sum(t)\n"
    assert "print" not in extract_code(fenced(code), "f").code


def test_a_stub_that_raises_not_implemented_is_no_answer():
    stub = "```python\ndef f(x):\n    raise NotImplementedError\n```\nHere it is:\n"
    assert (
        "return x + 1"
        in extract_code(stub + "```python\ndef f(x):\n    return x + 1\n```", "f").code
    )


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 75.00", "75"),
        ("$75.00", "75"),
        ("So $\\boxed{83}$.", "83"),
        ("$$\\boxed{80}$$ in 3 days", "80"),
        ("7{,}425", "7425"),
        ("\\boxed{\\$1{,}234.50 \\text{ in all}}", "1234.5"),
        ("Question: How much?\n\nAnswer: 9*2 = 18.", "18"),
        ("#### 18\nQuestion: And then?\n#### 30", "18"),
        ("**Answer:** 18", "18"),
        ("**Answer:** $18\n\nJanet sells 9 eggs at 2 dollars.", "18"),
        ("Answer: 18.\n1. She keeps 9 eggs.\n2. 9 * 2 = 18, in 3 days.", "18"),
        ("Answer:\n1. 9 * 2 = 18.\n2. 18 + 2 = 20", "20"),
        ("\\boxed{9 \\times 2 = 18}", "18"),
        ("The final answer is:\n\n18 eggs in 3 days", "18"),
        ("The answer is 5 + 3 = 8. Of these, 2 are blue.", "8"),
        ("Answer: Eve has 3. So 4 + 5 = 9.", "9"),
        ("#### 1. Add them\n2 + 2 = 4", "4"),
        ("So she pays **$75** for 15 packs.", "75"),
        ("<think>\n#### 7\n</think>\nIt is 8.", "8"),
        ("**1. Eggs:** 16 - 7 = 9\n**2. Money:** 9 * 2 = 18", "18"),
        ("- **2.** She makes 9 * 2 = 18 dollars.", "18"),
        ("It is\n**8.**", "8"),
        ("So the total is:\n**5 dollars**", "5"),
        ("**Answer:** In 3 days Janet makes **$54**.", "54"),
        ("The answer is that in 3 days she makes **$54**.", "54"),
        ("**Answer:** 9 * **2** = 18", "18"),
        ("#### **18** eggs in 3 days", "18"),
        ("#### 16 - 3 - 4 = 9 eggs", "9"),
        ("#### 18 eggs, 9 * 2 = 18 of 20", "18"),
        ("#### 9 \\times 2 = \\$18", "18"),
        ("Final Answer: Tom needs 5 buses for 200 students.\n\n---", "5"),
        ("Answer: 18 dollars\n\n**Explanation:** 9 eggs are sold at $2 each.", "18"),
        ("Answer:\nSolution: 9 eggs.\nSo 9 * 2 = 18", "18"),
        ("Answer: Mrs. Lim earns $120 in 2 days.", "120"),
        ("The area is 144 m^2.", "144"),
        ("The volume is 60 \\text{cm}^{3}.", "60"),
        ("It is at 90^\\circ.", "90"),
        ("She makes $18 (9 eggs * $2).", "18"),
        ("She makes \\( 18 \\) dollars (9 * 2).", "18"),
        ("It is (9 * 2 = 18).", "18"),
        ("It is 60 minutes (1 hour).", "1"),
        ("(9 * 2)", "2"),
        ("10-3", "3"),
        ("It is -$5.", "-5"),
        ("0.50", "0.5"),
        ("1,2,3", "3"),
        ("The cost is 64 dollars for 16 glasses.", "64"),
        ("The total is 160 minutes, i.e. 2 hours 40 minutes.", "160"),
        ("He needs 5 of 8.\nSo his total cost was $1,064.50 for 16 glasses! Good.", "1064.5"),
        ("The answer is 2 hours 40 minutes, i.e. 160 minutes.", "2"),
        ("The total is 12 for the first and 15 for the second, which gives 27.", "27"),
        ("The sum is 5 + 3 = 8.", "8"),
        ("The price is 4 dollars each for 16.", "16"),
        ("The total is 20 dollars. Then 5 are left.", "5"),
        ("The answer is not 12 but 366.", "366"),
        ("It is not 12.5 eggs, but 366.", "366"),
        ("It is 366, NOT 12.", "366"),
        ("It is not 12.", "12"),
        ("None", None),
    ],
)
def test_a_number_is_read_as_a_careful_reader_does(text, number):
    assert gsm8k_number(text) == number


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["1", "1 ", "1,", "-", "####", "answer ", "Q:\n", "\\boxed{", "{}", "answer: 1.", " "]
    + ["(", "(1*1)", "(1*", "^{", "**", "**1", "\n**1. ", "####1+1", "answer:\n#", "\n* "]
    + ["not ", "not 1", "total is ", "total is 1", "'", '\\"', " </think>", "# ", "'<|im_end|>'"],
)
def test_the_number_of_a_megabyte_is_read_in_linear_time(piece):
    start = time.process_time()
    gsm8k_number("answer is \\boxed{" + piece * (N // 5 // len(piece)))
    assert time.process_time() - start < QUADRATIC_S


# ---- EvalPlus' rule, with which Dream's and DiffuCoder's HumanEval is published

STUB = 'def f(xs):\n    """The sum."""\n'
KEPT = "def f(xs):\n    return sum(xs)"
DOCSTRING = 'def f(xs):\n    """The sum."""\n    return sum(xs)'
SAID_BY_EVALPLUS = {
    "body": ("    return sum(xs)\n", DOCSTRING),
    "body, closed fence, prose": (f"    return sum(xs)\n{FENCE}\nIt adds them up.", DOCSTRING),
    "whole function": (GOOD, KEPT),
    "fence": (fenced(GOOD), KEPT),
    "fence in prose": (f"Sure! Here it is:\n\n{fenced(GOOD)}\nIt adds them up.", KEPT),
    "open fence": (f"So:\n{FENCE}python\n{GOOD}", KEPT),
    "fence without a tag": (fenced(GOOD, ""), ""),  # what stands before it is read
    "two fences": (fenced(GOOD) + "or\n" + fenced(BAD), KEPT),
    "prose before, no longer than the prompt": (f"Here is the code\n\n{GOOD}", ""),
    "prose before": (f"Here is the code\n\nimport os\n{GOOD}", "import os\n" + KEPT),
    "prose after": (f"{GOOD}\nIt's done.", KEPT),
    "no definition": ("I cannot help.", ""),
    "empty": ("", ""),
    "no program at all": (f"{FENCE}python\n{FENCE}", ""),
    "helper": ("def g(x):\n    return x\n" + GOOD.replace("xs)\n", "g(xs))\n"), None),
    "helper that is reached by a helper": (
        "K = 1\ndef g(x):\n    return x * K\ndef f(xs):\n    return g(sum(xs))\n",
        "K = 1\ndef g(x):\n    return x * K\ndef f(xs):\n    return g(sum(xs))",
    ),
    "helper that nothing reaches": ("def g(x):\n    return x\nK = 1\n" + GOOD, KEPT),
    "helper without a return": (
        "def g(xs):\n    xs.sort()\ndef f(xs):\n    g(xs)\n    return xs\n",
        "def f(xs):\n    g(xs)\n    return xs",
    ),
    "entry point without a return": ("def f(xs):\n    print(sum(xs))\n", ""),
    "class and its methods": (
        "class A:\n    def m(self):\n        pass\n\ndef f(xs):\n    return A().m()\n",
        # of A().m it is m that the rule looks at
        "def f(xs):\n    return A().m()",
    ),
    "class that is named alone": (
        "class A:\n    def m(self):\n        pass\n\ndef f(xs):\n    a = A()\n    return a.m()\n",
        "class A:\n\n    def m(self):\n        pass\ndef f(xs):\n    a = A()\n    return a.m()",
    ),
    "attribute of the name of a definition": (
        "b = 1\ndef f(xs):\n    return xs.b\n",
        "b = 1\ndef f(xs):\n    return xs.b",
    ),
    "imports come first": (
        "import os\n" + GOOD + "from math import fsum\nprint(os)\n",
        "import os\nfrom math import fsum\n" + KEPT,
    ),
    "import in a try": ("try:\n    import os\nexcept ImportError:\n    pass\n" + GOOD, KEPT),
    "main": (GOOD + '\nif __name__ == "__main__":\n    print(f([1]))\n', KEPT),
    "examples": (GOOD + "assert f([1]) == 1\nf([2])\n", KEPT),
    "the last line is broken": (GOOD + "\nprint(f([1, 2\n", KEPT),
    "the function is cut": (GOOD + "\ndef f(xs):\n    t = (0,", KEPT),
    "the longer side of a fault": ("def g(:\n" + GOOD + "x = 1\ny = 2\n", KEPT),
    "the first of two sides as long": ("    return sum(xs)\n) )\n" + BAD + "x = 1\n", DOCSTRING),
    "blank lines do not count": (GOOD + "\n\n\n\n)\nx = 1\ny = 2\nz = 3\nw = 4\n", KEPT),
    "nested function": (
        "def f(xs):\n    def g(x):\n        return x\n    g(xs)\n",
        "def f(xs):\n\n    def g(x):\n        return x\n    g(xs)",
    ),
    "function of the name of a nested one": (
        "def g():\n    return 0\ndef f(xs):\n    def g(x):\n        return x\n    return xs\n",
        "def f(xs):\n\n    def g(x):\n        return x\n    return xs",
    ),
    "decorator": (
        "def d(g):\n    return g\n@d\n" + GOOD,
        "def d(g):\n    return g\n@d\n" + KEPT,
    ),
    "asynchronous": ("async " + GOOD, ""),
    "the last definition, in the place of the first": (
        "g = len\n" + BAD + "def g(xs):\n    return 0\ndef f(xs):\n    return g(xs)\n",
        "def g(xs):\n    return 0\ndef f(xs):\n    return g(xs)",
    ),
    "two targets": ("a = b = 1\ndef f(xs):\n    return b\n", "def f(xs):\n    return b"),
    "annotated assignment": ("K: int = 1\ndef f(xs):\n    return K\n", "def f(xs):\n    return K"),
    "comments are lost": ("# adds\ndef f(xs):\n    return sum(xs)  # all\n", KEPT),
    "tabs and windows line ends": ("def f(xs):\r\n\treturn sum(xs)\r\n", KEPT),
    "fence in a docstring": (
        f'    """\n    {FENCE}\n    """\n    return sum(xs)\n',
        "",  # it ends the program
    ),
    "beyond the lines that are read": ("x = 1\n" * (MAX_LINES - 3) + GOOD, ""),
    "the last line that is read": ("x = 1\n" * (MAX_LINES - 5) + GOOD, KEPT),
}


@pytest.mark.parametrize("name", SAID_BY_EVALPLUS)
def test_evalplus_rule(name):
    answer, program = SAID_BY_EVALPLUS[name]
    found = evalplus({"prompt": STUB, "entry_point": "f"}, answer)
    assert found == (answer.strip() if program is None else program)


def test_evalplus_rule_reads_fewer_answers_than_ours(benchmarks):
    """The HumanEval lines of cases.jsonl that pass by it; a careful reader passes all but one."""
    docs = load_data(humaneval.SPEC, benchmarks).splits["test"]
    lines = (Path(__file__).parent / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["task"] == "humaneval"]
    programs = [
        humaneval.program_of(doc := docs[c["doc_id"]], evalplus(doc, c["text"])) for c in cases
    ]
    passed = {c["doc_id"] for c, v in zip(cases, judge_many(programs), strict=True) if v.passed}
    assert len(cases) == 10 and passed == {12, 27, 35, 82}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["body", "whole", "wrapped"])
def test_canonical_solutions_pass_by_evalplus_rule(benchmarks, style):
    """All but HumanEval/50, whose tests use a helper of the prompt."""
    docs, programs = load_data(humaneval.SPEC, benchmarks).splits["test"], []
    for doc in docs:
        answer = doc["canonical_solution"]
        whole = doc["prompt"] + answer
        answer = {"body": answer, "whole": whole, "wrapped": f"Sure:\n{fenced(whole)}Bye."}[style]
        programs.append(humaneval.program_of(doc, evalplus(doc, answer)))
    verdicts = zip(docs, judge_many(programs), strict=True)
    assert [doc["task_id"] for doc, v in verdicts if not v.passed] == ["HumanEval/50"]


LONG_FOR_EVALPLUS = LONG | {
    "few spaces": " " * 40_000,
    "lines": "x = 1\n" * 5_000,
    "open lists": ("[" + "1, " * 300 + "\n") * 100,
    "decorators": "@d\n" * 100,
    "nested": "".join(" " * i + "if x:\n" for i in range(100)),
    "sum": "x = 1" + " + 1" * 30_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_FOR_EVALPLUS)
def test_evalplus_rule_takes_linear_time(name):
    """The authors' search parses each of the runs of 100 lines, whatever their length."""
    start = time.process_time()
    evalplus({"prompt": STUB, "entry_point": "f"}, LONG_FOR_EVALPLUS[name])
    assert time.process_time() - start < QUADRATIC_S


def test_evalplus_rule_shares_the_filters_of_warnings():
    """Threads that catch warnings at the same time leave each other's filters behind."""
    reader = threading.Thread(target=evalplus, args=({"prompt": STUB, "entry_point": "f"}, GOOD))
    with without_warnings():
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()  # it waits for its turn
    reader.join()


def test_verbatim_is_the_answer_up_to_a_fence(benchmarks):
    for code in (doc["code"] for doc in load_data(mbpp.SPEC, benchmarks).splits["test"]):
        assert verbatim({}, code) == verbatim({}, f"{code}{FENCE}\nIt adds up.") == code
