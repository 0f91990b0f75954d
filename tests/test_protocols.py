"""The table of protocols."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval import MODEL_DEFAULTS, TASKS
from models import FAMILIES
from tasks.code import EXTRACTIONS
from tasks.installed import spec_of
from tasks.protocols import PROTOCOLS, protocol
from utils import UsageError

TINY = ("tiny-llada", "tiny-dream")
BASE = ("llada-base", "dream-base")  # see test_base_models.py
CELLS = [
    (name, alias, task)
    for name in PROTOCOLS
    for alias in MODEL_DEFAULTS
    for task in TASKS
    if name == "uniform" or task in MODEL_DEFAULTS[alias].get(name, ())
]


def cell(name: str, alias: str, task: str):
    family = FAMILIES[MODEL_DEFAULTS[alias]["family"]]
    return protocol(name, alias, MODEL_DEFAULTS, TASKS[task], family)


@pytest.mark.parametrize("name, alias, task", CELLS)
def test_every_cell_names_a_form_of_its_task(name, alias, task):
    p = cell(name, alias, task)
    form = TASKS[task].forms[p.form]
    assert p.name == name
    assert p.num_fewshot == form.num_fewshot or TASKS[task].kind == "choice"
    assert p.revision == PROTOCOLS[name]
    assert p.gen_length % (p.block_length or p.gen_length) == 0
    assert p.temperature > 0 or p.top_p is None  # at temperature 0 it would be inactive
    for reference in p.references:
        assert reference["metric"] == TASKS[task].headline
        assert 0 < reference["score"] < 100 and reference["source"] and reference["settings"]
    assert not p.references or p.references[0]["tokens_per_step"] in (1, None)


@pytest.mark.parametrize(
    "task, canvas",
    [("humaneval", 512), ("mbpp", 512), ("gsm8k", 256), ("truthfulqa", 128), ("lines", 64)],
)
def test_uniform_asks_every_model_the_same(task, canvas):
    cells = [cell("uniform", alias, task) for alias in MODEL_DEFAULTS if alias not in TINY + BASE]
    assert {(c.form, c.num_fewshot, c.gen_length, c.temperature, c.references) for c in cells} == {
        ("chat", 0, canvas, 0.0, ())
    }
    assert [(c.algorithm, c.block_length) for c in cells] == [("low_confidence", 32)] * 2 + [
        ("maskgit_plus", 32)
    ] * 2


@pytest.mark.parametrize("alias", TINY)
def test_the_embedded_checkpoints_have_one_small_canvas_and_no_published_score(alias):
    """They are trained for 24 positions; 512 would be mostly end tokens and minutes of waiting."""
    for task in TASKS:
        p = cell("uniform", alias, task)
        assert (p.gen_length, p.block_length, p.references) == (24, 8, ())
        assert p.form == TASKS[task].default_form


@pytest.mark.parametrize(
    "alias, task, flags",
    [
        ("llada", "gsm8k", (False, False)),
        ("llada", "humaneval", (True, False)),
        ("llada", "mbpp", (False, True)),
        ("llada", "truthfulqa", (False, True)),
        ("llada1.5", "gsm8k", (False, True)),
        ("llada1.5", "humaneval", (False, True)),
        ("llada1.5", "mbpp", (False, True)),
        ("llada1.5", "truthfulqa", (False, True)),
        *(
            (a, t, (False, False))
            for n, a, t in CELLS
            if n == "official" and "dream" in MODEL_DEFAULTS[a]["family"]
        ),
    ],
)
def test_end_token_flags_are_the_authors_in_both_protocols(alias, task, flags):
    for name in ("uniform", "official"):
        p = cell(name, alias, task)
        assert (p.logits_eos_inf, p.confidence_eos_eot_inf) == flags


@pytest.mark.parametrize(
    "alias, task, form, canvas, block, sampling, score",
    [
        ("llada", "gsm8k", "lm_eval", 256, 32, ("low_confidence", 0.0, None), 79.3),
        ("llada", "humaneval", "opencompass", 512, 512, ("low_confidence", 0.0, None), 47.0),
        ("llada", "mbpp", "opencompass", 256, 256, ("low_confidence", 0.0, None), 39.6),
        ("llada1.5", "gsm8k", "lm_eval", 256, 16, ("low_confidence", 0.0, None), 83.6),
        ("llada1.5", "humaneval", "opencompass", 512, 32, ("low_confidence", 0.0, None), 51.2),
        ("llada1.5", "mbpp", "opencompass", 512, 32, ("low_confidence", 0.0, None), 42.6),
        ("dream", "gsm8k", "cot", 256, None, ("entropy", 0.1, 0.9), 81.0),
        ("dream", "humaneval", "instruct", 768, None, ("entropy", 0.1, 0.9), 55.5),
        ("dream", "mbpp", "instruct", 1024, None, ("entropy", 0.1, 0.9), 58.8),
        ("diffucoder", "humaneval", "instruct", 512, None, ("entropy", 0.2, 0.95), 73.2),
        ("diffucoder", "mbpp", "instruct", 512, None, ("entropy", 0.2, 0.95), None),
        ("diffucoder", "gsm8k", "cot", 256, None, ("entropy", 0.2, 0.95), None),
        ("llada", "truthfulqa", "chat", 128, 32, ("low_confidence", 0.0, None), None),
        ("dream", "truthfulqa", "chat", 128, None, ("entropy", 0.1, 0.9), None),
    ],
)
def test_official_cells(alias, task, form, canvas, block, sampling, score):
    p = cell("official", alias, task)
    assert (p.form, p.gen_length, p.block_length) == (form, canvas, block)
    assert (p.algorithm, p.temperature, p.top_p) == sampling
    assert next((r["score"] for r in p.references), None) == score


def test_official_programs_are_found_by_the_authors_extraction():
    """DiffuCoder has no published score on MBPP's 500 tasks, so nothing of its authors' either."""
    used = {(a, t): cell("official", a, t).extraction for n, a, t in CELLS if n == "official"}
    assert {key: name for key, name in used.items() if name} == {
        ("llada", "humaneval"): "opencompass",
        ("llada", "mbpp"): "opencompass",
        ("llada1.5", "humaneval"): "opencompass",
        ("llada1.5", "mbpp"): "opencompass",
        ("dream", "humaneval"): "evalplus",
        ("dream", "mbpp"): "verbatim",
        ("diffucoder", "humaneval"): "evalplus",
        ("llada-base", "humaneval"): "lm_eval",
        ("llada-base", "mbpp"): "lm_eval",
        ("dream-base", "humaneval"): "evalplus",
        ("dream-base", "mbpp"): "lm_eval",
    }
    assert set(used.values()) == {*EXTRACTIONS, None}
    assert all(cell("uniform", a, t).extraction is None for n, a, t in CELLS if n == "uniform")


def test_scores_that_are_published_at_more_tokens_per_step():
    cells = [(a, t, cell("official", a, t).references) for n, a, t in CELLS if n == "official"]
    more = {
        (a, t): {r["tokens_per_step"]: r["score"] for r in found}
        for a, t, found in cells
        if len(found) > 1
    }
    assert more == {("llada", "gsm8k"): {1: 79.3, 2: 74.8, 4: 66.5, 8: 30.7}}


@pytest.mark.parametrize("alias", TINY)
def test_official_without_a_cell_lists_who_has_one(alias):
    with pytest.raises(UsageError, match="for gsm8k: llada, llada1.5, dream, diffucoder, "):
        cell("official", alias, "gsm8k")


def test_a_new_entry_needs_no_cells():
    """An unknown alias or benchmark gets the defaults of its family and its benchmark."""
    models = {"mine": {"family": "llada", "checkpoint": "x/y", "flag": "mine_ckpt"}}
    p = protocol("uniform", "mine", models, TASKS["mbpp"], FAMILIES["llada"])
    assert (p.algorithm, p.block_length, p.gen_length) == ("low_confidence", 32, 512)
    assert not p.confidence_eos_eot_inf


def test_protocols_and_data_checks_load_nothing_heavy():
    """Bad input has to be answered before torch and lm-eval are imported."""
    code = (
        "import sys; import tasks.protocols; "
        "from tasks import humaneval, mbpp, gsm8k, truthfulqa, check_data\n"
        "for m in (humaneval, mbpp, gsm8k, truthfulqa): assert check_data(m.SPEC, '/nonexistent')\n"
        "print([m for m in ('torch', 'lm_eval', 'datasets', 'numpy', 'yaml', 'evaluate') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_a_task_of_lm_evals_own_keeps_its_number_of_examples():
    """Its definition decides, so that the result states the number that the prompt has."""
    for name, n in (("gsm8k", 5), ("gsm8k_cot_zeroshot", 0)):
        spec = spec_of(f"lm_eval:{name}")
        assert (
            protocol("uniform", "llada", MODEL_DEFAULTS, spec, FAMILIES["llada"]).num_fewshot == n
        )


def test_likelihoods_are_compared_without_a_chat_template():
    for task, spec in TASKS.items():
        assert cell("uniform", "llada", task).chat_template == (spec.kind != "choice")


def test_which_benchmarks_have_documents_for_worked_examples():
    with_examples = "gsm8k mbpp mbpp_plus math500 minerva_math bbh arc_challenge arc_easy"
    with_examples += " hellaswag winogrande piqa mmlu gpqa"
    assert {n for n, spec in TASKS.items() if spec.has_examples} == set(with_examples.split())
    assert spec_of("lm_eval:gsm8k").has_examples
