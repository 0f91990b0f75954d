"""Likelihoods: the official estimators' recorded draws give their numbers, own draws the ELBO.

Each line of the recorded set's likelihood/likelihood.jsonl is one test. The set is
tests/conformance, or the directory that DLLMEXP_CONFORMANCE_DIR names.
"""

import json
import math
import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import ROOT

from decoding.likelihood import (
    ESTIMATORS,
    Mask,
    Target,
    likelihoods_each,
    merged,
    official_counts,
    stratified_counts,
)
from harness import encode_pair
from models import load_model, load_tokenizer
from scripts import trace

RECORDED = Path(os.environ.get("DLLMEXP_CONFORMANCE_DIR") or ROOT / "tests" / "conformance")
LINES = [
    json.loads(line)
    for line in (RECORDED / "likelihood" / "likelihood.jsonl").open(encoding="utf-8")
]
# what the official code puts around a text
FRAMES = {"llada": (), "illada_bos": ("bos",), "dream": ("end",), "dream_bos": ("bos", "end")}


@cache
def model_of(name):
    return load_model(RECORDED / name, device="cpu", dtype=torch.float32)[0]


@cache
def tokenizer_of(name):
    return load_tokenizer(RECORDED / name)


def solve(model, targets, batch_size=8):
    """The likelihoods of targets, in their order."""
    found = dict(likelihoods_each(model, targets, batch_size))
    return [found[i] for i in range(len(targets))]


def near(value, exact):
    """The README's tolerance for float32."""
    return abs(value - exact) < 2e-4 + 1e-5 * abs(exact)


def encoded(name, context, continuation, frame):
    model = model_of(name)
    return encode_pair(tokenizer_of(name), context, continuation, frame, model.config.eos_id)


def frame_of(case):
    words = ["bos"] * bool(case["params"].get("add_bos_token"))
    return (*words, *["end"] * case["estimator"].startswith("dream"))


def check_case(case):
    model = model_of(case["model"])
    target = trace.likelihood_target(case, model.config)
    [found] = solve(model, [target])
    assert near(found.loglikelihood, case["loglikelihood_f64"])
    if "order" in case:
        assert list(found.order) == case["order"]
    if target.greedy and case.get("is_greedy") is not None:
        assert found.is_greedy == case["is_greedy"]
    [bare] = solve(model, [Target(**vars(target) | {"greedy": False})])
    assert bare.rows <= case.get("forward_rows", math.inf)
    assert bare.loglikelihood == found.loglikelihood
    rows = [row for batch in case.get("batches", ()) for row in batch]
    singles = [
        Target(**vars(target) | {"masks": merged([Mask(tuple(r["masked"]), 1 / r["p_mask"])])})
        for r in rows
    ]
    for row, single in zip(rows, solve(model, singles), strict=True):
        assert -single.loglikelihood == pytest.approx(row["loss_f64"], rel=1e-4)
    cut = case["params"].get("max_length", math.inf)
    whole = case["context"] is not None and not case["params"].get("tokenised_apart")
    if whole and case.get("continuation") is not None:
        prefix, ids = encoded(case["model"], case["context"], case["continuation"], frame_of(case))
        assert ids == case["target_ids"]
        room = min(len(prefix), cut - len(ids))
        assert prefix[len(prefix) - room :] == case["prefix_ids"]


def check_quirk(case):
    """A mask token in the text is text: the drawn positions alone are scored."""
    check_case(case)
    assert not near(case["official_loglikelihood_f64"], case["loglikelihood_f64"])


def check_encoding(line):
    prefix, ids = encoded(
        line["model"], line["context"], line["continuation"], FRAMES[line["mode"]]
    )
    assert (prefix, ids) == (line["prefix_ids"], line["target_ids"])


def check_schedule(line):
    n, rows = line["target_len"], line["batch_size"]
    official = [official_counts(n, rows, k) for k in range(1, n + 1)]
    assert official == line["x_by_k"]
    counts = Counter(x for xs in official for x in xs)
    assert [counts[x] for x in range(1, n + 1)] == line["count_of_x"]
    assert (len(set(counts.values())) == 1 and len(counts) == n) == line["uniform"]
    # ours is uniform in any case: u at the middle of each of n cells stands for all of it
    ours = Counter(x for k in range(n) for x in stratified_counts(n, rows, (k + 0.5) / n))
    assert [ours[x] for x in range(1, n + 1)] == [rows] * n


def check_statistics(line):
    """Means of own draws, few at a time, as the schedule shows within these few rows."""
    model, kind = (
        model_of(line["model"]),
        ESTIMATORS[trace.AS_HERE.get(line["estimator"], line["estimator"])],
    )
    n, rows, batches = len(line["target_ids"]), line["params"]["batch_size"], 250
    n -= line["estimator"] == "dream_mc"
    uniforms = np.random.Generator(np.random.Philox(7)).random
    sets = [kind.listed(n)]
    for batch in (None, rows):
        drawn = [m for _ in range(batches) for m in kind.draw(n, rows, uniforms, batch)]
        assert len(drawn) == rows * batches
        sets.append(merged(Mask(m.hidden, m.weight / batches) for m in drawn))
    tail = (model.config.eos_id,) if line["params"].get("padd_eos") else ()
    prefix, ids = tuple(line["prefix_ids"]), tuple(line["target_ids"])
    scale = line["params"].get("cfg_scale", 0.0)
    targets = [Target(prefix, ids, masks, tail=tail, cfg_scale=scale) for masks in sets]
    exact, own, official = (found.loglikelihood for found in solve(model, targets, 64))
    assert near(exact, line["exact_elbo"])
    error = 4 * line["row_sd_independent"] / math.sqrt(rows * batches) + 1e-3
    assert abs(own - line["exact_elbo"]) < error
    assert abs(official - line["exact_official"]) < error


def option_cases(question):
    return [
        option | {n: question[n] for n in ("estimator", "params")} for option in question["options"]
    ]


@cache
def scores_of(question_id):
    """Log-likelihoods of the options of a question, with the recorded draws."""
    question = next(line for line in LINES if line["id"] == question_id)
    model = model_of(question["model"])
    targets = [trace.likelihood_target(c, model.config) for c in option_cases(question)]
    return [
        r.loglikelihood
        for r in solve(model, [Target(**vars(t) | {"greedy": False}) for t in targets])
    ]


def right(question):
    scores = scores_of(question["id"])
    by_character = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
    picks = int(np.argmax(scores)), int(np.argmax(by_character))
    return picks, tuple(float(pick == question["gold"]) for pick in picks)


def check_multiple_choice(question):
    for case, found in zip(option_cases(question), scores_of(question["id"]), strict=True):
        assert near(found, case["loglikelihood_f64"])
        frame = frame_of(case)
        pair = encoded(question["model"], case["context"], case["continuation"], frame)
        assert pair == (case["prefix_ids"], case["target_ids"])
    (pick, by_character), (acc, acc_norm) = right(question)
    assert (pick, by_character) == (question["argmax"], question["argmax_norm"])
    assert (acc, acc_norm) == (question["acc"], question["acc_norm"])


def check_multiple_choice_summary(line):
    same = ("model", "estimator", "group", "params")
    questions = [
        q for q in LINES if q["kind"] == "multiple_choice" and all(q[n] == line[n] for n in same)
    ]
    assert len(questions) == line["questions"]
    scores = [right(question)[1] for question in questions]
    assert np.mean(scores, axis=0).tolist() == pytest.approx([line["acc"], line["acc_norm"]])


CHECKS = {
    "case": check_case,
    "encoding": check_encoding,
    "schedule": check_schedule,
    "statistics": check_statistics,
    "multiple_choice": check_multiple_choice,
    "multiple_choice_summary": check_multiple_choice_summary,
    "quirk": check_quirk,
}


@pytest.mark.parametrize("line", [pytest.param(x, id=f"likelihood-{x['id']}") for x in LINES])
def test_recorded(line):
    CHECKS[line["kind"]](line)


def test_the_recorded_set_is_whole():
    """An empty file would make every test above pass."""
    assert {line["kind"] for line in LINES} == CHECKS.keys()


def test_trace_replays_likelihood_cases(tmp_path, capsys):
    """With decoding cases between them, in the order of the file, at any batch size."""
    cases = [x for x in LINES if x["kind"] == "case" and x["model"] == "llada-tiny"]
    decoding = {"id": "d", "algorithm": "leftright", "prompt_ids": [1], "params": {"gen_length": 4}}
    cases = [*cases[:4], decoding, *(c for c in cases if "order" in c)]
    path, outs = tmp_path / "cases.jsonl", []
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    for batch_size in (1, 8):
        outs.append(tmp_path / f"{batch_size}.jsonl")
        arguments = ["--checkpoint", RECORDED / "llada-tiny", "--cases", path, "--out", outs[-1]]
        assert trace.main([*map(str, arguments), "--batch_size", str(batch_size)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    rows = [json.loads(line) for line in outs[0].open()]
    assert [row["id"] for row in rows] == [case["id"] for case in cases]
    for row, case in zip(rows, cases, strict=True):
        if case is not decoding:
            assert set(row) == {"id", "loglikelihood", "rows", "is_greedy", "order"}
            assert near(row["loglikelihood"], case["loglikelihood_f64"])
            assert (row["is_greedy"], row["order"]) == (case["is_greedy"], case.get("order"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"estimator": "guess"}, "unknown estimator 'guess'; there are: llada_mc, dream_mc"),
        ({"params": {"mc": 1}}, "unknown params mc; known: cfg_scale"),
        ({"params": {"mask_id": 3}}, "mask_id 3 is not the checkpoint's 507"),
        ({"params": {"log_type": "btf"}}, "log_type 'btf' is not replayed; only ftb is"),
        ({"batches": []}, "llada_mc needs the recorded draws: batches of masked and p_mask"),
        ({"batches": [[{"masked": [9], "p_mask": 1}]]}, "must be within the target of 3 tokens"),
        ({"target_ids": []}, "targets not empty"),
    ],
)
def test_a_case_that_cannot_be_replayed_is_named(tmp_path, capsys, change, problem):
    case = next(x for x in LINES if x["id"] == "llada-mc-000") | change
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    arguments = ["--checkpoint", RECORDED / "llada-tiny", "--cases", tmp_path / "cases.jsonl"]
    assert trace.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: case llada-mc-000: ") and problem in error
