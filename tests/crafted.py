"""Result files with given accuracies and speeds, made by the program's own build_result."""

import random
from pathlib import Path

from decoding.config import DecodeConfig
from decoding.option import options_in
from decoding.row_state import Completion
from decoding.schedule import make_schedule
from eval import MODEL_DEFAULTS, TASKS
from experiment.config import RunConfig, result_name
from experiment.result import build_result, profile
from experiment.sample import Request, Sample
from models import FAMILIES
from tasks.protocols import Protocol, protocol
from utils import atomic_write_json

METRIC = {
    "gsm8k": ("exact_match", "flexible-extract"),
    "humaneval": ("pass@1", "create_test"),
    "mbpp": ("pass@1", "create_test"),
    "truthfulqa": ("bleu_acc", "none"),
}


def protocol_of(name: str, alias: str, task: str) -> Protocol:
    family = FAMILIES[MODEL_DEFAULTS[alias]["family"]]
    return protocol(name, alias, MODEL_DEFAULTS, TASKS[task], family)


def config_of(alias: str, task: str, k: int, protocol: str = "uniform", **changes) -> RunConfig:
    """A configuration.

    changes: fields of RunConfig, of DecodeConfig, or `gen_length` and `algorithm`.
    """
    cell = protocol_of(protocol, alias, task)
    algorithm = changes.pop("algorithm", cell.algorithm)
    length, given = changes.pop("gen_length", cell.gen_length), changes.pop("options", {})
    block = changes.pop("block_length", cell.block_length)
    decoding = {name: getattr(cell, name) for name in ("temperature", "top_p", "alg_temp")}
    decoding |= {n: changes.pop(n) for n in options_in(DecodeConfig) if n in changes}
    schedule = make_schedule(algorithm, length, block, tokens_per_step=k)
    decode = DecodeConfig(schedule, given=tuple(given.items()), **decoding)
    fields = dict(
        model_alias=alias,
        family="llada" if "llada" in alias else "dream",
        checkpoint=f"/{alias}",
        task=task,
        protocol=protocol,
        prompt_form=cell.form,
        num_fewshot=cell.num_fewshot,
        chat_template=True,
        system=None,
        decode=None if "predictions" in changes else decode,
        fingerprint={"revision": alias, "files": {}, "shards": {}},
        data={"file": "1"},
    )
    return RunConfig(**(fields | changes))


def sample_of(config: RunConfig, doc: int, rng: random.Random, prompt: str | None) -> Sample:
    """A sample that fills a part of its canvas, then ends; K positions a forward pass."""
    schedule = config.decode and config.decode.schedule
    length, k = (schedule.gen_length, schedule.tokens_per_step or 1) if schedule else (24, 1)
    returned = rng.randint(length // 3, length)
    order = rng.sample(range(length), length)
    at = [0] * length
    for n, position in enumerate(order):
        at[position] = n // k
    nfe, text = -(-length // k), f"Answer to {doc}: <b>{rng.random()}</b> & more"
    prompt = prompt or f"<|user|>Question {doc}?\n</script>"
    return Sample(
        Request({}, doc, prompt=prompt, seed=doc, prompt_ids=(1,) * 30),
        Completion(
            token_ids=tuple(rng.randrange(1000) for _ in range(length)),
            committed_at=tuple(at),
            nfe=nfe,
            forwards_saved=0,
            positions_computed=nfe * length,
            seconds=0.05 * nfe,
            finish_reason="end_token",
        ),
        text,
        text + "<|endoftext|>",
        "end token 2",
        "end_token",
        returned,
        0.05 * nfe,
    )


def craft(
    alias="llada",
    task="gsm8k",
    k=1,
    *,
    right=0.5,
    n=40,
    protocol="uniform",
    data="original",
    limit=None,
    overrides=None,
    scores=None,
    prompt=None,
    machine="NVIDIA H200",
    revision=None,
    **changes,
) -> tuple[dict, RunConfig]:
    """A complete result; a share `right` of n answers is right, or `scores` says which."""
    config = config_of(alias, task, k, protocol, **changes)
    rng = random.Random(f"{alias} {task} {k}")
    samples = [sample_of(config, doc, rng, prompt) for doc in range(n)]
    if config.predictions:  # texts that were made elsewhere have no tokens
        samples = [Sample(s.request, text=s.text, raw_text=s.text) for s in samples]
    metric, chain = METRIC[task]
    scores = [float(rng.random() < right) for _ in range(n)] if scores is None else scores
    logged = [
        {
            "doc_id": doc,
            "filter": chain,
            "metrics": [metric],
            metric: scores[doc],
            "filtered_resps": [f"{doc}"],
            "target": f"target {doc}",
        }
        for doc in range(n)
    ]
    cell = protocol_of(protocol, alias, task)
    result = build_result(
        config=config.as_dict(),
        generation_id=config.generation_id,
        result_id=config.result_id,
        protocol={
            "name": protocol,
            "revision": revision or cell.revision,
            "references": cell.references,
        },
        overrides=({} if k == 1 else {"tokens_per_step": {"protocol": 1, "run": k}})
        | (overrides or {}),
        notes=[],
        data={"name": data, "files": config.data, "n_docs": n, "rows_sha256": data},
        limit=limit,
        samples=samples,
        logged=logged,
        headline=f"{metric},{chain}",
        code=False,
        token_texts={str(token): f"t{token} " for token in range(1000)},
        profile=profile(samples, peak_bytes={}),
        meta={
            "started": "2026-01-01T00:00:00+00:00",
            "environment": {"git_commit": "c0ffee" + 34 * "0", "git_dirty": False},
            "samples_made": [{"device_name": machine, "cpu": "x"}],
        },
    )
    return result, config


def save(folder: Path, *arguments, tag=None, **options) -> Path:
    result, config = craft(*arguments, **options)
    overrides = options.get("overrides") or ()
    path = folder / result_name(config, overrides=overrides, tag=tag, limit=options.get("limit"))
    atomic_write_json(path, result)
    return path
