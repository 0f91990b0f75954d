"""Which names a source binds and which it reads: Python's scoping rules, under every version."""

import ast
import dis
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox import Program
from sandbox.names import defined_names, free_names, names_of
from tasks.programs import find_program

# source, names it binds in its namespace, names it reads there or among the builtins
CASES = [
    ("async def f():\n    await g()", "f", "g"),
    ("async def f():\n    async for i in z:\n        async with w as v: v", "f", "z w"),
    ("try: a\nexcept E as e: e", "e", "a E e"),
    ("def f():\n    try: a\n    except E as e: e\ne", "f", "a E e"),
    ("(a := b)", "a", "b"),
    ("[y := x for x in xs]\nx", "y", "xs x"),
    ("def f():\n    return [y := 1 for x in xs], y\ny", "f", "xs y"),
    ("r = [x for x in x if x > k]", "r", "x k"),
    ("r = {k: v for k, v in d for w in v}", "r", "d"),
    ("class A:\n    r = [x for _ in s]\n    x = 1", "A", "s x"),
    (
        "match p:\n    case [a, *b]: pass\n    case {'k': v, **r}: pass\n"
        "    case C(x=1) as q: pass",
        "a b v r q",
        "p C",
    ),
    ("def f():\n    global g\n    g = 1", "f g", ""),
    ("def f():\n    global g\n    import g\n    def h(): return g", "f g", "g"),
    ("n = 1\ndef f():\n    n = 2\n    def h():\n        nonlocal n\n        n += n", "n f", ""),
    ("def f(a, *b, c=d, **e) -> R:\n    z: T = 1\n    return a, b, c, e, z", "f", "d R T"),
    ("lambda s, t=u: s + t + w", "", "u w"),
    (
        "@deco\nclass A(B, metaclass=M):\n    x = 1\n    def m(self): return x, __class__",
        "A",
        "deco B M x",
    ),
    ("class A:\n    f = f", "A", "f"),  # Python looks for it in the class, then outside
    ("def f():\n    x = y = 1\n    class A:\n        x = x, y\n    return A", "f", "x"),
    ("import a.b, c as d\nfrom e import g as h", "a d h", ""),
    ("from m import *\ng(1)", "", "g"),  # what it binds is not known
    ("x += 1\na.b = c\nd[i] = 2\ndel q", "x q", "x a c d i"),
    ("with o() as (w, [u]): pass\nfor i, j in z: pass", "w u i j", "o z"),
]


@pytest.mark.parametrize(("source", "binds", "reads"), CASES)
def test_names_follow_pythons_scopes(source, binds, reads):
    found = names_of(ast.parse(source))
    assert (found.binds, found.uses) == (set(binds.split()), set(reads.split()))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came with Python 3.12")
@pytest.mark.parametrize(
    ("source", "binds", "reads"),
    [
        ("type X[T] = list[T]", "X", "list"),
        ("type X = Y", "X", "Y"),
        ("def f[T: B](x: T) -> T: return T", "f", "B"),
        ("class A[T](C[T]):\n    x: T", "A", "C"),
    ],
)
def test_type_parameters_are_names_of_their_own_definition(source, binds, reads):
    test_names_follow_pythons_scopes(source, binds, reads)


@pytest.mark.parametrize("source", [case[0] for case in CASES])
def test_the_compiler_agrees(source):
    """The oracle: what compiled code stores in the module's namespace, and loads from it."""
    loads, stores = set(), set()
    waiting = [compile(source, "<source>", "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
        of_module = ("STORE_NAME", "DELETE_NAME") if code.co_name == "<module>" else ()
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                loads.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", *of_module):
                stores.add(step.argval)
    found = names_of(ast.parse(source))
    assert found.binds == stores
    assert loads - {"__name__"} <= found.uses


def test_reads_keep_the_order_of_the_source():
    assert [n.id for n in names_of(ast.parse("b(a)\nfor x in c: d(x, b)")).reads] == [
        "b",
        "a",
        "c",
        "d",
        "x",
        "b",
    ]


def test_an_expression_may_be_thousands_deep():
    source = "x = " + " + ".join(f"y{i}" for i in range(2000))
    assert len(free_names(source)) == 2000


def test_free_names_are_read_and_not_bound():
    source = "from math import floor\ndef g(x):\n    return floor(h(x))\nassert f(g(1)) == sum([y])"
    assert free_names(source) == {"h", "f", "sum", "y"}
    assert defined_names(source) == {"floor", "g"}


@pytest.mark.parametrize("source", ["def f(", "x = 1\0", "x = " + "(" * 3000])
def test_a_source_that_does_not_parse_has_no_names(source):
    assert free_names(source) == defined_names(source) == set()


def test_a_program_asks_its_candidate_for_what_nobody_else_defines():
    """Without `names`, which may also say that a builtin is the candidate's."""
    tests = "from math import *\nassert [f(x) for x in helper(2)] == [abs(g)]\nassert e(1)"
    assert Program("", tests, helpers="def helper(n): ...").asked() == ("e", "f", "g")
    assert Program("", tests, names=("abs",)).asked() == ("abs",)


def test_no_answer_makes_python_print_a_warning(monkeypatch):
    """Since Python 3.12 an answer with "\\d" gave a SyntaxWarning line for each of its parses."""
    real, before = ast.parse, list(warnings.filters)

    def slow(source, *more, **named):
        time.sleep(0.05)
        warnings.warn("invalid escape sequence", SyntaxWarning, stacklevel=2)
        return real(source, *more, **named)

    monkeypatch.setattr(ast, "parse", slow)
    answer = "def f(x):\n    return x\n"
    with warnings.catch_warnings(record=True) as seen, ThreadPoolExecutor(4) as pool:
        found = [pool.submit(defined_names, answer)]
        for i in range(3):  # threads share the filters: one must not restore another's
            time.sleep(0.02)
            found.append(pool.submit(find_program, f"{answer}# {i}", []))
        assert found[0].result() == {"f"} and all(f.result() for f in found)
    assert seen == [] and list(warnings.filters) == before
