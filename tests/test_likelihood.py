"""Likelihoods: the official estimators' recorded draws give their numbers, own draws the ELBO.

Each line of the recorded set's likelihood/likelihood.jsonl is one test. The set is
tests/conformance, or the directory that DLLMEXP_CONFORMANCE_DIR names.
"""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from mini import ROOT, write_lines

from decoding.config import DecodeConfig
from decoding.engine import decode
from decoding.likelihood import (
    ESTIMATORS,
    LikelihoodConfig,
    Mask,
    Target,
    likelihoods_each,
    merged,
    official_counts,
    stratified_counts,
)
from decoding.sampling import NoFiniteLogits
from decoding.schedule import make_schedule
from dev.bench import __main__ as bench
from eval import TASKS
from experiment.result import VOLATILE
from experiment.sample import is_usable, samples_of
from experiment.store import Store, folder
from harness import _ProfilingHarness, encode_pair
from models import load_model, load_tokenizer
from scripts import trace
from utils import BadDataError, UsageError

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


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize("name", ["llada_mc", "dream_mc"])
def test_few_masks_are_enumerated(name):
    """Draws of a target of 3 tokens would only add noise: 7 masks are all that there are."""
    config = LikelihoodConfig(name, 7)
    assert config.masks(3, seed=1) == config.masks(3, seed=2) == ESTIMATORS[name].listed(3)
    assert len(config.masks(4, seed=1)) <= 7
    assert config.masks(4, seed=1) != config.masks(4, seed=2)
    assert config.masks(4, seed=1) == config.masks(4, seed=1)


def test_the_official_schedule_draws_even_what_could_be_enumerated():
    """Its numbers must carry the noise and the bias of the published ones."""
    config = LikelihoodConfig("llada_mc", 16, official=True)
    assert config.masks(3, seed=1) != config.masks(3, seed=2)
    assert math.fsum(m.weight * len(m.hidden) for m in config.masks(3, 1)) == pytest.approx(3)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LikelihoodConfig("exact", 8), "mc_num 8: exact draws nothing; these do: llada_mc, dream"),
        (LikelihoodConfig("llada_mc", 12, official=True), "mc_num 12 must be a multiple of 8"),
    ],
)
def test_estimators_refuse_what_they_cannot_use(config, problem):
    assert config.problems()[0].startswith(problem)


def test_equal_rows_of_several_targets_run_once():
    """The letters of a question: one row serves all."""
    model = model_of("llada-tiny")
    masks = LikelihoodConfig("llada_mc", 128).masks(1, seed=0)
    targets = [Target((5, 6, 7), (letter,), masks) for letter in (10, 11, 12, 13)]
    found = solve(model, targets, batch_size=1)
    assert [f.rows for f in found] == [1, 1, 1, 1]
    assert [f.rows_run for f in found] == [1, 0, 0, 0]
    assert len({f.loglikelihood for f in found}) == 4
    assert [solve(model, [t])[0].loglikelihood for t in targets] == [f.loglikelihood for f in found]


def test_a_batch_changes_no_bit():
    """Rows of other lengths, guidance and sequential estimators side by side."""
    model, rng = model_of("dream-tiny"), np.random.default_rng(3)
    targets = []
    for i in range(12):
        prefix, ids = (
            tuple(rng.integers(5, 400, size=int(rng.integers(1, 20))).tolist()) for _ in "ab"
        )
        masks = None if i % 3 == 2 else LikelihoodConfig("dream_mc", 8).masks(len(ids), seed=i)
        targets.append(Target(prefix, ids, masks, greedy=i % 2 == 0, cfg_scale=0.5 * (i % 3 == 1)))
    once = [f.loglikelihood for f in solve(model, targets, 1)]
    for batch_size in (3, 8, 64):
        found = solve(model, targets, batch_size)
        assert [f.loglikelihood for f in found] == once
    order = rng.permutation(12)
    assert [f.loglikelihood for f in solve(model, [targets[i] for i in order])] == [
        once[i] for i in order
    ]


def test_a_model_without_finite_logits_is_an_error():
    model = load_model(RECORDED / "llada-tiny", device="cpu", dtype=torch.float32)[0]
    model.embed.weight[7] = torch.nan
    with pytest.raises(NoFiniteLogits, match="no finite logits at 1 of 1"):
        solve(model, [Target((7,), (8,), [Mask((0,), 1.0)])])


# ---------------------------------------------------------------- runs

PLUGIN = """
import eval
from tasks import TaskSpec
from tasks.base import PromptForm, installed_config, make_task
from tasks.data import Source

FORM = PromptForm(source="own", yaml="arc/arc_easy.yaml", doc_to_text="Q: {{question}}\\nA:")

def build(data, form):
    config = installed_config(FORM.yaml) | {"task": "mini"}
    return make_task(data, FORM, config | {"training_split": None, "validation_split": None})

FIELDS = {"id": "text", "question": "text", "answerKey": "text"}
eval.TASKS["mini"] = TaskSpec(
    "mini", build, 4, (Source("mini.jsonl", 4, FIELDS),), {"own": FORM}, "acc,none", kind="choice"
)
"""
QUESTIONS = [
    ("Which one can fly?", ["a crow", "a brick", "a sofa", "a pond"], "A"),
    ("What is 2 + 3?", ["4", "5", "6", "7"], "B"),
    ("Which one is cold?", ["fire", "the sun", "snow", "tea"], "C"),
    ("Who has six legs?", ["a dog", "a cow", "a man", "an ant that walks over a long wall"], "D"),
]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Arguments of a run over four questions in ARC's format."""
    folder = tmp_path_factory.mktemp("mini")
    (folder / "likely.py").write_text(PLUGIN)
    rows = [
        {
            "id": str(i),
            "question": question,
            "choices": {"text": texts, "label": list("ABCD")},
            "answerKey": key,
        }
        for i, (question, texts, key) in enumerate(QUESTIONS)
    ]
    write_lines(folder / "mini.jsonl", rows)
    yield f"--plugin {folder / 'likely.py'} --task mini --data_dir {folder} --mc_num 16"
    TASKS.pop("mini", None)


def content(path):
    """The part of a result that the configuration alone decides."""
    result = json.loads(path.read_text())
    return result, {n: v for n, v in result.items() if n not in VOLATILE}


def test_a_run_keeps_a_row_for_each_document(run, mini, tmp_path):
    code, out, err = run(f"{mini} --model_alias tiny-llada --output_dir {tmp_path}")
    assert code == 0, err
    path = tmp_path / "tiny-llada_mini_llada_mc_mc16_likely.json"
    result, _ = content(path)
    assert set(result["metrics"]) == {"acc,none", "acc_norm,none"}
    assert (result["n_samples"], result["headline"]["metric"]) == (4, "acc,none")
    assert (result["config"]["estimator"], result["config"]["mc_num"]) == ("llada_mc", 16)
    for sample, (_, texts, key) in zip(result["samples"], QUESTIONS, strict=True):
        values = [option["loglikelihood"] for option in sample["options"]]
        assert sample["chosen"] == values.index(max(values))
        assert sample["text"] == sample["options"][sample["chosen"]]["continuation"]
        # lm-eval puts no blank behind a chat template
        assert [o["continuation"].strip() for o in sample["options"]] == texts
        assert sample["target"] == "ABCD".index(key)
        assert sample["metrics"]["acc,none"] == float(sample["chosen"] == sample["target"])
        norm = [v / len(text) for v, text in zip(values, texts)]
        right = float(norm.index(max(norm)) == sample["target"])
        assert sample["metrics"]["acc_norm,none"] == right
        assert {o["is_greedy"] for o in sample["options"]} == {None}
    profile = result["profile"]
    assert profile["rows"] < profile["rows_needed"]  # the digits of question 1 share a row
    assert f"{profile['rows']} rows for 16 requests" in out
    assert len(samples_of(result)) == 16


def dream_result(run, mini, folder, more=""):
    code, _, err = run(f"{mini} --model_alias tiny-dream --output_dir {folder} {more}")
    assert code == 0, err
    return content(folder / "tiny-dream_mini_dream_mc_mc16_likely.json")[1]


def test_nothing_but_the_text_changes_a_likelihood(run, mini, tmp_path):
    """Batch, limit, an interrupted run: all but the rounding of other kernels."""

    def parts(content: dict) -> tuple[list[float], dict]:
        options = [option for sample in content["samples"] for option in sample["options"]]
        return [option.pop("loglikelihood") for option in options], content

    once, rest = parts(dream_result(run, mini, tmp_path / "1", "--batch_size 1"))
    values, other = parts(dream_result(run, mini, tmp_path / "3", "--batch_size 3"))
    assert other == rest and values == pytest.approx(once, abs=1e-4)
    # the first two documents are in the store
    assert run(f"{mini} --model_alias tiny-dream --output_dir {tmp_path / '8'} --limit 2")[0] == 0
    values, other = parts(dream_result(run, mini, tmp_path / "8", "--batch_size 8"))
    assert other == rest and values == pytest.approx(once, abs=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(run, mini, tmp_path):
    once = dream_result(run, mini, tmp_path / "one")
    assert dream_result(run, mini, tmp_path / "two", "--devices cpu,cpu") == once


def test_a_lost_store_is_restored_from_the_result(run, mini, tmp_path):
    arguments = f"{mini} --model_alias tiny-llada --output_dir {tmp_path} --limit 2"
    assert run(arguments)[0] == 0
    [path] = tmp_path.glob("*.json")
    result, whole = content(path)
    store = Store.read(folder(tmp_path / "cache", result["generation_id"]), result["generation_id"])
    kept = {key: store.get(key) for key in store}
    restored = samples_of(result)
    assert restored.keys() == kept.keys()
    for key, record in restored.items():
        assert is_usable({"status": "ok", **record})
        assert record["result"] == kept[key]["result"]
    path.unlink()
    assert run(arguments)[0] == 0  # from the store alone
    assert content(path)[1] == whole


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--alg leftright --tokens_per_step 2", "--alg, --tokens_per_step: leave out; mini is sco"),
        ("--gen_length 8 --temperature 1", "--gen_length, --temperature: leave out; mini is scor"),
        ("--threshold 0.5", "--threshold: leave out; mini is scored by likelihood"),
        ("--cuda_graphs", "--cuda_graphs: leave out; mini is scored by likelihood"),
        ("--likelihood exact", "--mc_num 16: exact draws nothing"),
        ("--likelihood guess", "--likelihood guess: must be one of llada_mc, dream_mc"),
    ],
)
def test_options_without_a_meaning_are_refused(run, mini, tmp_path, arguments, problem):
    code, _, err = run(f"{mini} --model_alias tiny-llada --output_dir {tmp_path} {arguments}")
    assert code == 2 and problem in err, err


def test_a_generating_task_refuses_likelihood_options(run):
    code, _, err = run("--model_alias tiny-llada --task gsm8k --mc_num 3 --cfg_scale 1 --dry_run")
    assert code == 2
    assert "--mc_num, --cfg_scale: leave out; gsm8k is scored by its generated answers" in err


def test_show_prompt_shows_the_options(run, mini):
    code, out, _ = run(f"{mini} --model_alias tiny-llada --no_chat_template --show_prompt 2")
    assert code == 0
    assert out.startswith("Q: Which one is cold?\nA:\n---")
    assert "tokens: ' the sun'" in out


def harness_of(name, **more):
    model = model_of(name)
    tokenizer = tokenizer_of(name)
    estimator = LikelihoodConfig("llada_mc" if "llada" in name else "dream_mc", 8)
    return _ProfilingHarness(
        tokenizer, model.config, None, load=lambda: (model, None), likelihood=estimator, **more
    )


def asked(*pairs):
    return [Instance("loglikelihood", {}, pair, 0, ("", i, 1)) for i, pair in enumerate(pairs)]


def test_an_empty_target_names_its_request():
    """It would be a perfect score."""
    for pair in (("The lamp", ""), ("The strin", "g")):
        for name in ("llada-tiny", "dream-tiny"):
            with pytest.raises(BadDataError, match=f"document 1 option 0 .*{pair[0]}"):
                harness_of(name).loglikelihood(asked(("a", " b"), pair), disable_tqdm=True)


def test_an_empty_context_is_the_start_token():
    [empty], [blank] = (
        harness_of("llada-tiny").requests_of(asked((context, "word"))) for context in ("", " ")
    )
    assert empty.prompt_ids == blank.prompt_ids == (tokenizer_of("llada-tiny").bos_token_id,)


def test_a_long_context_is_cut_on_the_left_behind_the_start_token():
    harness = harness_of("dream-tiny")
    [whole] = harness.requests_of(asked(("The lamp on the desk is", " off.")))
    room = len(whole.prompt_ids) + len(whole.target_ids) - 3
    harness.model_config = replace(harness.model_config, max_length=room)
    [cut] = harness.requests_of(asked(("The lamp on the desk is", " off.")))
    assert (cut.n_cut, cut.target_ids) == (3, whole.target_ids)
    assert cut.prompt_ids == whole.prompt_ids[:1] + whole.prompt_ids[4:]


def test_is_greedy_is_what_decoding_gives():
    """Decoded at temperature 0, one token a step: that text is greedy, another one is not."""
    harness = harness_of("llada-tiny")
    [request] = harness.requests_of(asked(("The lamp on the desk", " is off.")))
    n, model = len(request.target_ids), model_of("llada-tiny")
    schedule = make_schedule("low_confidence", n, n, num_steps=n)
    config = DecodeConfig(schedule, early_exit=False)
    [completion] = decode(model, [request.prompt_ids], config, [0])
    for ids, greedy in ((completion.token_ids, True), (request.target_ids, False)):
        target = Target(request.prompt_ids, tuple(ids), [], greedy=True)
        assert solve(model, [target])[0].is_greedy is greedy


def test_out_of_memory_halves_the_rows(monkeypatch):
    """With the numbers of a run that had enough."""
    pairs = asked(*((f"The lamp {i}", " on the desk is off") for i in range(4)))
    whole = harness_of("llada-tiny").loglikelihood(pairs, disable_tqdm=True)
    harness, model = harness_of("llada-tiny", batch_size=8), model_of("llada-tiny")
    predict = model.predict

    def short_of_memory(tokens, spans, *more, **options):
        if len(spans) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(tokens, spans, *more, **options)

    monkeypatch.setattr(model, "predict", short_of_memory)
    assert harness.loglikelihood(pairs, disable_tqdm=True) == whole
    assert (harness.generation.halved, harness.batch_size) == ([8, 4], 2)


def test_a_rolling_likelihood_is_refused_in_a_line():
    with pytest.raises(UsageError, match=r"^loglikelihood_rolling \(perplexity of whole"):
        harness_of("llada-tiny").loglikelihood_rolling(asked(("a", "b")))


@pytest.mark.slow
def test_the_benchmark_compares_equal_draws(tmp_path, capsys):
    """Rows are saved, and the numbers are those of the official estimator."""
    out = tmp_path / "bench.json"
    arguments = ["--preset", "likelihood", "--prompts", "1", "--rounds", "1", "--out", str(out)]
    assert bench.main(arguments) == 0
    found = json.loads(out.read_text())
    plain, same, _ = found["rounds"][0]["rows"]
    assert (plain, found["requests"]) == (4 * 128, 4) and same < plain / 2
    assert found["rounds"][0]["largest_difference"] < 1e-4
    assert "official estimator, written plainly" in capsys.readouterr().out
