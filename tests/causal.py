"""A verifier for tests: causal, with the drafting model's weights, so that they often agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from mini import DREAM

from decoding.algorithms import ALGORITHMS
from decoding.engine import decode
from models import Transformer


def causal_twin(model: Transformer, n_tokens: int | None = None) -> Transformer:
    """A causal model with the weights of `model`.

    n_tokens: size of its vocabulary, of which the first tokens are the same; None: that of `model`.
    """
    config = replace(model.config, family="qwen2", causal=True, mask_id=None)
    twin = Transformer(config if n_tokens is None else replace(config, vocab_size=n_tokens))
    theirs = model.weights()
    for name, weight in twin.requires_grad_(False).eval().weights().items():
        n = min(len(weight), len(theirs[name]))
        weight.zero_()
        weight[:n] = theirs[name][:n]
    return twin


def decoded(model, prompts, config, seeds, **more):
    """decode(), with a causal twin where the algorithm has a verifier."""
    if ALGORITHMS[config.schedule.algorithm].verification is not None:
        more["verifier"] = causal_twin(getattr(model, "model", model))
    return decode(model, prompts, config, seeds, **more)


def verifier_checkpoint(folder: Path) -> Path:
    """dream-tiny as a causal checkpoint: the same tensors and tokenizer, another model_type."""
    shutil.copytree(DREAM, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k != "mask_token_id"} | {"model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
