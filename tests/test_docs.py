"""README and docs: their limits, links, commands and the schema of a result hold as written."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from mini import LLADA, ROOT, gsm8k_dir, winogrande_dir, write_lines

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "assets" / "README.md"]
SCHEMA = json.loads((ROOT / "docs" / "schema.json").read_text(encoding="utf-8"))

# What does not run here: (start of the command, why). All other commands run, in the order of their
# page; those that would need a real checkpoint, a GPU, SLURM or tmux run as `as_run_here` says.
NOT_RUN = (
    ("./scripts/setup.sh", "installs"),
    ("./scripts/test.sh", "runs the tests"),
    ("./scripts/demo.sh", "takes minutes; .ci/run runs it"),
    ("python -m dev.bench", "takes minutes; test_speed.py runs a small one"),
    ("python dev/train_tiny.py", "takes an hour; test_tiny.py checks its lessons"),
    ("for m in GSAI-ML/", "downloads checkpoints"),
    ("source ", "the environment of the tests is there"),
    ("export ", "the environment of the tests is there"),
)
TINY = "--model_alias tiny-"
# no dry run in the tests' process: they change its tables, need a result, or print something else
WITHOUT_DRY_RUN = re.compile("--plugin|--predictions|--show_prompt|--version")
OF_ITS_OWN = re.compile("--plugin|--version")  # they change the tables of their process, or end it


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, one string each; a loop is one command."""
    found = []
    for block in blocks(page, "bash"):
        lines = iter(block.replace("\\\n", " ").splitlines())
        for line in lines:
            if line.startswith("for "):
                line = "\n".join([line, *takewhile(lambda part: part != "done", lines), "done"])
            found.append(line)
    return [command for command in found if command and not command.startswith("#")]


def as_run_here(command: str) -> str | None:
    """The command in a form that runs on a CPU without a network; None: it is not run."""
    command = re.sub(r"\s+# .*", "", command)
    if any(command.startswith(start) for start, _ in NOT_RUN):
        return None
    command = re.sub(r"^(torchrun|accelerate launch) (--\w+ \d+ )+", "python ", command)
    if "eval.py" in command and TINY not in command and "--version" not in command:
        return f"{command} --dry_run"  # a real checkpoint: the flags are checked, nothing is loaded
    if command.startswith("./scripts/exp.sh") or "sweep.py run" in command:
        return f"{command} --check"  # the options are checked, nothing is run
    return command.replace(" --watch", "")


# ---------------------------------------------------------------- limits


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_a_page_starts_with_what_it_is_for(page):
    """The first paragraph after the title is prose, and the README or another page leads there."""
    title, blank, first = page.read_text(encoding="utf-8").split("\n")[:3]
    assert title.startswith("# ") and not blank
    assert re.match(r"[A-Z`]", first)
    assert any(
        f"({page.name}" in other.read_text() or f"(docs/{page.name}" in other.read_text()
        for other in PAGES
        if other != page
    )


# ---------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](a.md#a-b) [y](#a-b) [z](b.md) [w](a.md#c) [v](https://no.where)\n")
    assert broken_links(page) == ["b.md", "a.md#c"]


# ---------------------------------------------------------------- tables


def test_the_readme_lists_every_model_benchmark_and_algorithm():
    """A new entry of a table in the code needs its line in the README."""
    from decoding.algorithms import ALGORITHMS
    from eval import MODEL_DEFAULTS, TASKS

    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    listed = set(re.findall(r"`([\w.-]+)`", "\n".join(lines)))
    assert {*MODEL_DEFAULTS, *TASKS, *ALGORITHMS} - listed == set()


def test_the_readme_counts_what_was_recorded():
    recorded = ROOT / "tests" / "conformance"
    words = " ".join(README.read_text(encoding="utf-8").split())
    for name, what in (
        ("golden/decoding.jsonl", "recorded decodings"),
        ("likelihood/likelihood.jsonl", "recorded lines of likelihoods"),
    ):
        lines = (recorded / name).read_text(encoding="utf-8").splitlines()
        assert f" {len(lines)} {what}" in words


# ---------------------------------------------------------------- commands


def test_commands_are_found_and_made_to_run_here(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "```bash\npython eval.py --model_alias llada \\\n  --task gsm8k   # a\n\n# no\n"
        "for m in a b; do\n  echo $m\ndone\n./scripts/exp.sh --workers 2\n```\n```text\nx\n```\n"
        "```bash\ntorchrun --nproc_per_node 4 eval.py --task gsm8k\nsource x\n```\n"
    )
    assert [as_run_here(c) for c in commands(page)] == [
        "python eval.py --model_alias llada    --task gsm8k --dry_run",
        "for m in a b; do\n  echo $m\ndone",
        "./scripts/exp.sh --workers 2 --check",
        "python eval.py --task gsm8k --dry_run",
        None,
    ]


def test_the_flags_of_every_run_are_known(run):
    """Each eval.py command passes --dry_run, in this process."""
    seen = 0
    for page in PAGES:
        for command in map(as_run_here, commands(page)):
            if command and "eval.py" in command and not WITHOUT_DRY_RUN.search(command):
                words = shlex.split(command)
                code, _, err = run("", *words[words.index("eval.py") + 1 :], "--dry_run")
                assert code == 0, f"{page.name}: {command}\n{err}"
                seen += 1
    assert seen > 15


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project to run commands in, with the files that the pages speak of."""
    root = tmp_path_factory.mktemp("docs") / "dllmexp"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "results", "report", "hostile", "__pycache__", ".pytest_cache"
    )
    shutil.copytree(ROOT, root, ignore=left_out)
    (root / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed.txt":
            (root / ".venv" / entry.name).symlink_to(entry)
    shutil.copyfile(root / "requirements.txt", root / ".venv" / "installed.txt")
    [listed] = blocks(ROOT / "docs" / "suite.md", "yaml")
    (root / "my.yaml").write_text(listed)
    [rule] = [b for b in blocks(ROOT / "docs" / "extending.md", "python") if "best_share" in b]
    (root / "my_rule.py").write_text(rule)
    first = shell(root, next(c for c in map(as_run_here, commands(README)) if c and TINY in c))
    assert first.returncode == 0, first.stderr
    (root / "first.txt").write_text(first.stdout)
    return root


def shell(root: Path, command: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "DLLMEXP_DATA_DIR"}
    env |= {"PATH": f"{root}/.venv/bin:{env['PATH']}", "COLUMNS": "120"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_of_a_page_run(checkout, page, run, monkeypatch):
    """Most dry runs are those of the test above."""
    monkeypatch.chdir(checkout)
    for command in map(as_run_here, commands(page)):
        if not command or "--dry_run" in command and not WITHOUT_DRY_RUN.search(command):
            continue
        if command.startswith("python eval.py ") and not OF_ITS_OWN.search(command):
            code, *output = run(command.removeprefix("python eval.py "))
        else:
            done = shell(checkout, command)
            code, output = done.returncode, [done.stdout, done.stderr]
        assert code == 0, "\n".join([command, *output])


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_a_first_run_prints_what_the_page_shows(checkout, page):
    """Line by line, numbers apart."""

    def forms(text: str) -> set[str]:
        return {re.sub(r"(?<!tps)\b\d[\d.]*", "N", line) for line in text.splitlines()}

    shown = next(b for b in blocks(ROOT / page, "text") if "tokens per forward pass" in b)
    assert forms(shown) - forms((checkout / "first.txt").read_text()) == set()


@pytest.mark.slow
def test_the_readmes_figures_are_made_from_results(checkout, tmp_path):
    [result] = (checkout / "results").glob("*_tps2_dllmexp-mini_limit20.json")
    (tmp_path / "demo").mkdir()
    shutil.copy(result, tmp_path / "demo")
    made = shell(checkout, f"python dev/readme_figures.py {tmp_path}/demo --out {tmp_path}/images")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "images" / "accuracy.svg").read_text().count("<svg") == 1
    strip = (tmp_path / "images" / "commits.svg").read_text()
    rows = json.loads(result.read_text())["samples"]
    doc_id = int(re.search(r"document (\d+)", made.stdout)[1])
    passes = [step + 1 for step in rows[doc_id]["committed_at"] if step >= 0]
    assert [int(n) for n in re.findall(r'font-size="9">(\d+)<', strip)] == passes


# ---------------------------------------------------------------- the schema of a result


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
WORDS = {"$schema", "$defs", "$ref", "title", "description", "type", "enum", "const", "anyOf"}
WORDS |= {"required", "properties", "additionalProperties", "items", "minItems", "maxItems"}
WORDS |= {"minimum", "pattern"}


def is_type(value, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def faults(value, schema: dict, at: str = "result") -> list[str]:
    """Where a value departs from a JSON Schema, for the keywords in WORDS."""
    assert set(schema) <= WORDS, f"{at}: the test does not know {set(schema) - WORDS}"
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    if "anyOf" in schema:
        tried = [faults(value, option, at) for option in schema["anyOf"]]
        return min(tried, key=len)
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(is_type(value, name) for name in names):
        return [f"{at}: {value!r:.40} is no {' or '.join(names)}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r:.40} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: {value!r:.40} is not {schema['const']!r}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        found.append(f"{at}: {value!r:.40} does not match {schema['pattern']}")
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        found.append(f"{at}: {value} is below {schema['minimum']}")
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not low <= len(value) <= high:
            found.append(f"{at}: has {len(value)} entries")
        for i, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{at}[{i}]")
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{at}: lacks {name}" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in known:
                found += faults(item, known[name], f"{at}.{name}")
            elif isinstance(more, dict):
                found += faults(item, more, f"{at}.{name}")
            elif not more:
                found.append(f"{at}: {name} is not in docs/schema.json")
    return found


def result_in(folder: Path) -> dict:
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())


def tiny_run(tmp_path: Path) -> str:
    """Arguments of a run of three problems on the random checkpoint."""
    return (
        f"--model_alias llada --task gsm8k --llada_ckpt {LLADA} --device cpu --dtype float32 "
        f"--data_dir {gsm8k_dir(tmp_path / 'data')} --output_dir {tmp_path / 'out'} "
        "--gen_length 8 --block_length 8"
    )


@pytest.mark.slow
def test_a_generated_result_matches_the_schema(run, tmp_path):
    """And one that is wrong in four places does not."""
    code, _, err = run(f"{tiny_run(tmp_path)} --alg threshold --kv_cache dual --seed 3")
    assert code == 0, err
    result = result_in(tmp_path / "out")
    assert faults(result, SCHEMA) == []
    wrong = result | {"n_samples": "3", "surprise": 1, "status": "fine"}
    wrong["samples"] = [dict(result["samples"][0])]
    del wrong["profile"], wrong["samples"][0]["text"]
    assert sorted(faults(wrong, SCHEMA)) == [
        "result.n_samples: '3' is no integer",
        "result.samples[0]: lacks text",
        "result.status: 'fine' is none of ['complete', 'incomplete', 'unscored']",
        "result: lacks profile",
        "result: surprise is not in docs/schema.json",
    ]


@pytest.mark.slow
def test_a_result_with_a_failed_sample_matches_the_schema(run, tmp_path, monkeypatch):
    import harness

    def failing(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(harness, "decode_each", failing)
    assert run(tiny_run(tmp_path))[0] == 5
    result = result_in(tmp_path / "out")
    assert result["status"] == "incomplete" and faults(result, SCHEMA) == []


def programs_run(tmp_path: Path) -> str:
    """Arguments that score one right program and one wrong one."""
    data = ROOT / "assets" / "benchmarks"
    with gzip.open(data / "HumanEval.jsonl.gz", "rt") as file:
        row = json.loads(file.readline())
    texts = [row["prompt"] + row["canonical_solution"], "def f(): pass"]
    answers = [{"doc_id": i, "text": text} for i, text in enumerate(texts)]
    path = write_lines(tmp_path / "texts.jsonl", answers)
    words = f"--model_alias tiny-llada --task humaneval --data_dir {data} --limit 2"
    return f"{words} --predictions {path} --output_dir {tmp_path / 'programs'}"


def likelihood_run(tmp_path: Path) -> str:
    """Arguments of a run over two sentences, each with two options."""
    return (
        f"--model_alias tiny-llada --task winogrande --mc_num 4 --device cpu "
        f"--data_dir {winogrande_dir(tmp_path / 'sentences')} --output_dir {tmp_path / 'likely'}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, code, status", [("--strict_exec", 0, "complete"), ("--no_exec", 5, "unscored")]
)
def test_a_result_of_programs_matches_the_schema(run, tmp_path, more, code, status):
    assert run(f"{programs_run(tmp_path)} {more}")[0] == code
    result = result_in(tmp_path / "programs")
    assert result["status"] == status and faults(result, SCHEMA) == []
    assert all("program" in sample for sample in result["samples"])


def test_a_result_of_likelihoods_matches_the_schema(run, tmp_path):
    """And one that is wrong in four places does not."""
    code, _, err = run(likelihood_run(tmp_path))
    assert code == 0, err
    result = result_in(tmp_path / "likely")
    assert faults(result, SCHEMA) == []
    assert [len(row["options"]) for row in result["samples"]] == [2, 2]
    wrong = json.loads(json.dumps(result))
    wrong["config"]["mc_num"] = 0
    del wrong["samples"][0]["chosen"], wrong["profile"]["rows_needed"]
    wrong["samples"][1]["options"][1]["loglikelihood"] = "-3"
    assert sorted(faults(wrong, SCHEMA)) == [
        "result.config.mc_num: 0 is below 1",
        "result.profile: lacks rows_needed",
        "result.samples[0]: lacks chosen",
        "result.samples[1].options[1].loglikelihood: '-3' is no number or null",
    ]


def test_a_result_with_a_failed_option_matches_the_schema(run, tmp_path, monkeypatch):
    import harness

    def failing(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(harness, "likelihoods_each", failing)
    assert run(likelihood_run(tmp_path))[0] == 5
    result = result_in(tmp_path / "likely")
    assert result["status"] == "incomplete" and faults(result, SCHEMA) == []
    assert result["samples"][0]["options"][0]["loglikelihood"] is None


def documented() -> dict[str, set[str]]:
    """Head of a table's first column in docs/results.md -> the names in that column."""
    found: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for head, rows in re.findall(r"^\| (\w+) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        names = (
            name for row in rows.splitlines() for name in re.findall("`(.+?)`", row.split("|")[1])
        )
        found.setdefault(head, set()).update(names)
    return found


def test_results_have_the_fields_that_the_page_lists(run, tmp_path):
    """All of them and no other, over one result of each kind."""
    for words in (tiny_run(tmp_path), programs_run(tmp_path), likelihood_run(tmp_path)):
        code, _, err = run(words)
        assert code == 0, err
    results = [result_in(tmp_path / name) for name in ("out", "programs", "likely")]
    rows = [row for result in results for row in result["samples"]]
    parts = {
        "field": results,
        "row": rows,
        "option": [option for row in rows for option in row.get("options", ())],
        "profile": [result["profile"] for result in results],
    }
    pages = documented()
    for head, found in parts.items():
        assert set().union(*found) == pages[head], head


def test_published_scores_match_the_schema():
    from eval import MODEL_DEFAULTS
    from experiment.result import reference_of
    from tasks.protocols import PROTOCOLS

    checked = 0
    for entry in MODEL_DEFAULTS.values():
        cells = [c for name in PROTOCOLS for c in entry.get(name, {}).values()]
        for published in (r for c in cells for r in c.get("references", ())):
            overrides = {name: {"run": x} for name, x in published.get("method", {}).items()}
            overrides["tokens_per_step"] = {"run": published["tokens_per_step"]}
            reference, _ = reference_of([published] * 2, overrides, whole=True, data="hub")
            assert reference["also"] == [published]
            assert faults(reference, SCHEMA["$defs"]["reference"]) == []
            checked += 1
    assert checked > 20
