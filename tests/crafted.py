"""Result files with the accuracies and speeds that a test wants, made by the program's own build_result."""

import random
from pathlib import Path

from decoding.row_state import Completion
from experiment.result import build_result, profile
from experiment.sample import Request, Sample
from tasks.protocols import protocol as protocol_of
from utils import RunConfig, atomic_write_json, result_name

METRIC = {
    "gsm8k": ("exact_match", "flexible-extract"),
    "humaneval": ("pass@1", "create_test"),
    "mbpp": ("pass@1", "create_test"),
    "truthfulqa": ("bleu_acc", "none"),
}


def config_of(alias: str, task: str, k: int, protocol: str = "uniform", **changes) -> RunConfig:
    cell = protocol_of(protocol, alias, task)
    length = changes.get("gen_length", cell.gen_length)
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
        algorithm=cell.algorithm,
        gen_length=length,
        block_length=cell.block_length or length,
        num_steps=-(-length // k),
        tokens_per_step=k,
        quotas=f"{k}x{-(-length // k)}",
        temperature=cell.temperature,
        top_p=cell.top_p,
        top_k=None,
        alg_temp=cell.alg_temp,
        logits_eos_inf=False,
        confidence_eos_eot_inf=False,
        confidence_dtype="float64",
        early_exit=True,
        dtype="bfloat16",
        seed=0,
        fingerprint={"revision": alias, "files": {}, "shards": {}},
        data={"file": "1"},
    )
    return RunConfig(**(fields | changes))


def sample_of(config: RunConfig, doc: int, rng: random.Random, prompt: str | None) -> Sample:
    """A sample that fills a part of its canvas, then ends; K positions a forward pass."""
    length, k = config.gen_length, config.tokens_per_step or 1
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
        }
        for doc in range(n)
    ]
    cell = protocol_of(protocol, alias, task)
    result = build_result(
        config=config.as_dict(),
        generation_id=config.id,
        result_id=config.id,
        protocol={"name": protocol, "references": cell.references},
        overrides=({} if k == 1 else {"tokens_per_step": {"protocol": 1, "run": k}})
        | (overrides or {}),
        notes=[],
        data={"name": data, "files": config.data, "n_docs": n, "rows_sha256": data},
        limit=limit,
        samples=samples,
        logged=logged,
        headline=f"{metric},{chain}",
        code=False,
        profile=profile(samples, peak_bytes={}),
        meta={
            "started": "2026-01-01T00:00:00+00:00",
            "samples_made": [{"device_name": machine, "cpu": "x"}],
        },
    )
    return result, config


def save(folder: Path, *arguments, tag=None, **options) -> Path:
    result, config = craft(*arguments, **options)
    path = folder / result_name(config, tag=tag, limit=options.get("limit"))
    atomic_write_json(path, result)
    return path
