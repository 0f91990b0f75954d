"""How each model is asked each benchmark: one table for comparing models, one for reproducing their authors.

`uniform`: the same prompt form, canvas and rule for all models, temperature 0, no examples.
`official`: per model and task what its authors report with; only its results belong beside a published score.
    Where an official prompt's worked examples are not part of lm-eval, lm-eval's own stand in, and the
    references' "settings" say so. No official protocol exists for TruthfulQA in generation, nor for DiffuCoder
    on GSM8K and on MBPP's 500 tasks: those entries are this project's choice and have no references.

Sources: LLaDA EVAL.md and its OpenCompass configurations; Dream eval_instruct/eval.sh; the DiffuCoder paper,
README and issue 10; Fast-dLLM Table 1 and Figure 5. Only the standard library is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PROTOCOLS = ("uniform", "official")
PREFIX = "lm_eval:"  # any other task that lm-eval has installed
TASKS = ("humaneval", "mbpp", "gsm8k", "truthfulqa")
FAMILY = {"llada": "llada", "llada1.5": "llada", "dream": "dream", "diffucoder": "dream"}
TINY = {
    "tiny-llada": "llada",
    "tiny-dream": "dream",
}  # embedded checkpoints, trained for the canvas and prompts below
FAMILY |= TINY


@dataclass(frozen=True)
class Protocol:
    """One cell of the table: everything about a run that is neither the model nor the number of steps.

    form: key of the task's prompt forms.
    system: a system prompt, None for what the checkpoint's template does by itself (Dream's and DiffuCoder's
    insert "You are a helpful assistant.", LLaDA's nothing).
    gen_length: the canvas, in tokens; block_length: None is the whole canvas.
    references: the published scores of this very protocol, one for each number of tokens per step that has one:
        {"score": percent, "metric", "tokens_per_step", "source", "settings"}.
    """

    name: str
    form: str
    num_fewshot: int
    chat_template: bool
    system: str | None
    gen_length: int
    block_length: int | None
    algorithm: str
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    references: tuple[dict, ...] = ()


def protocol(name: str, alias: str, task: str) -> Protocol:
    """The table's cell. Raises ValueError for an unknown protocol, model or task, listing what there is."""
    for what, value, known in (
        ("protocol", name, PROTOCOLS),
        ("model alias", alias, tuple(FAMILY)),
        ("task", task, TASKS),
    ):
        if value not in known and not (what == "task" and value.startswith(PREFIX)):
            raise ValueError(f"unknown {what} {value!r}; there are: {', '.join(known)}")
    if task.startswith(PREFIX):
        sampling = SAMPLING.get(alias, {}) if name == "official" else {}
        return replace(_uniform(alias, task), name=name, form="lm_eval", **sampling)
    if alias in TINY:  # their authors' protocol is this project's own
        return replace(_uniform(alias, task), name=name)
    return _uniform(alias, task) if name == "uniform" else _official(alias, task)


# ---------------------------------------------------------------- uniform

OTHER_CANVAS = 256  # of any other task of lm-eval's
CANVAS = {"humaneval": 512, "mbpp": 512, "gsm8k": 256, "truthfulqa": 128}
TINY_CANVAS, TINY_BLOCK = 24, 8  # every answer of the mini benchmarks fits


def _flags(alias: str, task: str) -> dict[str, bool]:
    """End-token flags of the models that have them: what their authors set, also under `uniform`."""
    if (
        FAMILY[alias] != "llada"
        or alias in TINY
        or (alias, task) == ("llada", "gsm8k")
        or task.startswith(PREFIX)
    ):
        return {}
    if (alias, task) == ("llada", "humaneval"):
        return {"logits_eos_inf": True}
    return {"confidence_eos_eot_inf": True}


def _uniform(alias: str, task: str) -> Protocol:
    llada = FAMILY[alias] == "llada"
    return Protocol(
        name="uniform",
        form="chat",
        num_fewshot=0,
        chat_template=True,
        system=None,
        gen_length=TINY_CANVAS if alias in TINY else CANVAS.get(task, OTHER_CANVAS),
        block_length=(TINY_BLOCK if alias in TINY else 32) if llada else None,
        algorithm="low_confidence" if llada else "maskgit_plus",
        temperature=0.0,
        **_flags(alias, task),
    )


# ---------------------------------------------------------------- official

# alias -> task -> (form, examples, canvas, block)
OFFICIAL = {
    "llada": {
        "gsm8k": ("lm_eval", 5, 256, 32),
        "humaneval": ("opencompass", 0, 512, 512),
        "mbpp": ("opencompass", 3, 256, 256),
        "truthfulqa": ("chat", 0, 128, 32),
    },
    "llada1.5": {
        "gsm8k": ("lm_eval", 5, 256, 16),
        "humaneval": ("opencompass", 0, 512, 32),
        "mbpp": ("opencompass", 3, 512, 32),
        "truthfulqa": ("chat", 0, 128, 32),
    },
    "dream": {
        "gsm8k": ("cot", 0, 256, None),
        "humaneval": ("instruct", 0, 768, None),
        "mbpp": ("instruct", 0, 1024, None),
        "truthfulqa": ("chat", 0, 128, None),
    },
    "diffucoder": {
        "gsm8k": ("cot", 0, 256, None),
        "humaneval": ("instruct", 0, 512, None),
        "mbpp": ("instruct", 0, 512, None),
        "truthfulqa": ("chat", 0, 128, None),
    },
}

SAMPLING = {
    "llada": {"algorithm": "low_confidence", "temperature": 0.0},
    "llada1.5": {"algorithm": "low_confidence", "temperature": 0.0},
    "dream": {"algorithm": "entropy", "temperature": 0.1, "top_p": 0.9, "alg_temp": 0.0},
    # the authors' examples use 0.2 to 0.4 and do not say which one the paper's table is from; 0.2 is likelier
    "diffucoder": {"algorithm": "entropy", "temperature": 0.2, "top_p": 0.95, "alg_temp": 0.0},
}

FLEXIBLE, PASS = "exact_match,flexible-extract", "pass@1,create_test"
_LLADA_EVAL = "ML-GSAI/LLaDA EVAL.md (OpenCompass)"
_DREAM_EVAL = "Dream paper; DreamLM/Dream eval_instruct/eval.sh"

# (alias, task) -> (tokens per step -> score in percent, metric, source, settings)
REFERENCES = {
    ("llada", "gsm8k"): (
        {1: 79.3, 2: 74.8, 4: 66.5, 8: 30.7},
        FLEXIBLE,
        "Fast-dLLM (arXiv:2505.22618) Table 1; above 1 token per step read from its Figure 5",
        "lm-eval gsm8k, 5 examples in one user turn, canvas 256, block 32. OpenCompass's 4-example turns with block 8:"
        " 78.9 (EVAL.md)",
    ),
    ("llada", "humaneval"): (
        {1: 47.0},
        PASS,
        _LLADA_EVAL,
        "canvas and block 512, logits_eos_inf; 49.4 with the authors' internal library",
    ),
    ("llada", "mbpp"): (
        {1: 39.6},
        PASS,
        _LLADA_EVAL,
        "3 examples as turns, canvas and block 256, confidence_eos_eot_inf; 41.0 with the internal library",
    ),
    ("llada1.5", "gsm8k"): (
        {1: 83.6},
        FLEXIBLE,
        _LLADA_EVAL,
        "canvas 256, block 16, confidence_eos_eot_inf; published with OpenCompass's 4-example turns, here lm-eval's"
        " 5 examples in one turn; 83.8 with the internal library",
    ),
    ("llada1.5", "humaneval"): (
        {1: 51.2},
        PASS,
        _LLADA_EVAL,
        "canvas 512, block 32, confidence_eos_eot_inf; 52.4 with the internal library",
    ),
    ("llada1.5", "mbpp"): (
        {1: 42.6},
        PASS,
        _LLADA_EVAL,
        "3 examples as turns, canvas 512, block 32, confidence_eos_eot_inf; 42.8 with the internal library",
    ),
    ("dream", "gsm8k"): (
        {1: 81.0},
        FLEXIBLE,
        _DREAM_EVAL,
        "gsm8k_cot without examples, canvas 256, temperature 0.1, top_p 0.9; dllm: 82.0",
    ),
    ("dream", "humaneval"): (
        {1: 55.5},
        PASS,
        _DREAM_EVAL,
        "humaneval_instruct v2, canvas 768, temperature 0.1, top_p 0.9; dllm: 57.9",
    ),
    ("dream", "mbpp"): (
        {1: 58.8},
        PASS,
        _DREAM_EVAL,
        "mbpp_instruct, canvas 1024, temperature 0.1, top_p 0.9; dllm: 58.2",
    ),
    ("diffucoder", "humaneval"): (
        {1: 73.2},
        PASS,
        "DiffuCoder paper (arXiv:2506.20639)",
        "EvalPlus's harness with HumanEval's own tests, canvas 512; prompt and temperature not published",
    ),
}


def _official(alias: str, task: str) -> Protocol:
    form, num_fewshot, gen_length, block_length = OFFICIAL[alias][task]
    scores, metric, source, settings = REFERENCES.get((alias, task), ({}, "", "", ""))
    return Protocol(
        name="official",
        form=form,
        num_fewshot=num_fewshot,
        chat_template=True,
        system=None,
        gen_length=gen_length,
        block_length=block_length,
        references=tuple(
            {
                "score": score,
                "metric": metric,
                "tokens_per_step": k,
                "source": source,
                "settings": settings,
            }
            for k, score in scores.items()
        ),
        **SAMPLING[alias],
        **_flags(alias, task),
    )
