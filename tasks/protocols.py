"""Protocols: one rule for comparing models, one table for reproducing their authors' scores.

`uniform`: the same prompt form, canvas, blocks and rule for all models, temperature 0, no examples;
    the checkpoint's chat template, but none where likelihoods are compared, as in lm-eval.
    The cells under "uniform" in an alias's MODEL_DEFAULTS entry are its exceptions. A base model
    is asked without a chat template, in lm-eval's own words, examples and stop strings: it cannot
    be asked to reply, only shown how.
`official`: the settings of the model's authors, task by task: the cells under "official" in its
    entry. An alias without a cell for a task has no official protocol there. Official results are
    comparable with the authors' scores. Where the worked examples of an official prompt are not
    part of lm-eval, lm-eval's own replace them, and the references' "settings" say so. Nothing
    official exists for TruthfulQA in generation, nor for DiffuCoder on GSM8K and on MBPP's 500
    tasks: those cells are this project's choice and have no references.
`fast_dllm`: the settings of Fast-dLLM's evaluation code, with which others measured speeds: the
    cells under "fast_dllm". Their references have a speed, and the method that it is of.

A cell is a dict of fields of Protocol. The cells below are those of the models in MODEL_DEFAULTS
(eval.py). Sources: LLaDA EVAL.md, its OpenCompass configurations and eval_llada_lm_eval.sh; Dream
eval_instruct/eval.sh, eval/eval_dream_gen.sh and eval_dream_mc.sh; the DiffuCoder paper, README and
issue 10; Fast-dLLM Table 1 and Figure 5; the evaluation scripts of DSB and DAWN. Only the standard
library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import UsageError

if TYPE_CHECKING:
    from tasks.base import TaskSpec

# name -> revision. It rises where the meaning of a protocol changes; results of two revisions share
# no curve. Revision 2 of uniform: Dream's family decodes in blocks too, and adaptive rules read the
# model's own probability. Revision 2 of official: programs are found by the authors' extraction.
PROTOCOLS = {"uniform": 2, "official": 2, "fast_dllm": 1}
PREFIX = "lm_eval:"  # any other task that lm-eval has installed
ANY = "*"  # a cell for every task that has none of its own
Cells = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """One cell of the table: all settings of a run except the model and the number of steps.

    revision: see PROTOCOLS.
    form: key of the task's prompt forms.
    system: a system prompt; None leaves it to the checkpoint's template (Dream's and DiffuCoder's
        insert "You are a helpful assistant.", LLaDA's nothing).
    start_token: the prompt begins with the tokenizer's start token. A chat template writes its own.
    gen_length: the canvas, in tokens.
    block_length: for an algorithm that goes in blocks by default; None is the whole canvas.
    extraction: the authors' way to find the program in an answer, a key of tasks.code.EXTRACTIONS;
        None is this project's.
    estimator, mc_num, cfg_scale: of a benchmark that is scored by likelihood, see
        decoding.likelihood.LikelihoodConfig; None is the family's own, its default and no guidance.
    references: the published scores of this very protocol, one for each number of tokens per step
        that has one: {"score": percent, "metric", "tokens_per_step", "source", "settings"}. Those
        of a speed have also "tokens_per_second", "device" and "method": name -> value of the
        settings that depart from the protocol.
        Of a benchmark that is scored by likelihood tokens_per_step is None.
    """

    name: str
    revision: int
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
    extraction: str | None = None
    estimator: str | None = None
    mc_num: int | None = None
    cfg_scale: float | None = None
    start_token: bool = False
    references: tuple[dict, ...] = ()


def protocol(
    name: str, alias: str, models: Mapping[str, Mapping], spec: TaskSpec, family
) -> Protocol:
    """The protocol of this name for an alias of `models` and a benchmark.

    family: the model family's defaults, models.Family: `.algorithm` and `.blocks`.
    Raises UsageError for any but `uniform` where the alias has no cell for the benchmark.
    """
    uniform: dict[str, Any] = {
        "form": spec.default_form,
        # a task of lm-eval's own keeps its number
        "num_fewshot": spec.forms[spec.default_form].num_fewshot if spec.foreign else 0,
        "chat_template": spec.kind != "choice",
        "system": None,
        "gen_length": spec.gen_length,
        "block_length": family.blocks,
        "algorithm": family.algorithm,
        "temperature": 0.0,
    }
    cells = models[alias].get(name, {})
    cell = cells.get(spec.name, cells.get(ANY))
    if name != "uniform" and cell is None:
        raise UsageError(_no_cell(name, alias, spec.name, models))
    return Protocol(name=name, revision=PROTOCOLS[name], **uniform | dict(cell or {}))


def _no_cell(name: str, alias: str, task: str, models: Mapping[str, Mapping]) -> str:
    having = [a for a, entry in models.items() if {task, ANY} & entry.get(name, {}).keys()]
    own = list(models[alias].get(name, {}))
    has = f"aliases with one for {task}: {', '.join(having) or 'none'}"
    has += f"; {alias} has one for: {', '.join(own)}" if own else ""
    return f"--protocol {name}: {alias} has no {name} protocol for {task}; {has}"


# ---------------------------------------------------------------- the cells of MODEL_DEFAULTS

FLEXIBLE, PASS = "exact_match,flexible-extract", "pass@1,create_test"
NO_EOS: dict[str, Any] = {"logits_eos_inf": True}
END_LAST: dict[str, Any] = {"confidence_eos_eot_inf": True}
_LLADA_EVAL = "ML-GSAI/LLaDA EVAL.md (OpenCompass)"
_DREAM_EVAL = "Dream paper; DreamLM/Dream eval_instruct/eval.sh"
_LLADA_BASE_EVAL = "ML-GSAI/LLaDA EVAL.md (lm-eval)"
_DREAM_BASE_EVAL = "Dream paper (arXiv:2508.15487); DreamLM/Dream eval/eval.py"
_GREEDY = {"algorithm": "low_confidence", "temperature": 0.0}
_DREAM = {"algorithm": "entropy", "temperature": 0.1, "top_p": 0.9, "alg_temp": 0.0}
# the authors' examples use temperatures of 0.2 to 0.4; the paper does not give that of its table,
# 0.2 is likelier
_DIFFUCODER = {"algorithm": "entropy", "temperature": 0.2, "top_p": 0.95, "alg_temp": 0.0}


def _cell(
    form: str,
    gen_length: int,
    block_length: int | None = None,
    *more: dict,
    num_fewshot: int = 0,
    **fields: Any,
):
    cell = {
        "form": form,
        "num_fewshot": num_fewshot,
        "gen_length": gen_length,
        "block_length": block_length,
    }
    if form == "opencompass":
        cell["extraction"] = form
    for part in more:
        cell |= part
    return cell | fields


def _published(
    scores: float | dict[int | None, float], metric: str, source: str, settings: str
) -> dict[str, Any]:
    """The field `references` of a cell.

    scores: percent by tokens per step; a single number is the score at one token per step.
    """
    by_k = scores if isinstance(scores, dict) else {1: scores}
    common = {"metric": metric, "source": source, "settings": settings}
    return {
        "references": tuple(
            {"score": score, "tokens_per_step": k} | common for k, score in by_k.items()
        )
    }


# end-token flags are what the authors set, also under `uniform`
LLADA_UNIFORM: Cells = {"humaneval": NO_EOS, "mbpp": END_LAST, "truthfulqa": END_LAST}
LLADA15_UNIFORM: Cells = dict.fromkeys(("humaneval", "mbpp", "gsm8k", "truthfulqa"), END_LAST)
# embedded checkpoints: every answer of the mini benchmarks fits into 24 tokens
TINY_UNIFORM: Cells = {ANY: {"gen_length": 24, "block_length": 8}}

LLADA_OFFICIAL: Cells = {
    "gsm8k": _cell(
        "lm_eval",
        256,
        32,
        _GREEDY,
        _published(
            {1: 79.3, 2: 74.8, 4: 66.5, 8: 30.7},
            FLEXIBLE,
            "Fast-dLLM (arXiv:2505.22618) Table 1; above 1 token per step read from its Figure 5",
            "lm-eval gsm8k, 5 examples in one user turn, canvas 256, block 32. "
            "OpenCompass's 4-example turns with block 8: 78.9 (EVAL.md)",
        ),
        num_fewshot=5,
    ),
    "humaneval": _cell(
        "opencompass",
        512,
        512,
        _GREEDY,
        NO_EOS,
        _published(
            47.0,
            PASS,
            _LLADA_EVAL,
            "canvas and block 512, logits_eos_inf; 49.4 with the authors' internal library",
        ),
    ),
    "mbpp": _cell(
        "opencompass",
        256,
        256,
        _GREEDY,
        END_LAST,
        _published(
            39.6,
            PASS,
            _LLADA_EVAL,
            "3 examples as turns, canvas and block 256, confidence_eos_eot_inf; "
            "41.0 with the internal library",
        ),
        num_fewshot=3,
    ),
    "truthfulqa": _cell("chat", 128, 32, _GREEDY, END_LAST),
}
LLADA15_OFFICIAL: Cells = {
    "gsm8k": _cell(
        "lm_eval",
        256,
        16,
        _GREEDY,
        END_LAST,
        _published(
            83.6,
            FLEXIBLE,
            _LLADA_EVAL,
            "canvas 256, block 16, confidence_eos_eot_inf; published with OpenCompass's 4-example "
            "turns, here lm-eval's 5 examples in one turn; 83.8 with the internal library",
        ),
        num_fewshot=5,
    ),
    "humaneval": _cell(
        "opencompass",
        512,
        32,
        _GREEDY,
        END_LAST,
        _published(
            51.2,
            PASS,
            _LLADA_EVAL,
            "canvas 512, block 32, confidence_eos_eot_inf; 52.4 with the internal library",
        ),
    ),
    "mbpp": _cell(
        "opencompass",
        512,
        32,
        _GREEDY,
        END_LAST,
        _published(
            42.6,
            PASS,
            _LLADA_EVAL,
            "3 examples as turns, canvas 512, block 32, confidence_eos_eot_inf; "
            "42.8 with the internal library",
        ),
        num_fewshot=3,
    ),
    "truthfulqa": _cell("chat", 128, 32, _GREEDY, END_LAST),
}
DREAM_OFFICIAL: Cells = {
    "gsm8k": _cell(
        "cot",
        256,
        None,
        _DREAM,
        _published(
            81.0,
            FLEXIBLE,
            _DREAM_EVAL,
            "gsm8k_cot without examples, canvas 256, temperature 0.1, top_p 0.9; dllm: 82.0",
        ),
    ),
    "humaneval": _cell(
        "instruct",
        768,
        None,
        _DREAM,
        _published(
            55.5,
            PASS,
            _DREAM_EVAL,
            "humaneval_instruct v2, canvas 768, temperature 0.1, top_p 0.9; dllm: 57.9",
        ),
        extraction="evalplus",
    ),
    "mbpp": _cell(
        "instruct",
        1024,
        None,
        _DREAM,
        _published(
            58.8,
            PASS,
            _DREAM_EVAL,
            "mbpp_instruct, canvas 1024, temperature 0.1, top_p 0.9; dllm: 58.2",
        ),
        extraction="verbatim",
    ),
    "truthfulqa": _cell("chat", 128, None, _DREAM),
}
DIFFUCODER_OFFICIAL: Cells = {
    "gsm8k": _cell("cot", 256, None, _DIFFUCODER),
    "humaneval": _cell(
        "instruct",
        512,
        None,
        _DIFFUCODER,
        _published(
            73.2,
            PASS,
            "DiffuCoder paper (arXiv:2506.20639)",
            "EvalPlus's harness with HumanEval's own tests, canvas 512; "
            "prompt and temperature not published",
        ),
        extraction="evalplus",
    ),
    "mbpp": _cell("instruct", 512, None, _DIFFUCODER),
    "truthfulqa": _cell("chat", 128, None, _DIFFUCODER),
}

# ---------------------------------------------------------------- base models

_NO_CHAT = {"chat_template": False}
_STARTED = _NO_CHAT | {"start_token": True}  # add_bos_token=true in all of Dream's scripts
_DREAM_BASE = _STARTED | {"algorithm": "entropy", "alg_temp": 0.0, "temperature": 0.0}
_EXAMPLES = {
    "gsm8k": 5,
    "humaneval": 0,
    "humaneval_plus": 0,
    "mbpp": 3,
    "mbpp_plus": 3,
    "math500": 4,
    "minerva_math": 4,
    "bbh": 3,
    "truthfulqa": 0,  # its prompt has six
}


def _base_uniform(settings: dict) -> Cells:
    """lm-eval's own prompt and number of examples for each benchmark that has the form."""
    few = {t: {"form": "lm_eval", "num_fewshot": n} | settings for t, n in _EXAMPLES.items()}
    return few | {ANY: settings}


def _likelihood(
    score: float,
    metric: str,
    source: str,
    settings: str,
    num_fewshot: int = 0,
    form: str = "lm_eval",
    **fields: Any,
) -> dict:
    """A cell of a benchmark that is scored by likelihood."""
    reference = _published({None: score}, metric, source, settings)
    return {"form": form, "num_fewshot": num_fewshot, "mc_num": 128} | reference | fields


ACC, ACC_NORM = "acc,none", "acc_norm,none"
_METRIC = "which of lm-eval's metrics is not said"
LLADA_BASE_UNIFORM, DREAM_BASE_UNIFORM = _base_uniform(_NO_CHAT), _base_uniform(_STARTED)
LLADA_BASE_OFFICIAL: Cells = {
    task: _cell(
        "lm_eval",
        1024,
        1024,
        _GREEDY,
        _NO_CHAT,
        _published(score, metric, _LLADA_BASE_EVAL, f"lm-eval {name}, canvas and block 1024{more}"),
        num_fewshot=_EXAMPLES[task],
        **fields,
    )
    for task, score, metric, name, more, fields in (
        ("gsm8k", 70.3, FLEXIBLE, "gsm8k, 5 examples", "; which filter is not said", {}),
        ("humaneval", 35.4, PASS, "humaneval", "", {"extraction": "lm_eval"}),
        ("mbpp", 40.0, PASS, "mbpp, 3 examples", "", {"extraction": "lm_eval"}),
        ("minerva_math", 31.4, "exact_match,none", "minerva_math, 4 examples", "", {}),
        ("bbh", 49.7, "exact_match,get-answer", "bbh, 3 examples", "", {}),
    )
} | {
    "arc_challenge": _likelihood(
        47.9, ACC_NORM, _LLADA_BASE_EVAL, f"without guidance 45.9; {_METRIC}", cfg_scale=0.5
    ),
    "hellaswag": _likelihood(
        72.5, ACC_NORM, _LLADA_BASE_EVAL, f"without guidance 70.5; {_METRIC}", cfg_scale=0.5
    ),
    "truthfulqa_mc2": _likelihood(
        46.4, ACC, _LLADA_BASE_EVAL, "without guidance 46.1", cfg_scale=2.0
    ),
    "winogrande": _likelihood(74.8, ACC, _LLADA_BASE_EVAL, "5 examples", 5),
    "gpqa": _likelihood(
        26.1,
        ACC,
        _LLADA_BASE_EVAL,
        "gpqa_main_n_shot, 5 examples; without guidance 25.2",
        5,
        "n_shot",
        cfg_scale=0.5,
    ),
    "piqa": _likelihood(
        74.4, ACC_NORM, _LLADA_BASE_EVAL, f"without guidance 73.6; {_METRIC}", cfg_scale=0.5
    ),
    "mmlu": _likelihood(65.9, ACC, _LLADA_BASE_EVAL, "5 examples, 1 draw", 5, mc_num=1),
}
_DREAM_CODE = {"temperature": 0.2}
DREAM_BASE_OFFICIAL: Cells = {
    "gsm8k": _cell(
        "lm_eval_cot",
        256,
        None,
        _DREAM_BASE,
        _published(
            77.2,
            FLEXIBLE,
            _DREAM_BASE_EVAL,
            "gsm8k_cot, 8 examples, canvas 256; which filter is not said; dllm: 77.0",
        ),
        num_fewshot=8,
    ),
    "humaneval": _cell(
        "whole",
        512,
        None,
        _DREAM_BASE,
        _DREAM_CODE,
        _published(
            57.9,
            PASS,
            _DREAM_BASE_EVAL,
            "humaneval without stop strings, canvas 512, temperature 0.2, top_p 0.95; dllm: 56.7",
        ),
        top_p=0.95,
        extraction="evalplus",
    ),
    "mbpp": _cell(
        "lm_eval",
        512,
        None,
        _DREAM_BASE,
        _DREAM_CODE,
        _published(
            56.2,
            PASS,
            _DREAM_BASE_EVAL,
            "mbpp, 3 examples, canvas 512, temperature 0.2, top_p 0.9; dllm: 56.0",
        ),
        num_fewshot=3,
        top_p=0.9,
        extraction="lm_eval",
    ),
    "minerva_math": _cell(
        "lm_eval",
        512,
        None,
        _DREAM_BASE,
        _published(
            39.6,
            "exact_match,none",
            _DREAM_BASE_EVAL,
            "minerva_math, 4 examples, canvas 512; dllm: 42.4",
        ),
        num_fewshot=4,
    ),
    "bbh": _cell(
        "lm_eval",
        512,
        None,
        _DREAM_BASE,
        _published(
            57.9,
            "exact_match,get-answer",
            _DREAM_BASE_EVAL,
            "bbh, 3 examples, canvas 512; dllm: 63.7",
        ),
        num_fewshot=3,
    ),
} | {
    task: _likelihood(score, metric, _DREAM_BASE_EVAL, settings, *more)
    for task, score, metric, settings, *more in (
        ("mmlu", 69.5, ACC, "5 examples; dllm: 70.0", 5),
        ("arc_easy", 83.9, ACC, f"{_METRIC}; dllm: 83.8"),
        ("arc_challenge", 59.9, ACC_NORM, f"{_METRIC}; dllm: 59.0"),
        ("hellaswag", 73.3, ACC_NORM, f"{_METRIC}; dllm: 73.5"),
        ("piqa", 75.8, ACC_NORM, f"{_METRIC}; dllm: 76.4"),
        ("gpqa", 36.6, ACC, "gpqa_main_n_shot, 5 examples; dllm: 34.6", 5, "n_shot"),
        ("winogrande", 74.8, ACC, "5 examples; dllm: 72.5", 5),
    )
}

# ---------------------------------------------------------------- published speeds

# method -> what it changes; the plain one commits one token per step
_THRESHOLD, _DREAM_THRESHOLD = {"algorithm": "threshold"}, {"algorithm": "confidence_threshold"}
_DUAL = {"kv_cache": "dual"}
# the defaults of generate_klass in DAWN's llada/generate.py
_KLASS = {"algorithm": "klass", "threshold": 0.6, "kl_threshold": 0.015}
_ONE = "one sample at a time, canvas 256, blocks of 32, thresholds of 0.9"
_TEXT = f"{_ONE}; tok/s counts the tokens of the answer's text"
_CANVAS = f"{_ONE}; tok/s counts all tokens of the canvas that are no <|endoftext|>"


def _speeds(
    source: str, device: str, metric: str, settings: str, *rows: tuple[dict, float, float]
) -> tuple[dict, ...]:
    """References with a speed. rows: method, score in percent and tok/s, at 1 token per step."""
    common = {"tokens_per_step": 1, "metric": metric, "source": source}
    common |= {"settings": settings, "device": device}
    return tuple(
        {"score": score, "method": method, "tokens_per_second": speed} | common
        for method, score, speed in rows
    )


def _fast_dllm(task: str, *references: tuple[dict, ...], **fields: Any) -> dict[str, Any]:
    """A cell of Fast-dLLM's evaluation: lm-eval's own prompts, 5 examples for GSM8K."""
    cell = {"num_fewshot": 5 if task == "gsm8k" else 0, "form": "lm_eval"} | fields
    return _cell(cell.pop("form"), 256, 32, references=sum(references, ()), **cell)


# their code asks LLaDA-1.5 without the chat template, for its path has no "instruct"
_PLAIN = f"{_TEXT}; no chat template"
_DREAM_PLAIN = f"{_CANVAS}; no chat template, a start token first, which is left out here"
_DSB, _DAWN = ("DSB (lizhuo008/DSB)", "H200"), ("DAWN (lizhuo-luo/DAWN)", "H100-80G")
LLADA_FAST_DLLM: Cells = {
    "gsm8k": _fast_dllm(
        "gsm8k",
        _speeds(
            *_DSB,
            FLEXIBLE,
            _TEXT,
            ({}, 77.79, 14.9),
            (_THRESHOLD, 77.26, 48.7),
            (_THRESHOLD | _DUAL, 77.40, 92.3),
        ),
        _speeds(
            *_DAWN,
            FLEXIBLE,
            _TEXT,
            ({}, 77.94, 10.3),
            (_THRESHOLD, 78.39, 33.4),
            (_KLASS, 76.12, 23.2),
        ),
    ),
    "humaneval": _fast_dllm(
        "humaneval",
        _speeds(
            *_DSB,
            PASS,
            _CANVAS,
            ({}, 40.24, 36.2),
            (_THRESHOLD, 40.85, 119.1),
            (_THRESHOLD | _DUAL, 37.80, 100.6),
        ),
        form="whole",
        extraction="evalplus",
    ),
}
LLADA15_FAST_DLLM: Cells = {
    "gsm8k": _fast_dllm(
        "gsm8k",
        _speeds(
            *_DSB,
            FLEXIBLE,
            _PLAIN,
            ({}, 80.52, 14.1),
            (_THRESHOLD, 80.14, 49.6),
            (_THRESHOLD | _DUAL, 80.82, 86.4),
        ),
        chat_template=False,
    ),
}
DREAM_FAST_DLLM: Cells = {
    "gsm8k": _fast_dllm(
        "gsm8k",
        _speeds(
            *_DSB,
            FLEXIBLE,
            _DREAM_PLAIN,
            ({}, 77.03, 11.4),
            (_DREAM_THRESHOLD, 75.51, 45.8),
            (_DREAM_THRESHOLD | _DUAL, 67.32, 72.2),
        ),
        _speeds(*_DAWN, FLEXIBLE, _DREAM_PLAIN, ({}, 76.35, 7.3), (_DREAM_THRESHOLD, 75.20, 28.8)),
        chat_template=False,
        algorithm="entropy",
    ),
    "humaneval": _fast_dllm(
        "humaneval",
        _speeds(
            *_DSB,
            PASS,
            _DREAM_PLAIN,
            ({}, 53.05, 33.5),
            (_DREAM_THRESHOLD, 57.32, 77.6),
            (_DREAM_THRESHOLD | _DUAL, 48.78, 65.9),
        ),
        chat_template=False,
        algorithm="entropy",
    ),
}
