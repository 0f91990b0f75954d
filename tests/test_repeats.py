"""--repeats N: several samples a document, their means, pass@k, and what is kept of them."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest
from mini import ROOT
from test_docs import SCHEMA, faults

import harness
import models
from experiment.result import load_result
from experiment.sample import answers_of, samples_of
from experiment.sample_cache import SampleCache
from experiment.statistics import estimate
from experiment.status import counted, read_status
from experiment.store import Store
from reporting.data import read_result
from suite.matrix import Selection, select
from suite.state import Watcher
from tasks import build_task
from tasks.code import over_repeats, pass_at_k, reported_k

TINY = f"--model_alias tiny-llada --device cpu --data_dir {ROOT / 'assets' / 'benchmarks'}"
HOT = "--temperature 0.5"


# ---- pass@k


def test_pass_at_k_is_the_share_of_the_draws_that_have_a_pass():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                drawn = list(combinations([True] * c + [False] * (n - c), k))
                share = sum(any(one) for one in drawn) / len(drawn)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-15)
    assert pass_at_k(10_000, 5, 10_000) == 1 and pass_at_k(10_000, 0, 5_000) == 0


def test_k_is_every_power_of_two_and_n():
    assert [reported_k(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_a_document_has_the_means_of_its_answers():
    scores = [{"pass@1": 1.0, "pass@1_ours": 1.0}, {"pass@1": 0.0, "pass@1_ours": 1.0}]
    scores += [{"pass@1": 0.0, "pass@1_ours": 0.0}]
    found = over_repeats(scores, code=True)
    assert found == pytest.approx(
        {"pass@1": 1 / 3, "pass@1_ours": 2 / 3, "pass@2": 2 / 3, "pass@3": 1}
    )
    assert over_repeats([{"acc": 1}, {"acc": 0}], code=False) == {"acc": 0.5}
    assert over_repeats([{"pass@1": 1.0}, {}], code=True) == {}


# ---- refusals, the name and the ids


@pytest.mark.parametrize(
    "words, why",
    [
        ("--task gsm8k", "all samples of a document are the same at temperature 0; --temperature"),
        ("--task arc_easy", "arc_easy is scored by likelihood, nothing is sampled; leave it out"),
        (f"--task gsm8k {HOT} --predictions x.jsonl", "--predictions has one text per document"),
    ],
)
def test_several_samples_are_refused_where_there_is_one(run, words, why):
    code, _, error = run(f"{TINY} {words} --repeats 3 --dry_run")
    assert code == 2 and error.startswith(f"error: --repeats 3: {why}"), error
    assert error.count("--repeats") == 1


def test_n_is_in_the_name_and_the_result_id_and_not_in_the_generation_id(run):
    def shown(words: str) -> tuple[str, str, str]:
        text = run(f"{TINY} --task gsm8k {HOT} {words} --dry_run")[1]
        lines = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line.strip())
        return lines["output:"], lines["id"], lines["generation_id"]

    plain, one, two, three = map(shown, ("", "--repeats 1", "--repeats 2", "--repeats 3"))
    assert plain == one
    assert two[0].endswith("_temperature0.5_repeats2_dllmexp-mini.json")
    assert len({plain[1], two[1], three[1]}) == 3 and len({plain[2], two[2], three[2]}) == 1
    assert run(f"{TINY} --task gsm8k --repeats 1 --dry_run")[0] == 0


# ---- runs


@pytest.fixture
def sampled(run, tmp_path):
    """Run a task; its result, the path, and how many samples are kept now."""

    def call(task: str, n: int, limit: int, *more: str):
        code, _, error = run(
            f"{TINY} {HOT} --task {task} --limit {limit} --repeats {n} --output_dir {tmp_path}",
            *more,
        )
        assert code == 0, error
        found = [p for p in tmp_path.glob("*.json") if (f"_repeats{n}_" in p.name) == (n > 1)]
        [path] = [p for p in found if f"_{task}_" in p.name]
        shards = tmp_path.glob("cache/*/shard-*")
        kept = sum(len(p.read_text().splitlines()) - 1 for p in shards)
        return json.loads(path.read_text()), path, kept

    return call


def values(result: dict, metric: str) -> list[list[float]]:
    return [[a["metrics"][metric] for a in row["repeats"]] for row in result["samples"]]


@pytest.mark.slow
def test_a_larger_n_decodes_only_the_new_samples_and_means_are_over_documents(
    sampled, monkeypatch, tmp_path
):
    one, _, kept = sampled("gsm8k", 1, 3)
    assert kept == 3
    two, _, kept = sampled("gsm8k", 2, 3)
    assert kept == 6
    three, path, kept = sampled("gsm8k", 3, 3)
    assert kept == 9 and three["profile"]["samples"] == 9
    assert [s["samples"] for s in three["meta"]["samples_made"]] == [9]
    assert one["generation_id"] == two["generation_id"] == three["generation_id"]
    assert not faults(three, SCHEMA) and not faults(one, SCHEMA)
    assert three["n_samples"] == 3 and three["config"]["repeats"] == 3
    for row, first, pair in zip(three["samples"], one["samples"], two["samples"], strict=True):
        answers = row["repeats"]
        assert [a["repeat"] for a in answers] == [0, 1, 2]
        assert len({a["seed"] for a in answers}) == len({a["key"] for a in answers}) == 3
        assert (row["text"], row["token_ids"]) == (first["text"], first["token_ids"])
        assert answers[0] == first and answers[:2] == pair["repeats"]
        for metric, value in row["metrics"].items():
            assert value == pytest.approx(fmean(a["metrics"][metric] for a in answers))
    assert len({a["text"] for a in answers_of(three["samples"])}) > 3
    metric = three["headline"]["metric"]
    means = [fmean(v) for v in values(three, metric)]
    assert three["headline"] == {"metric": metric, **estimate(means).as_dict()}
    # progress counts documents times N
    [status] = read_status(next(tmp_path.glob("cache/*")))
    assert (status.of, status.sums.n, status.sums.scored) == (9, 9, 3)
    assert (status.summary.of, status.summary.sums.n) == (9, 9)
    [folder] = tmp_path.glob("cache/*")
    with Store.read(folder, three["generation_id"]) as store:
        assert [counted(store, 2, n).n for n in (1, 2, 3)] == [2, 4, 6]
    for n in (2, 4):  # a suite that asks for two, and for four of three
        words = f"{TINY} {HOT} --limit 3 --repeats {n}".partition("--device cpu")[2].split()
        [planned] = select(Selection(("tiny-llada",), ("gsm8k",), (1,), extra=tuple(words)))
        planned = replace(planned, store=folder, path=tmp_path / "absent.json")
        found = Watcher(planned).status()
        assert (found.of, found.n, found.state) == (3 * n, 3 * min(n, 3), "partial")
    # a run after the store is lost decodes nothing
    shutil.rmtree(tmp_path / "cache")
    assert len(samples_of(load_result(path))) == 9
    monkeypatch.setattr("experiment.config.SCORING_VERSION", 99)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    again, _, kept = sampled("gsm8k", 3, 3)
    assert kept == 9 and again["samples"] == three["samples"]
    # the report reads answers
    found = read_result(path)
    assert found.accuracy and found.scores == dict(enumerate(means))
    assert found.settings["repeats"] == 3


@pytest.mark.slow
def test_code_has_pass_at_k_and_a_cut_run_goes_on(sampled, monkeypatch, tmp_path, capsys):
    real = SampleCache.remember

    def cut(self, *sample):
        real(self, *sample)
        if self.status.record.sums.n == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampleCache, "remember", cut)
        with pytest.raises(AssertionError):
            sampled("humaneval", 3, 2, "--strict_exec", "--batch_size", "1")
    read, wrong = harness.read_answer, {(0, 1), (1, 0), (1, 2)}

    def read_answer(request, *more):
        sample = read(request, *more)
        bad = (request.doc_id, request.repeat) in wrong
        return replace(sample, text="    return None\n") if bad else sample

    monkeypatch.setattr(harness, "read_answer", read_answer)
    result, _, kept = sampled("humaneval", 3, 2, "--strict_exec")
    assert kept == 6 and not faults(result, SCHEMA)
    assert sorted(m.partition(",")[0] for m in result["metrics"]) == [
        "pass@1",
        "pass@1_strict",
        "pass@2",
        "pass@3",
    ]
    passed = [[a["verdict"]["passed"] for a in row["repeats"]] for row in result["samples"]]
    assert passed == [[True, False, True], [False, True, False]]
    shares = {"pass@1": [2 / 3, 1 / 3], "pass@1_strict": [2 / 3, 1 / 3]}
    shares |= {"pass@2": [1, 2 / 3], "pass@3": [1, 1]}
    for metric, each in shares.items():
        found = [row["metrics"][f"{metric},create_test"] for row in result["samples"]]
        assert found == pytest.approx(each)
        mean = result["metrics"][f"{metric},create_test"]
        assert (mean["value"], mean["n"]) == (pytest.approx(fmean(each)), 2)
    assert result["headline"] == {
        "metric": "pass@1,create_test",
        **result["metrics"]["pass@1,create_test"],
    }
    assert result["strict"] == {"suspects": [], "unverifiable": []}
    assert "return None" in result["samples"][0]["repeats"][1]["program"]


@pytest.mark.slow
def test_a_task_that_takes_several_samples_itself_is_refused(run, monkeypatch, tmp_path):
    real = build_task

    def build(*asked):
        task = real(*asked)
        task.set_config("repeats", 64)
        return task

    monkeypatch.setattr("experiment.run.build_task", build)
    code, _, error = run(f"{TINY} {HOT} --task gsm8k --repeats 2 --output_dir {tmp_path}")
    assert code == 2 and error.splitlines()[-1] == (
        "error: --repeats 2: gsm8k already takes 64 samples per document; leave it out"
    )


@pytest.mark.slow
def test_a_document_with_an_answer_that_failed_has_no_metrics(run, monkeypatch, tmp_path):
    real = harness.decode_each

    def failing(model, prompts, config, seeds, **more):
        if bad & set(seeds):
            raise RuntimeError("boom")
        return real(model, prompts, config, seeds, **more)

    bad = set()
    words = f"{TINY} {HOT} --task gsm8k --limit 2 --output_dir {tmp_path}"
    assert run(f"{words} --repeats 2")[0] == 0
    [path] = tmp_path.glob("*.json")
    bad = {json.loads(path.read_text())["samples"][1]["repeats"][1]["seed"]}
    monkeypatch.setattr(harness, "decode_each", failing)
    code, out, _ = run(f"{words} --repeats 2 --overwrite")
    assert code == 5 and "2 documents, 2 samples each" in out
    result = json.loads(path.read_text())
    good, failed = result["samples"]
    assert (result["status"], result["n_failed"], result["headline"]) == ("incomplete", 1, None)
    assert failed["status"] == "error" and "boom" in failed["error"] and "metrics" not in failed
    assert [a["status"] for a in failed["repeats"]] == ["ok", "error"]
    assert [e["n"] for e in result["score_on_completed"].values()] == [1] * len(good["metrics"])
    assert not faults(result, SCHEMA)
