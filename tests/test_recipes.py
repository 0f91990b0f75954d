"""The recipes of docs/extending.md work as written, as a plugin and as an entry of a checkout."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mini import ROOT, run_forked

PAGE = ROOT / "docs" / "extending.md"
TINY = ["--data_dir", "assets/benchmarks", "--dtype", "float32", "--device", "cpu", "--limit", "3"]
RIDDLES = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(3)]


def recipes() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (file named in the first line, block) of each of its blocks."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    named = [(re.match(r"# ([\w/.]+)", block)[1], block) for block in blocks]
    model, *benchmark, algorithm = named[:4]
    return {
        "model": [model],
        "benchmark": benchmark,
        "algorithm": [algorithm],
        "harness": named[4:],
    }


def arguments(kind: str, folder: Path) -> list[str]:
    """A run of three documents on an embedded checkpoint that uses the recipe's entry."""
    if kind == "model":
        own = ["--model_alias", "my-llada", "--my_llada_ckpt", "assets/tiny-llada"]
        return [*own, "--task", "gsm8k", "--gen_length", "32", *TINY]
    if kind == "harness":
        own = ["--model_alias", "llada-short", "--llada_short_ckpt", "assets/tiny-llada"]
        return [*own, "--task", "gsm8k", "--gen_length", "32", *TINY]
    if kind == "benchmark":
        (folder / "riddles.jsonl").write_text("\n".join(map(json.dumps, RIDDLES)))
        own = ["--model_alias", "tiny-llada", "--task", "riddles", *TINY, "--gen_length", "32"]
        return [*own, "--block_length", "8", "--data_dir", str(folder)]
    own = ["--model_alias", "tiny-llada", "--task", "gsm8k", "--alg", "best_share"]
    return [*own, "--share", "0.5", *TINY]


def execute(root: Path, words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "eval.py", *words], cwd=root, capture_output=True, text=True
    )


@pytest.fixture
def plugin(tmp_path, request) -> Path:
    """The recipe as a file of the user's own: its blocks, one after the other."""
    path = tmp_path / "my_rule.py"
    path.write_text("\n\n".join(block for _, block in recipes()[request.param]))
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project in which each block stands where its first line says."""
    root = tmp_path_factory.mktemp("checkout") / "dllmexp"
    left_out = shutil.ignore_patterns(".git", ".venv*", "results", "tests", "__pycache__", "docs")
    shutil.copytree(ROOT, root, ignore=left_out)
    for kind, blocks in recipes().items():
        for file, block in blocks:
            if kind == "benchmark" and file == "my_rule.py":
                continue  # in a checkout it is the line below
            path = root / file
            source = path.read_text() if path.exists() else ""
            if file == "eval.py":
                at = source.index("\n# --task NAME")  # what follows MODEL_DEFAULTS
                path.write_text(f"{source[:at]}\n{block}\n{source[at:]}")
            else:
                path.write_text(f"{source}\n\n{block}")
    text = PAGE.read_text(encoding="utf-8")
    assert "`from tasks import riddles`" in text and '`"riddles": riddles.SPEC,`' in text
    source = (root / "eval.py").read_text()
    at = source.index("from tasks import ")
    source = f"{source[:at]}from tasks import riddles\n{source[at:]}"
    line = '"gsm8k": gsm8k.SPEC,'
    (root / "eval.py").write_text(source.replace(line, f'{line}\n    "riddles": riddles.SPEC,'))
    return root


KINDS = ("model", "benchmark", "algorithm", "harness")
LIGHT = KINDS[:3]  # their dry runs import no torch; the harness is known where it runs, below


@pytest.mark.parametrize("plugin, kind", [(k, k) for k in LIGHT], indirect=["plugin"])
def test_a_recipe_is_known_as_a_plugin(plugin, kind, tmp_path):
    words = ["--plugin", str(plugin), *arguments(kind, tmp_path), "--output_dir", str(tmp_path)]
    run = execute(ROOT, [*words, "--dry_run"])
    assert run.returncode == 0, run.stderr
    assert str(plugin) in run.stdout  # the plugin is part of the configuration
    if kind == "algorithm":
        assert "best_share_share0.5_tps1" in run.stdout


@pytest.mark.parametrize("kind", LIGHT)
def test_a_recipe_is_known_in_a_checkout(checkout, kind, tmp_path):
    words = [*arguments(kind, tmp_path), "--output_dir", str(tmp_path)]
    run = execute(checkout, [*words, "--dry_run"])
    assert run.returncode == 0, run.stderr
    assert "plugins" not in run.stdout


@pytest.mark.slow
def test_recipes_run_as_plugins_and_in_a_checkout(checkout, tmp_path):
    """Three documents each way: the same answers, kept under different ids."""
    plugins = {kind: tmp_path / f"my_{kind}.py" for kind in KINDS}
    plugins["harness"] = tmp_path / "my_rule.py"  # the name that the recipe's entry has
    for kind, path in plugins.items():
        path.write_text("\n\n".join(block for _, block in recipes()[kind]))
    commands = {"plugin": [], "checkout": []}
    for kind in KINDS:
        for way, more in (("plugin", ["--plugin", str(plugins[kind])]), ("checkout", [])):
            out = ["--output_dir", str(tmp_path / way / kind)]
            commands[way].append([*more, *arguments(kind, tmp_path), *out])
    run_forked(commands["plugin"], tmp_path / "log")
    run_all(checkout, commands["checkout"])
    for kind in KINDS:
        plugged, built_in = (
            json.loads(next((tmp_path / way / kind).glob("*.json")).read_text()) for way in commands
        )
        assert [s["token_ids"] for s in plugged["samples"]] == [
            s["token_ids"] for s in built_in["samples"]
        ]
        assert len(plugged["samples"]) == 3 and plugged["status"] == "complete"
        assert plugged["config"]["plugins"][0]["path"] == str(plugins[kind])
        assert not built_in["config"].get("plugins")
        named = (built_in["config"].get("harness") or {}).get("name")
        assert named == ("my_rule:ShortestFirst" if kind == "harness" else None)
        assert plugged["generation_id"] != built_in["generation_id"]


def run_all(root: Path, commands: list[list[str]]) -> None:
    """eval.py with each of the commands, in one process."""
    code = "import json, sys, eval; sys.exit(max(map(eval.main, json.loads(sys.argv[1]))))"
    words = [sys.executable, "-c", code, json.dumps(commands)]
    run = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("plugin", ["algorithm"], indirect=True)
def test_a_plugins_options_are_in_help_and_are_checked(plugin, tmp_path):
    listed = execute(ROOT, ["--plugin", str(plugin), "--help"])
    text = " ".join(listed.stdout.split())
    assert "--share X" in text and "commit this share of the open positions" in text
    words = ["--plugin", str(plugin), *arguments("algorithm", tmp_path), "--share", "2"]
    refused = execute(ROOT, words)
    assert refused.returncode == 2
    assert "--share 2" in refused.stderr and "at most 1" in refused.stderr
