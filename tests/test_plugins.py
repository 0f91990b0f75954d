"""--plugin: what a file of the user's own may add, and how a bad one is refused."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from mini import ROOT, run_forked

from eval import MODEL_DEFAULTS

RULE = """
from decoding.algorithms import ALGORITHMS, FAMILIES, Algorithm, top_k
def first(view):
    return top_k(view.confidence, view.masked, view.quota)
ALGORITHMS["mine"] = Algorithm(first, FAMILIES, "adaptive", blocks=True, \
reads=frozenset({"confidence"}))
"""


def with_options(options: str) -> str:
    """RULE with options of its own."""
    source = RULE.replace("Algorithm, top_k", "Algorithm, Option, top_k")
    return source.replace("blocks=True, ", f"blocks=True, options={options}, ")


RUN = ["--model_alias", "tiny-llada", "--task", "gsm8k", "--data_dir", "assets/benchmarks"]
RUN += ["--dtype", "float32", "--limit", "2"]


def execute(*words, **environ):
    return subprocess.run(
        [sys.executable, "eval.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environ,
    )


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my_rule.py"
    path.write_text(RULE)
    return path


def generation_id(tmp_path, *words) -> str:
    run = execute(*RUN, "--output_dir", tmp_path, "--dry_run", *words)
    assert run.returncode == 0, run.stderr
    return next(line.split()[1] for line in run.stdout.splitlines() if line.startswith("  id "))


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, problem",
    [
        ("x = 1\nraise KeyError('nope')\n", "line 2: KeyError: 'nope'"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(0)\n", "SystemExit"),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['llada'] = {}\n",
            "replaces the model 'llada'; a plugin may only add",
        ),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['dream']['checkpoint'] = 'x/y'\n",
            "replaces the model 'dream'",
        ),
        (
            "from decoding.algorithms import ALGORITHMS\ndel ALGORITHMS['random']\n",
            "replaces the algorithm 'random'",
        ),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['a'] = {'family': 'llada', "
            "'checkpoint': 'x/y', 'flag': 'a_ckpt', 'block': 8}\n",
            "MODEL_DEFAULTS['a']: unknown key 'block'",
        ),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['a'] = {'family': 'lada'}\n",
            "MODEL_DEFAULTS['a'] lacks checkpoint, flag",
        ),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['a'] = {'family': 'llada', "
            "'checkpoint': 'x/y', 'flag': 'limit'}\n",
            "--limit",
        ),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['a'] = {'family': 'llada', "
            "'checkpoint': 'x/y', 'flag': 'a-ckpt', 'uniform': {'*': {'gen_len': 8}}}\n",
            "uniform cell of '*' has unknown key 'gen_len'; did you mean 'gen_length'?",
        ),
        (
            "from decoding.algorithms import ALGORITHMS\nALGORITHMS['foo'] = 3\n",
            "ALGORITHMS['foo'] is no Algorithm but 3",
        ),
        ("from eval import TASKS\nTASKS['foo'] = 3\n", "TASKS['foo'] is no TaskSpec"),
        (
            RULE.replace('"adaptive"', '"adaptiv"'),
            "ValueError: schedule 'adaptiv' is not known; there are: adaptive, even",
        ),
        (RULE.replace('"confidence"', '"confidense"'), "reads 'confidense' is not known"),
        (RULE.replace("first, FAMILIES", "first, ('lada',)"), "unknown family 'lada'"),
        (
            "from eval import MODEL_DEFAULTS\nMODEL_DEFAULTS['a'] = 3\n",
            "MODEL_DEFAULTS['a'] is no dict but 3",
        ),
        (
            "from pathlib import Path\nfrom eval import MODEL_DEFAULTS\n"
            "MODEL_DEFAULTS['a'] = {'family': 'llada', 'checkpoint': Path('x'), 'flag': 'a'}\n",
            "MODEL_DEFAULTS['a']: checkpoint PosixPath('x') must be a text",
        ),
        (
            "from dataclasses import replace\nfrom models import FAMILIES\n"
            "FAMILIES['foo'] = replace(FAMILIES['llada'], name='foo', model_type='foo')\n",
            "FAMILIES['foo']: the algorithm 'low_confidence' is not defined for it; there are: "
            "leftright, threshold",
        ),
        (
            "from models import FAMILIES\nFAMILIES['foo'] = FAMILIES['llada']\n",
            "FAMILIES['foo'] is no Family of this name",
        ),
        (
            "from dataclasses import replace\nfrom eval import TASKS\n"
            "TASKS['foo'] = replace(TASKS['gsm8k'], name='foo', forms={})\n",
            "TASKS['foo'] has no forms",
        ),
        (with_options("{'a': 0.5}"), "ALGORITHMS['mine']: option 'a' is no Option but 0.5"),
        (with_options("{'a-b': Option(1.0, '')}"), "option 'a-b' has another character than"),
        (with_options("{'a': Option(False, '', switch=True)}"), "option 'a' has `switch`"),
    ],
)
def test_a_bad_plugin_is_one_line_and_code_2(tmp_path, source, problem):
    path = tmp_path / "bad.py"
    path.write_text(source)
    run = execute("--plugin", path, *RUN, "--dry_run")
    assert run.returncode == 2
    assert problem in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and run.stderr.startswith("error: ")


def test_a_missing_plugin_is_one_line_and_code_2(tmp_path):
    run = execute("--plugin", tmp_path / "none.py", *RUN, "--dry_run")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "cannot be read: No such file" in run.stderr
    run = execute("--plugin", "", *RUN, "--dry_run")
    assert run.stderr == "error: --plugin '': give a Python file, FILE.py\n"


def test_an_option_may_be_a_word_and_share_the_name_of_another_with_its_own_range(tmp_path):
    """A default that is no number broke every command; a shared name had the first one's range."""
    path = tmp_path / "my_rule.py"
    path.write_text(
        with_options(
            "{'mode': Option('a', '50 % of it', choices=('a', 'b')), "
            "'threshold': Option(3.0, '', low=2.0, high=5.0)}"
        )
    )
    words = ["--plugin", path, *RUN, "--output_dir", tmp_path, "--alg", "mine", "--dry_run"]
    run = execute(*words, "--mode", "b", "--threshold", "4.5")
    assert run.returncode == 0, run.stderr
    assert "mine_modeb_threshold4.5_tps1" in run.stdout
    run = execute(*words, "--threshold", "1")
    assert run.returncode == 2
    assert run.stderr == "error: --threshold 1 must be at least 2 and at most 5\n"
    text = " ".join(execute("--plugin", path, "--help").stdout.split())
    assert "--mode NAME mine: 50 % of it (default a)." in text


def test_a_plugin_is_part_of_the_identity_of_its_own_runs_alone(plugin, tmp_path):
    plain = generation_id(tmp_path)
    assert generation_id(tmp_path, "--plugin", plugin) == plain
    own = generation_id(tmp_path, "--plugin", plugin, "--alg", "mine")
    copy = plugin.with_name("other_name.py")
    copy.write_text(RULE)
    assert generation_id(tmp_path, "--plugin", copy, "--alg", "mine") == own
    plugin.write_text(RULE + "# another comment\n")
    assert generation_id(tmp_path, "--plugin", plugin, "--alg", "mine") != own


def test_a_plugin_that_changed_since_the_plan_ends_a_worker_with_4(plugin):
    planned = json.dumps({str(plugin): hashlib.sha256(RULE.encode()).hexdigest()})
    words = ["--plugin", plugin, *RUN, "--alg", "mine", "--print_output_path"]
    assert execute(*words, DLLMEXP_PLUGINS=planned).returncode == 0
    plugin.write_text(RULE + "\n")
    run = execute(*words, DLLMEXP_PLUGINS=planned)
    assert run.returncode == 4
    assert "has changed since the run was planned" in run.stderr


@pytest.mark.slow
def test_workers_use_the_plugin_and_run_the_task_that_their_leader_runs(plugin, tmp_path):
    words = ["--plugin", plugin, *RUN, "--alg", "mine", "--output_dir", tmp_path]
    words += ["--task", "gsm8k,lines", "--devices", "cpu,cpu"]
    run_forked([words], tmp_path / "log")
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(result["config"]["task"] for result in results) == ["gsm8k", "lines"]
    for result in results:
        assert result["status"] == "complete" and len(result["samples"]) == 2
        assert result["config"]["plugins"] == [
            {"path": str(plugin), "sha256": hashlib.sha256(plugin.read_bytes()).hexdigest()}
        ]


@pytest.mark.slow
def test_a_plugin_may_have_the_name_of_a_module(tmp_path):
    """It stood in for the module, whose names were then missing."""
    (ours := tmp_path / "harness.py").write_text(RULE)
    (theirs := tmp_path / "datasets.py").write_text(RULE.replace("mine", "other"))
    words = ["--plugin", ours, "--plugin", theirs, *RUN, "--output_dir", tmp_path]
    run = execute(*words, "--alg", "mine", "--show_prompt")
    assert run.returncode == 0, run.stderr
    assert "document 0 of" in run.stdout


HARNESSES = """
from eval import MODEL_DEFAULTS
from decoding.row_state import Completion
from harness import LladaHarness

class Fixed(LladaHarness):
    token = 11
    def decode(self, requests):
        n = self.decode_config.schedule.gen_length
        for request in requests:
            yield request, Completion((self.token,) * n, (0,) * n, 1, 0, n, 0.1, "length")

class Other(Fixed):
    token = 12

for name, harness in (("fixed", Fixed), ("other", Other)):
    MODEL_DEFAULTS[name] = MODEL_DEFAULTS["tiny-llada"] | {
        "flag": f"{name}_ckpt", "harness": harness
    }
"""


@pytest.mark.slow
def test_a_harness_answers_and_is_part_of_the_identity(tmp_path):
    """Two harnesses never share samples, and none is served those of the family's own."""
    path = tmp_path / "harnesses.py"
    path.write_text(HARNESSES)
    found, aliases = {}, ("fixed", "other", "tiny-llada")
    words = ["--plugin", path, *RUN, "--output_dir", tmp_path, "--model_alias"]
    printed = run_forked([[*words, alias] for alias in aliases], tmp_path / "log")
    assert "resuming" not in printed
    for alias in aliases:
        [file] = tmp_path.glob(f"{alias}_*.json")
        found[alias] = json.loads(file.read_text())
    tokens = {a: {t for s in r["samples"] for t in s["token_ids"]} for a, r in found.items()}
    assert tokens["fixed"] == {11} and tokens["other"] == {12} and len(tokens["tiny-llada"]) > 2
    assert len({r["generation_id"] for r in found.values()}) == 3
    assert found["fixed"]["config"]["harness"]["name"].endswith(":Fixed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["my_harness", "no_such_module:X", "json:nothing", "json:dumps", "no.module:X"]
    + ["/my/file.py:X", "sys:X", 3],
)
def test_bad_harnesses_are_refused_before_anything_is_read(run, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    entry = MODEL_DEFAULTS["tiny-llada"] | {"flag": "a_ckpt", "harness": name}
    monkeypatch.setitem(MODEL_DEFAULTS, "a", entry)
    code, _, err = run("--dry_run", *RUN, "--model_alias", "a")
    assert code == 2 and err.startswith("error: ") and "harness" in err
    assert err.count("\n") == 1 and "should not happen" not in err


def test_official_without_a_cell_lists_who_has_one():
    run = execute(*RUN, "--protocol", "official")
    assert run.returncode == 2
    assert (
        "--protocol official: tiny-llada has no official protocol for gsm8k; aliases with one for "
        "gsm8k: llada, llada1.5, dream, diffucoder" in run.stderr
    )
