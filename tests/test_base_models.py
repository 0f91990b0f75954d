"""llada-base and dream-base: prompts without a chat template, official cells, published scores."""

import json

import pytest
from mini import DREAM, LLADA, ROOT, gsm8k_dir

from eval import MODEL_DEFAULTS, TASKS, jobs_of
from experiment.arguments import parse
from experiment.identity import identified
from models import FAMILIES
from tasks.code import EXTRACTIONS
from tasks.protocols import protocol

TINY = {"llada-base": LLADA, "dream-base": DREAM}


def cell(name: str, alias: str, task: str):
    family = FAMILIES[MODEL_DEFAULTS[alias]["family"]]
    return protocol(name, alias, MODEL_DEFAULTS, TASKS[task], family)


@pytest.fixture
def asked(tmp_path):
    """alias, task -> the arguments of a small run on a tiny checkpoint of the family."""
    data = gsm8k_dir(tmp_path / "data", 12)
    train = data / "gsm8k" / "train.jsonl"
    train.write_text(train.read_text().replace("Tom", "Ann"))

    def arguments(alias: str) -> str:
        return (
            f"--model_alias {alias} --{alias.replace('-', '_')}_ckpt {TINY[alias]} --task gsm8k "
            f"--data_dir {data} --dtype float32 --device cpu --output_dir {tmp_path / 'out'}"
        )

    return arguments


@pytest.mark.parametrize(
    "alias, task, form, shots, canvas, sampling, score",
    [
        ("llada-base", "gsm8k", "lm_eval", 5, 1024, ("low_confidence", 0.0, None), 70.3),
        ("llada-base", "humaneval", "lm_eval", 0, 1024, ("low_confidence", 0.0, None), 35.4),
        ("llada-base", "mbpp", "lm_eval", 3, 1024, ("low_confidence", 0.0, None), 40.0),
        ("llada-base", "minerva_math", "lm_eval", 4, 1024, ("low_confidence", 0.0, None), 31.4),
        ("llada-base", "bbh", "lm_eval", 3, 1024, ("low_confidence", 0.0, None), 49.7),
        ("dream-base", "gsm8k", "lm_eval_cot", 8, 256, ("entropy", 0.0, None), 77.2),
        ("dream-base", "humaneval", "whole", 0, 512, ("entropy", 0.2, 0.95), 57.9),
        ("dream-base", "mbpp", "lm_eval", 3, 512, ("entropy", 0.2, 0.9), 56.2),
        ("dream-base", "minerva_math", "lm_eval", 4, 512, ("entropy", 0.0, None), 39.6),
        ("dream-base", "bbh", "lm_eval", 3, 512, ("entropy", 0.0, None), 57.9),
    ],
)
def test_official_generation(alias, task, form, shots, canvas, sampling, score):
    p = cell("official", alias, task)
    assert (p.form, p.num_fewshot, p.gen_length) == (form, shots, canvas)
    assert p.block_length == (canvas if alias == "llada-base" else None)
    assert (p.algorithm, p.temperature, p.top_p) == sampling
    assert (p.chat_template, p.start_token) == (False, alias == "dream-base")
    assert [r["score"] for r in p.references] == [score]


@pytest.mark.parametrize(
    "alias, task, form, shots, mc_num, cfg_scale, score",
    [
        ("llada-base", "arc_challenge", "lm_eval", 0, 128, 0.5, 47.9),
        ("llada-base", "hellaswag", "lm_eval", 0, 128, 0.5, 72.5),
        ("llada-base", "truthfulqa_mc2", "lm_eval", 0, 128, 2.0, 46.4),
        ("llada-base", "winogrande", "lm_eval", 5, 128, None, 74.8),
        ("llada-base", "gpqa", "n_shot", 5, 128, 0.5, 26.1),
        ("llada-base", "piqa", "lm_eval", 0, 128, 0.5, 74.4),
        ("llada-base", "mmlu", "lm_eval", 5, 1, None, 65.9),
        ("dream-base", "mmlu", "lm_eval", 5, 128, None, 69.5),
        ("dream-base", "arc_easy", "lm_eval", 0, 128, None, 83.9),
        ("dream-base", "arc_challenge", "lm_eval", 0, 128, None, 59.9),
        ("dream-base", "hellaswag", "lm_eval", 0, 128, None, 73.3),
        ("dream-base", "piqa", "lm_eval", 0, 128, None, 75.8),
        ("dream-base", "gpqa", "n_shot", 5, 128, None, 36.6),
        ("dream-base", "winogrande", "lm_eval", 5, 128, None, 74.8),
    ],
)
def test_official_likelihoods(alias, task, form, shots, mc_num, cfg_scale, score):
    p = cell("official", alias, task)
    assert (p.form, p.num_fewshot, p.chat_template) == (form, shots, False)
    assert (p.estimator, p.mc_num, p.cfg_scale) == (None, mc_num, cfg_scale)
    assert [r["score"] for r in p.references] == [score]


def test_what_a_command_makes_of_an_official_cell(run):
    code, out, _ = run("--model_alias llada-base --task hellaswag --protocol official --dry_run")
    assert code == 0 and "published: 72.5 % (acc_norm,none, ML-GSAI/LLaDA EVAL.md (lm-eval))" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"estimator llada_mc", "mc_num 128", "cfg_scale 0.5", "official True"} <= lines
    words = "--model_alias llada-base --task hellaswag --protocol official --cfg_scale 0 --dry_run"
    assert "not compared with the published score" in run(words)[1]


def test_every_other_setting_of_uniform_is_that_of_the_other_models():
    for alias, other in (("llada-base", "tiny-llada"), ("dream-base", "dream")):
        models = MODEL_DEFAULTS | {other: {"family": MODEL_DEFAULTS[other]["family"]}}
        for task, spec in TASKS.items():
            p, family = cell("uniform", alias, task), FAMILIES[MODEL_DEFAULTS[alias]["family"]]
            q = protocol("uniform", other, models, spec, family)
            for name in ("gen_length", "block_length", "algorithm", "temperature", "system"):
                assert getattr(p, name) == getattr(q, name)
            examples = "lm_eval" in spec.forms and spec.kind != "choice"
            assert p.form == ("lm_eval" if examples else q.form)
            assert p.num_fewshot == (spec.forms["lm_eval"].num_fewshot if examples else 0)
            assert not p.chat_template and not p.confidence_eos_eot_inf and not p.logits_eos_inf


@pytest.mark.parametrize("alias, start", [("llada-base", ""), ("dream-base", "<|beginoftext|>")])
def test_a_prompt_is_lm_evals_text_with_its_examples(run, asked, alias, start):
    code, out, _ = run(asked(alias), "--show_prompt")
    assert code == 0
    prompt, _, told = out.partition("\n" + "-" * 80)
    assert prompt.startswith(f"{start}Question: Ann has ")
    assert prompt.count("Question:") == 6 and prompt.count("\n#### ") == 5
    assert prompt.endswith("\n\nQuestion: Tom has 0 apples and buys 2. How many?\nAnswer:")
    assert "<|" not in prompt[len(start) :]
    assert "stop strings: 'Question:'" in told


def test_dreams_start_token_is_one_token(run, asked):
    """As text that is split into letters it would be noise."""

    def tokens(alias_arguments: str, *more: str) -> int:
        told = run(alias_arguments, "--show_prompt", *more)[1]
        return int(told.partition(" tokens and a canvas")[0].rpartition(" ")[2])

    plain = asked("dream-base").replace("dream-base", "dream").replace("dream_base", "dream")
    other = tokens(plain, "--no_chat_template", "--num_fewshot", "5")
    assert tokens(asked("dream-base")) == other + 1


def test_a_start_token_is_part_of_both_ids():
    """One checkpoint, one form, two aliases: the prompts differ in the start token alone."""
    data = f"--data_dir {ROOT / 'assets' / 'benchmarks'} --task lines --no_chat_template"

    def ids(alias: str) -> tuple[str, str]:
        words = f"--model_alias {alias} --{alias.replace('-', '_')}_ckpt {DREAM} {data}"
        (job,) = jobs_of(*parse(words.split(), MODEL_DEFAULTS, TASKS))
        config = identified(job).config
        return config.generation_id, config.result_id

    assert not set(ids("dream")) & set(ids("dream-base"))


def test_a_checkpoint_without_a_start_token_is_refused(run, asked, dream):
    path = dream / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"bos_token": None}))
    code, _, err = run(asked("dream-base").replace(str(DREAM), str(dream)), "--show_prompt")
    assert code == 4 and "has no start token" in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("alias", TINY)
def test_a_run(run, asked, tmp_path, alias):
    words = f"{asked(alias)} --limit 2 --gen_length 4 --block_length 4"
    code, _, err = run(words)
    assert code == 0, err
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert result["config"]["chat_template"] is False and result["config"]["num_fewshot"] == 5
    assert [s["status"] for s in result["samples"]] == ["ok", "ok"]


def test_lm_eval_extracts_nothing():
    code = EXTRACTIONS["lm_eval"]
    answer = "    return x\n```\n"
    assert code({"prompt": "def f(x):\n", "entry_point": "f"}, answer) == f"def f(x):\n{answer}"
    assert code({"test_list": ["assert f(1)"]}, answer) == answer
