"""The tiny trained checkpoints answer questions, so that a change of the answers is noticed."""

import argparse
import json
from functools import lru_cache

import pytest
import torch
from mini import ROOT

import eval as cli
from decoding.config import DecodeConfig
from decoding.engine import decode
from decoding.schedule import make_schedule
from dev import make_benchmarks, train_tiny
from models import check_checkpoint, load_model, tokenizer_disagreement
from tasks import build_task
from tasks.code import Judging
from tasks.protocols import ANY, TINY_UNIFORM

CELL = TINY_UNIFORM[ANY]

BENCHMARKS = ROOT / "assets" / "benchmarks"
N = 40
# Measured share of the first N problems that is correct at one token per step.
MEASURED = {
    ("tiny-llada", "gsm8k"): 0.975,
    ("tiny-llada", "humaneval"): 0.975,
    ("tiny-dream", "gsm8k"): 0.85,
    ("tiny-dream", "humaneval"): 0.875,
}
BAND = 0.05  # by which a share may differ
# Measured next-token accuracy of tiny-qwen on the answers of the first N problems, see below. Where
# several forms are right, no model can know which one was drawn.
NEXT_TOKEN = {"gsm8k": 0.982, "humaneval": 0.979, "mbpp": 0.974, "truthfulqa": 0.953}


@lru_cache
def checkpoint(alias: str):
    return load_model(str(ROOT / "assets" / alias), device="cpu", dtype="float32")


@lru_cache
def prompts(alias: str, n: int) -> list[list[int]]:
    """The first n gsm8k questions in the checkpoint's chat template."""
    _, tokenizer = checkpoint(alias)
    task = build_task(cli.TASKS["gsm8k"], BENCHMARKS, "chat")
    chats = [
        [{"role": "user", "content": task.doc_to_text(doc)}] for doc in list(task.eval_docs)[:n]
    ]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def decoded(alias: str, algorithm: str, k: int, batch_size: int | None = None, **options):
    """The completions of the first 16 gsm8k questions at k tokens per step."""
    model, _ = checkpoint(alias)
    block = CELL["block_length"] if algorithm == "low_confidence" else None
    config = DecodeConfig(make_schedule(algorithm, CELL["gen_length"], block, k), **options)
    return decode(model, prompts(alias, 16), config, range(16), batch_size=batch_size)


def run(alias: str, task: str, folder, *options: str) -> dict:
    """The result of an experiment on the mini benchmarks."""
    argv = ["--model_alias", alias, "--task", task, "--data_dir", str(BENCHMARKS)]
    argv += ["--dtype", "float32", "--device", "cpu", "--batch_size", "20"]
    assert cli.main([*argv, "--output_dir", str(folder), *options]) == 0
    newest = max(folder.glob(f"{alias}_{task}_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text(encoding="utf-8"))


def returned(alias: str, completion) -> list[int]:
    """The tokens before the first end token."""
    ends = checkpoint(alias)[0].config.end_ids
    ids = list(completion.token_ids)
    return ids[: min((i for i, t in enumerate(ids) if t in ends), default=len(ids))]


@pytest.mark.parametrize(
    "alias, task",
    [
        pytest.param(*cell, marks=[pytest.mark.slow] * (cell != ("tiny-llada", "gsm8k")))
        for cell in MEASURED
    ],
)
def test_accuracy_stays_where_it_was_measured(alias, task, tmp_path):
    result = run(alias, task, tmp_path, "--limit", str(N))
    assert abs(result["headline"]["value"] - MEASURED[alias, task]) <= BAND
    assert result["data"]["name"] == "dllmexp-mini" and result["reference"] is None


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["tiny-llada", "tiny-dream"])
def test_accuracy_falls_with_tokens_per_step(alias, tmp_path):
    """57 and 51 % at K = 8 instead of 100 and 94 on 500 problems; `threshold` keeps K = 1's."""
    options = ("--limit", str(N), "--tag")
    at_8 = run(alias, "humaneval", tmp_path, *options, "k8", "--tokens_per_step", "8")
    assert at_8["headline"]["value"] < MEASURED[alias, "humaneval"] - 0.1
    sure = run(alias, "humaneval", tmp_path, *options, "sure", "--alg", "threshold")
    assert sure["headline"]["value"] >= MEASURED[alias, "humaneval"] - BAND
    assert sure["profile"]["tpf"] > 2


@pytest.mark.parametrize("alias", ["tiny-llada", "tiny-dream"])
@pytest.mark.parametrize("algorithm", ["protocol", "leftright"])
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_early_exit_saves_forward_passes_and_changes_no_text(alias, algorithm, k):
    if algorithm == "protocol":
        algorithm = {"tiny-llada": "low_confidence", "tiny-dream": "maskgit_plus"}[alias]
    early = decoded(alias, algorithm, k)
    late = decoded(alias, algorithm, k, early_exit=False)
    assert [returned(alias, c) for c in early] == [returned(alias, c) for c in late]
    # With the whole canvas as one block, maskgit_plus commits the end tokens first.
    if algorithm != "maskgit_plus":
        assert sum(c.forwards_saved for c in early) > 0


@pytest.mark.slow
def test_programs_judged_while_others_are_generated_change_nothing(tmp_path, monkeypatch):
    results, early = [], []
    real = Judging.score
    monkeypatch.setattr(
        Judging, "score", lambda self, *args: early.append(len(self._early)) or real(self, *args)
    )
    for idle in (0, 1):
        monkeypatch.setattr("experiment.run.idle_cores", lambda device, n_workers: idle)  # noqa: B023
        results.append(run("tiny-llada", "humaneval", tmp_path / str(idle), "--limit", "6"))
    assert early == [0, 6] and results[0]["content_sha256"] == results[1]["content_sha256"]


@pytest.mark.parametrize(
    "alias", ["tiny-llada", pytest.param("tiny-dream", marks=pytest.mark.slow)]
)
def test_an_answer_ends_by_itself_and_shows_no_chat_token(alias, tmp_path):
    samples = run(alias, "gsm8k", tmp_path, "--limit", "20")["samples"]
    assert {s["finish_reason"] for s in samples} == {"end_token"}
    assert not any("<|" in s["text"] for s in samples)
    assert all(s["text"].count("####") == 1 for s in samples)


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["tiny-llada", "tiny-dream"])
def test_batching_leaves_the_tokens_untouched(alias):
    algorithm = {"tiny-llada": "low_confidence", "tiny-dream": "maskgit_plus"}[alias]
    alone, together = (decoded(alias, algorithm, 2, batch_size=b) for b in (1, 16))
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]


@pytest.mark.slow
def test_resume_leaves_the_samples_untouched(tmp_path):
    """Ten samples, then ten more, against twenty at once."""
    run("tiny-llada", "gsm8k", tmp_path / "begun", "--limit", "10")
    resumed = run("tiny-llada", "gsm8k", tmp_path / "begun", "--limit", "20")
    whole = run("tiny-llada", "gsm8k", tmp_path / "whole", "--limit", "20")
    assert resumed["meta"]["store"]["found"] != whole["meta"]["store"]["found"]
    assert resumed["content_sha256"] == whole["content_sha256"]


@lru_cache
def lessons():
    """The trainer's examples: prompts in the chat template, answers with end tokens."""
    arguments = argparse.Namespace(seed=0, batch=1)
    return train_tiny.Lessons("qwen2", checkpoint("tiny-qwen")[1], train_tiny.Prompts(), arguments)


def next_token_accuracy(task: str, n: int) -> float:
    """Share of answer tokens that tiny-qwen finds likeliest, given the tokens before them.

    Of the first n test problems, up to and including the first end token.
    """
    model, right, of = checkpoint("tiny-qwen")[0], 0, 0
    for problem in make_benchmarks.test_problems(task)[:n]:
        example = lessons().example(task, problem)
        answer = example.canvas[: example.canvas.index(lessons().end) + 1]
        tokens, begin = torch.tensor(example.prompt + answer), len(example.prompt)
        span = (0, len(tokens), len(tokens))
        got = model.predict(tokens, [span], torch.arange(begin, len(tokens))).argmax(-1)
        right, of = right + int((got == tokens[begin:]).sum()), of + len(answer)
    return right / of


@pytest.mark.parametrize("task", list(NEXT_TOKEN))
def test_the_verifier_knows_the_next_token_as_measured(task):
    assert abs(next_token_accuracy(task, N) - NEXT_TOKEN[task]) <= BAND / 5


def test_the_verifier_reads_what_tiny_dream_writes():
    """The same ids for the same text, otherwise the verifier would judge another text."""
    dream, qwen = ROOT / "assets" / "tiny-dream", ROOT / "assets" / "tiny-qwen"
    assert check_checkpoint(qwen) == [] == tokenizer_disagreement(dream, qwen)
    chat = [{"role": "user", "content": "Gus has 33 cups.\nGus lends 7."}]
    (_, a), (model, b) = checkpoint("tiny-dream"), checkpoint("tiny-qwen")
    text = a.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert b.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    assert a(text)["input_ids"] == b(text)["input_ids"]
    assert len(a) == len(b) <= model.config.vocab_size
    assert sum(p.stat().st_size for p in qwen.glob("*.safetensors")) < 650_000
