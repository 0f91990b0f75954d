"""Likelihoods of multiple choice against the official estimator, written plainly, on equal draws.

The reference is LLaDA's `get_loglikelihood` in float32: the draws of a request in batches of 32
rows, every row through all layers and the head at all columns. Sources: ML-GSAI/LLaDA
eval_llada.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.likelihood import (
    ESTIMATORS,
    MC_NUM,
    LikelihoodConfig,
    Mask,
    Target,
    likelihoods_each,
    merged,
)
from dev.bench.reference import Plain
from dev.bench.rounds import timed
from harness import encode_pair
from models import load_model, load_tokenizer
from models.transformer import Transformer

CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "tiny-llada"
QUESTIONS, BATCH, NEEDED = 100, 32, 3.0
ASKED = (
    "Which of these can be seen in the sky at night?",
    "Which one would melt first on a warm day?",
    "A student puts a magnet near four things. Which one does it move?",
    "Which of these does a plant need most to grow?",
    "What do farmers use to keep the soil from drying out?",
)
OPTIONS = (
    "iron, water, the moon, a green leaf, warm air, a wet stone, sunlight, a tree, salt, a lake, "
    "sand and clay, a small bird, ice, wood, a copper wire, dry grass, heat, a falling star, wind, "
    "sugar"
).split(", ")


def questions(n: int, seed: int) -> list[tuple[str, list[str]]]:
    """(context, four continuations) of each question, in the wording of lm-eval's ARC."""
    rng = random.Random(seed)
    return [
        (f"Question: {ASKED[i % len(ASKED)]}\nAnswer:", [f" {o}" for o in rng.sample(OPTIONS, 4)])
        for i in range(n)
    ]


@torch.inference_mode()
def official(model: Plain, prefix: tuple[int, ...], ids: tuple[int, ...], masks: list[Mask]):
    """The log-likelihood from draws, equal ones included, in batches of BATCH rows."""
    total = 0.0
    whole = torch.tensor([*prefix, *ids], device=model.device)
    for start in range(0, len(masks), BATCH):
        batch = masks[start : start + BATCH]
        hidden = torch.zeros((len(batch), len(whole)), dtype=torch.bool, device=model.device)
        for row, mask in zip(hidden, batch):
            row[[len(prefix) + position for position in mask.hidden]] = True
        noisy: Tensor = torch.where(hidden, model.config.mask_id, whole)
        weights = torch.tensor([mask.weight for mask in batch], device=model.device)
        logits = model(noisy)
        losses = F.cross_entropy(logits[hidden], whole.expand_as(noisy)[hidden], reduction="none")
        total -= float((losses * weights[hidden.nonzero()[:, 0]]).sum())
    return total


def ours(model: Transformer, targets: list[Target], batch_size: int) -> list[Any]:
    found = dict(likelihoods_each(model, targets, batch_size))
    return [found[i] for i in range(len(targets))]


def compare(
    n: int, rounds: int, device: str, dtype: str, batch_size: int, seed: int
) -> dict[str, Any]:
    """Rows, seconds and ratios; `equal`: whether all log-likelihoods agree within 1e-3 at float32.

    Ratios are of processor time on a CPU and of wall time on a GPU.
    """
    model = load_model(str(CHECKPOINT), device=device, dtype=getattr(torch, dtype))[0]
    tokenizer, plain = load_tokenizer(CHECKPOINT), Plain(model)
    pairs = [
        encode_pair(tokenizer, context, option, (), model.config.eos_id)
        for context, options in questions(n, seed)
        for option in options
    ]
    pairs = [(tuple(prefix), tuple(ids)) for prefix, ids in pairs]
    uniforms = np.random.Generator(np.random.Philox(seed)).random
    draws = [ESTIMATORS["llada_mc"].draw(len(ids), MC_NUM, uniforms, BATCH) for _, ids in pairs]
    default = LikelihoodConfig("llada_mc", MC_NUM)
    on_gpu, rows = torch.device(device).type == "cuda", []
    for _ in range(rounds):
        theirs, slow = timed(
            lambda: [official(plain, *pair, masks) for pair, masks in zip(pairs, draws)],
            model.device,
        )
        same, quick = timed(
            lambda: ours(
                model,
                [Target(*pair, merged(masks)) for pair, masks in zip(pairs, draws)],
                batch_size,
            ),
            model.device,
        )
        usual, default_time = timed(
            lambda: ours(
                model,
                [Target(*pair, default.masks(len(pair[1]), j)) for j, pair in enumerate(pairs)],
                batch_size,
            ),
            model.device,
        )
        seconds = [t.seconds(on_gpu) for t in (slow, quick, default_time)]
        gap = max(abs(a - b.loglikelihood) for a, b in zip(theirs, same))
        rows.append(
            {
                "seconds": seconds,
                "ratio": seconds[0] / seconds[1],
                "default_ratio": seconds[0] / seconds[2],
                "largest_difference": gap,
                "rows": [
                    sum(map(len, draws)),
                    *(sum(f.rows_run for f in x) for x in (same, usual)),
                ],
            }
        )
    return {
        "questions": n,
        "requests": len(pairs),
        "tokens_per_option": sum(len(ids) for _, ids in pairs) / len(pairs),
        "mc_num": MC_NUM,
        "needed": NEEDED,
        "ratio": median(row["ratio"] for row in rows),
        "default_ratio": median(row["default_ratio"] for row in rows),
        "equal": dtype != "float32" or max(row["largest_difference"] for row in rows) < 1e-3,
        "rounds": rows,
    }


def report(found: dict[str, Any]) -> str:
    """Rows and seconds of the first round, and the ratios."""
    first = found["rounds"][0]
    names = ("official estimator, written plainly", "ours, the same draws", "ours, its own masks")
    ratios = (1.0, found["ratio"], found["default_ratio"])
    lines = [
        f"likelihood: {found['questions']} questions, {found['requests']} options of "
        f"{found['tokens_per_option']:.1f} tokens, mc_num {found['mc_num']}"
    ]
    for name, n, seconds, ratio in zip(names, first["rows"], first["seconds"], ratios):
        lines.append(f"{name:37}{n:8} rows{seconds:9.2f} s{ratio:8.2f} times as fast")
    lines.append(
        f"needed: {found['needed']:g}; largest difference of a log-likelihood: "
        f"{first['largest_difference']:.1e}"
    )
    return "\n".join(lines)
