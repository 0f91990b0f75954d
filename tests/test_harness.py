"""harness.py, experiment/: from a request to a sample, and the result of a whole run."""

import importlib.metadata
import json
import os
import random
import shlex
import signal
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mini import DREAM, LLADA, forked, gsm8k_dir

import eval as cli
import models
from decoding.config import DecodeConfig
from decoding.row_state import Completion
from decoding.schedule import make_schedule
from experiment.lmeval import evaluate
from experiment.predictions import predictions_lm
from experiment.result import VOLATILE, load_result, profile
from experiment.sample import Request, Sample
from experiment.sample_cache import SampleCache
from experiment.store import Store
from experiment.text import first_stop, read_answer, stops_of, text_is_final, text_of
from harness import DreamHarness, LladaHarness, _ProfilingHarness
from tasks import build_task
from utils import SCHEMA_VERSION, BadDataError, UsageError, sample_seed, sha256


def harness_of(
    family: str,
    *,
    gen_length: int = 16,
    batch_size: int = 2,
    load=None,
    prefill=lambda doc: "",
    algorithm="leftright",
    k=1,
    cache=None,
    **options,
):
    checkpoint, kind = (LLADA, LladaHarness) if family == "llada" else (DREAM, DreamHarness)
    decode = DecodeConfig(make_schedule(algorithm, gen_length, None, k), **options)
    return kind(
        models.load_tokenizer(checkpoint),
        models.read_config(checkpoint),
        decode,
        load=load or (lambda: loaded(checkpoint)),
        prefill=prefill,
        batch_size=batch_size,
        cache=cache or SampleCache(""),
    )


def loaded(checkpoint):
    """A model without a verifier, as a harness loads it."""
    return models.load_model(checkpoint, device="cpu", dtype="float32")[0], None


def request(prompt: str, doc_id: int = 0, until=(), doc=None):
    return SimpleNamespace(
        args=(prompt, {"until": list(until), "do_sample": False}),
        doc_id=doc_id,
        doc=doc or {},
        repeats=1,
    )


def completion(ids, open_from=None, **fields):
    n = len(ids)
    at = tuple(-1 if open_from is not None and i >= open_from else i for i in range(n))
    return Completion(
        tuple(ids),
        at,
        nfe=n,
        forwards_saved=0,
        positions_computed=n,
        seconds=0.1,
        finish_reason="length",
        **fields,
    )


def read(harness, ids, stops=(), open_from=None) -> Sample:
    asked = Request({}, 0, prompt="p", stops=tuple(stops), prompt_ids=(1,))
    return read_answer(asked, completion(ids, open_from), harness.tokenizer, harness.model_config)


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("abc", ("x",), None),
        ("a\n\nb", ("\n\n",), (1, "\n\n")),
        ("abc", ("c", "b"), (1, "b")),
        ("abc", ("b", "bc"), (1, "bc")),
        ("", ("x",), None),
    ],
)
def test_first_stop_is_the_earliest_whatever_the_order(text, stops, expected):
    assert first_stop(text, stops) == first_stop(text, stops[::-1]) == expected


@pytest.mark.parametrize(
    "text, stops, final",
    [
        ("ab", ("b",), True),
        ("ab", ("b", "abc"), False),  # "abc" may still be completed, and begins before "b"
        ("abx", ("b", "abc"), False),  # not decided by length yet: 3 < 1 + 3
        ("abxy", ("b", "abc"), True),
        ("ab\ufffd", ("b",), True),
        ("ab\ufffd\ufffd\ufffd", ("b", "abc"), False),  # the tail is not text yet
        ("abc", ("x",), False),
    ],
)
def test_text_is_final_only_when_no_earlier_stop_can_follow(text, stops, final):
    assert text_is_final(text, stops) is final


def test_a_final_text_never_changes():
    """The rule behind early exit, on every prefix of many texts: it is cut where the whole is."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randint(1, 12)))
        stops = [
            "".join(rng.choice("ab\n") for _ in range(rng.randint(1, 4)))
            for _ in range(rng.randint(1, 3))
        ]
        for n in range(len(text) + 1):
            if text_is_final(text[:n], stops):
                assert first_stop(text[:n], stops)[0] == first_stop(text, stops)[0]


@pytest.mark.parametrize(
    "until, stops", [(["a", ""], ("a",)), ("ab", ("ab",)), (None, ()), ([], ())]
)
def test_stops_of_a_request(until, stops):
    """A single string is one stop string, not its letters."""
    assert stops_of({"until": until}) == stops


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_text_of_a_prefix_is_a_prefix_of_the_text(family):
    """Stop strings are looked for in prefixes; a tokenizer that cleans spaces would change them."""
    harness = harness_of(family)
    ids = harness.tokenizer.encode(
        "He said : 'do n't' , 3 . 5 \u00e9\u4e16\U0001f600 \n\n end .", add_special_tokens=False
    )
    whole = text_of(harness.tokenizer, ids)
    for n in range(len(ids) + 1):
        assert whole.startswith(text_of(harness.tokenizer, ids[:n]).rstrip("\ufffd"))


# ---------------------------------------------------------------- ids -> text


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_text_ends_at_the_first_end_token_by_id(family):
    """Stock lm-eval glues what stands behind the end token to the answer."""
    harness = harness_of(family)
    answer, junk = (harness.tokenizer.encode(t, add_special_tokens=False) for t in ("42", " junk"))
    for end in harness.model_config.end_ids:
        sample = read(harness, [*answer, end, *junk])
        assert (
            sample.text == "42"
            and sample.cut == f"end token {end}"
            and sample.finish_reason == "end_token"
        )
        assert sample.tokens_returned == len(answer)
        assert sample.raw_text.startswith("42<|") and "junk" not in sample.raw_text


def test_text_ends_at_the_first_stop_string():
    harness = harness_of("llada")
    ids = harness.tokenizer.encode("so 42\nQuestion: and", add_special_tokens=False)
    sample = read(harness, ids, stops=["Question:"])
    assert (sample.text, sample.cut, sample.finish_reason) == (
        "so 42\n",
        "stop string 'Question:'",
        "stop_string",
    )
    returned = sample.tokens_returned
    assert text_of(harness.tokenizer, ids[:returned]).startswith("so 42\n")
    assert not text_of(harness.tokenizer, ids[: returned - 1]).startswith("so 42\n")
    assert "Question:" in sample.raw_text


def test_open_positions_are_no_text():
    """A row that left early has mask ids behind its end: they must not be decoded."""
    harness = harness_of("dream")
    ids = harness.tokenizer.encode("all of it", add_special_tokens=False)
    mask = harness.model_config.mask_id
    sample = read(harness, [*ids, mask, mask], open_from=len(ids))
    assert sample.text == sample.raw_text == "all of it"
    assert sample.completion.tokens_committed == len(ids)


def test_a_full_canvas_is_said():
    harness = harness_of("dream")
    sample = read(harness, harness.tokenizer.encode("no end", add_special_tokens=False))
    assert sample.cut is None and sample.finish_reason == "length"


# ---------------------------------------------------------------- requests -> decode


def test_prefill_is_appended_as_it_is():
    """LLaDA's template trims content, and would glue the first line of code to the fence."""
    harness = harness_of("llada", prefill=lambda doc: f"```python\n{doc['code']}\n")
    prompt = harness.apply_chat_template([{"role": "user", "content": "Go"}])
    harness.generate_until([request(prompt, doc={"code": "def f():"})], disable_tqdm=True)
    [sample] = harness.samples
    assert sample.request.prompt == prompt + "```python\ndef f():\n"
    ids = harness.tokenizer.encode(sample.request.prompt, add_special_tokens=False)
    assert list(sample.request.prompt_ids) == ids and sample.row()["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_answer_begun_in_the_chat_is_appended_too(family):
    """lm-eval's own gen_prefix arrives as a last turn of the assistant."""
    harness = harness_of(family)
    chat = [{"role": "user", "content": "Go"}]
    begun = harness.apply_chat_template(
        [*chat, {"role": "assistant", "content": "Well:\n"}], add_generation_prompt=False
    )
    assert begun == harness.apply_chat_template(chat) + "Well:\n"


def test_start_token_comes_once():
    harness = harness_of("llada")
    ids = harness.tokenizer.encode(
        harness.apply_chat_template([{"role": "user", "content": "Go"}]), add_special_tokens=False
    )
    start = harness.tokenizer.bos_token_id
    assert ids[0] == start and ids.count(start) == 1


def test_template_that_refuses_a_message_is_an_error():
    """lm-eval would drop the system message with a warning, and measure another prompt."""
    harness = harness_of("dream")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go"}]
    harness.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(BadDataError, match="no system"):
        harness.apply_chat_template(chat)
    harness.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        BadDataError, match="drops the message of role 'system'; leave out --system"
    ):
        harness.apply_chat_template(chat)


def test_prompt_that_does_not_fit_is_reported_before_the_model_loads():
    """It is never cut in silence: the head of a prompt is its instructions."""
    harness = harness_of("llada", load=lambda: pytest.fail("loaded"))
    harness.model_config = replace(harness.model_config, max_length=40)
    with pytest.raises(
        UsageError,
        match=r"1 prompt too long: with a canvas of 16 .* 40 positions; documents 7 \(\d+ tokens\)",
    ):
        harness.generate_until(
            [request("a b", 6), request("a b c d e " * 20, 7)], disable_tqdm=True
        )


def test_model_loads_for_the_first_sample_that_needs_it(tmp_path):
    """Scoring anew what is kept already must not read 16 GB."""
    loads = []

    def load():
        loads.append(1)
        return loaded(LLADA)

    with Store.open(tmp_path, {}, "f" * 64) as store:
        texts = harness_of("llada", cache=SampleCache("f" * 64, store)).generate_until(
            [request("a")], disable_tqdm=True
        )
        harness = harness_of("llada", load=load, cache=SampleCache("f" * 64, store))
        assert harness.generate_until([request("a")], disable_tqdm=True) == texts and loads == []
        harness.generate_until([request("a"), request("b", 1)], disable_tqdm=True)
        harness.generate_until([request("c")], disable_tqdm=True)
    assert loads == [1]


def test_loglikelihood_raises():
    """The stock method returns a plausible number."""
    for lm in (harness_of("llada"), predictions_lm({})):
        for method in (lm.loglikelihood, lm.loglikelihood_rolling):
            with pytest.raises((NotImplementedError, UsageError)):
                method([])


def test_harness_refuses_the_other_family():
    with pytest.raises(UsageError, match="dream family"):
        LladaHarness(models.load_tokenizer(DREAM), models.read_config(DREAM), None, load=None)


def test_repeats_differ_and_requests_keep_their_order():
    """lm-eval repeats one Instance object; each repeat is a sample with a seed of its own."""
    harness = harness_of("llada", temperature=1.0, gen_length=8)
    a, b = request("one two three", 0), request("x", 1)
    texts = harness.generate_until([a, a, b], disable_tqdm=True)
    samples = {(s.request.doc_id, s.request.repeat): s for s in harness.samples}
    assert texts == [samples[0, 0].text, samples[0, 1].text, samples[1, 0].text]
    first, second = samples[0, 0], samples[0, 1]
    assert first.request.seed == sample_seed(0, "one two three", 0) != second.request.seed
    assert first.completion.token_ids != second.completion.token_ids


def test_one_failing_sample_does_not_take_the_others_with_it(monkeypatch):
    import harness as module

    real, harness = module.decode_each, harness_of("llada", gen_length=8)
    bad = tuple(harness.tokenizer.encode("bad", add_special_tokens=False))

    def failing(model, prompts, *more, **options):
        if bad in prompts:
            raise RuntimeError("boom")
        return real(model, prompts, *more, **options)

    monkeypatch.setattr(module, "decode_each", failing)
    texts = harness.generate_until(
        [request("good", 0), request("bad", 1), request("fine", 2)], disable_tqdm=True
    )
    status = {s.request.doc_id: s.error for s in harness.samples}
    assert (
        status[0] is None
        and status[2] is None
        and "RuntimeError: boom" in status[1]
        and texts[1] == ""
    )
    assert harness.profile()["samples"] == 2


def test_error_of_the_project_is_no_failed_sample():
    """A full disk must end the run, not fill the result with failed samples."""
    harness = harness_of("llada", gen_length=4)

    def full(*_):
        raise BadDataError("no space")

    harness.generation.cache.remember = full
    with pytest.raises(BadDataError):
        harness.generate_until([request("a")], disable_tqdm=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, algorithm, k",
    [
        ("llada", "leftright", 1),
        ("llada", "low_confidence", 2),
        ("dream", "leftright", 3),
        ("dream", "entropy", 2),
    ],
)
def test_early_exit_changes_no_text(family, algorithm, k):
    """Stop strings of one and several letters; random weights produce every letter soon."""
    prompts = [f"Question {i}: what?" for i in range(6)]
    for stops in (["e"], ["\n", "th", "e t"], ["1", "ing", " "]):
        outcome = {}
        for early in (True, False):
            harness = harness_of(family, gen_length=24, algorithm=algorithm, k=k, early_exit=early)
            texts = harness.generate_until(
                [request(p, i, stops) for i, p in enumerate(prompts)], disable_tqdm=True
            )
            samples = sorted(harness.samples, key=lambda s: s.request.doc_id)
            outcome[early] = (
                (texts, [(s.cut, s.finish_reason, s.tokens_returned) for s in samples]),
                sum(s.completion.nfe for s in samples),
            )
        assert outcome[True][0] == outcome[False][0]
        # the whole canvas as one block saves little
        assert outcome[True][1] < outcome[False][1] or algorithm == "entropy"


# ---------------------------------------------------------------- a harness of one's own


class FixedAnswer(_ProfilingHarness):
    """Answers every request with the same ids: one method, no torch model."""

    kill_at = None  # before this answer the process ends as by kill -9

    def decode(self, requests):
        ids = self.tokenizer.encode("#### 4", add_special_tokens=False)
        for n, request in enumerate(reversed(requests)):
            if n == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield request, completion(ids)


def evaluate_fixed(folder, kind=FixedAnswer) -> tuple[_ProfilingHarness, list[dict]]:
    """The harness, and lm-eval's logged samples of five documents; samples are kept in `folder`."""
    task = build_task(cli.TASKS["gsm8k"], folder / "data", "chat")
    with Store.open(folder / "cache", {}, "f" * 64) as store:
        harness = kind(
            models.load_tokenizer(LLADA),
            replace(models.read_config(LLADA), family="new"),
            DecodeConfig(make_schedule("leftright", 16, None, 1)),
            load=lambda: pytest.fail("a model was loaded"),
            cache=SampleCache("f" * 64, store),
            batch_size="auto",
        )
        return harness, evaluate(harness, task, chat_template=True, system=None, limit=None)


@pytest.mark.slow
def test_a_harness_of_ones_own_overrides_decode_alone(tmp_path):
    """Resumed after a kill, in any order, it decodes only what is missing."""
    gsm8k_dir(tmp_path / "data", 5)

    def killed():
        FixedAnswer.kill_at = 2
        evaluate_fixed(tmp_path)

    process = forked(killed, tmp_path / "log")
    process.join()
    assert process.exitcode == -signal.SIGKILL

    asked = []

    class Counting(FixedAnswer):
        def decode(self, requests):
            asked.extend(requests)
            return super().decode(requests)

    harness, logged = evaluate_fixed(tmp_path, Counting)
    assert len(asked) == 3 and {r.doc_id for r in asked} < {
        s.request.doc_id for s in harness.samples
    }
    flexible = {s["doc_id"]: s["exact_match"] for s in logged if s["filter"] == "flexible-extract"}
    assert flexible == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0}
    assert [s.text for s in harness.samples] == ["#### 4"] * 5
    assert harness.profile()["samples"] == 5
    asked.clear()
    assert evaluate_fixed(tmp_path, Counting)[1] == logged and asked == []


@pytest.mark.parametrize("fault", ["raises", "leaves one out", "answers twice", "no memory"])
def test_a_fault_in_decode_is_the_status_of_its_samples(fault):
    class Faulty(FixedAnswer):
        def decode(self, requests):
            for request, answer in super().decode(requests):
                if request.doc_id != 1:
                    yield request, answer
                elif fault == "answers twice":
                    yield from [(request, answer)] * 2
                elif fault == "raises":
                    raise RuntimeError("injected")
                elif fault == "no memory" and self.batch_size > 1:
                    raise MemoryError

    harness = Faulty(
        models.load_tokenizer(LLADA),
        models.read_config(LLADA),
        DecodeConfig(make_schedule("leftright", 16, None, 1)),
        load=None,
        batch_size=4,
    )
    texts = harness.generate_until([request(str(i), i) for i in range(3)], disable_tqdm=True)
    assert texts == ["#### 4", "#### 4" if fault == "answers twice" else "", "#### 4"]
    errors = {s.request.doc_id: s.error.splitlines()[-1] for s in harness.samples if s.error}
    left_open = "ValueError: decode() leaves 1 of 1 requests open"
    assert (
        errors
        == {
            "raises": {1: "RuntimeError: injected"},
            "leaves one out": {1: left_open},
            "answers twice": {},
            "no memory": {1: left_open},
        }[fault]
    )
    assert harness.generation.halved == ([4, 2] if fault == "no memory" else [])


@pytest.mark.parametrize(
    "change",
    [
        {"committed_at": (0,)},
        {"nfe": 1.5},
        {"seconds": None},
        {"finish_reason": None},
        {"token_ids": tuple(np.arange(8))},
    ],
)
def test_a_completion_that_a_store_could_not_read_again_is_no_answer(change):
    """It was written and scored, and a resumed run or another worker found no sample."""

    class Faulty(FixedAnswer):
        def decode(self, requests):
            for asked in requests:
                yield asked, replace(completion(range(8)), **change)

    harness = Faulty(
        models.load_tokenizer(LLADA),
        models.read_config(LLADA),
        DecodeConfig(make_schedule("leftright", 16, None, 1)),
        load=None,
    )
    assert harness.generate_until([request("a")], disable_tqdm=True) == [""]
    [sample] = harness.samples
    assert "decode() gives a Completion that cannot be kept" in sample.error


def test_load_error_ends_the_run():
    """Were it the status of the samples, a missing file would be a result with no score."""

    def load():
        raise RuntimeError("no such weights")

    with pytest.raises(RuntimeError, match="no such weights"):
        harness_of("llada", load=load).generate_until([request("a")], disable_tqdm=True)


def test_loading_is_no_cost_of_a_sample():
    def load():
        time.sleep(1)
        return loaded(LLADA)

    harness = harness_of("llada", load=load, gen_length=4)
    harness.generate_until([request("a")], disable_tqdm=True)
    assert 0 < harness.profile()["seconds"] < 0.9


# ---------------------------------------------------------------- what it cost


def test_profile_has_one_definition():
    decoded = Completion((1,) * 8, (0,) * 8, 4, 2, 100, seconds=1.0, finish_reason="length")
    slower = replace(decoded, seconds=3.0, forwards_saved=0)
    samples = [
        Sample(Request({}, 0), decoded, tokens_returned=6, cost_seconds=0.5),
        Sample(Request({}, 1), slower, tokens_returned=2, cost_seconds=1.5),
        Sample(Request({}, 2), error="Traceback"),
    ]
    p = profile(samples, peak_bytes={"device": None, "host": 1})
    assert (p["samples"], p["tokens_returned"], p["tokens_committed"], p["positions_computed"]) == (
        2,
        8,
        16,
        200,
    )
    assert p["forward_passes"] == {"full": 8, "partial": 0} and p["forwards_saved"] == 2
    assert (p["tpf"], p["tokens_per_second"], p["latency_s"]) == (
        1.0,
        4.0,
        {"p50": 2.0, "p95": pytest.approx(2.9)},
    )
    nothing = profile([], peak_bytes={})
    assert nothing["tpf"] is None and nothing["tokens_per_second"] is None


# ---------------------------------------------------------------- whole runs


def run(out, *arguments) -> dict:
    """Run the program on the CPU; its result."""
    assert (
        cli.main(
            [
                *shlex.split("--device cpu --dtype float32"),
                "--output_dir",
                str(out),
                *map(str, arguments),
            ]
        )
        == 0
    )
    (path,) = out.glob("*.json")
    return load_result(path)


def content(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in VOLATILE}


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach a host fails the test, not only the attempt."""

    def refuse(*arguments, **_):
        pytest.fail(f"asked for a host: {arguments[:2]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "alias, flag, checkpoint", [("llada", "--llada_ckpt", LLADA), ("dream", "--dream_ckpt", DREAM)]
)
@pytest.mark.parametrize("task", ["humaneval", "mbpp", "gsm8k", "truthfulqa"])
def test_end_to_end_offline_on_the_real_benchmarks(
    tmp_path, benchmarks, no_network, capsys, alias, flag, checkpoint, task
):
    result = run(
        tmp_path,
        "--model_alias",
        alias,
        flag,
        checkpoint,
        "--task",
        task,
        "--data_dir",
        benchmarks,
        "--limit",
        2,
        "--gen_length",
        32,
        "--tokens_per_step",
        4,
        "--batch_size",
        2,
    )
    spec = cli.TASKS[task]
    assert (
        result["schema_version"] == SCHEMA_VERSION
        and result["status"] == "complete"
        and result["n_samples"] == 2
    )
    assert result["config"]["num_steps"] == 8 and len(result["id"]) == 64
    assert result["protocol"]["overrides"]["gen_length"]["run"] == 32
    assert (
        result["headline"]["metric"] == spec.headline
        and result["headline"]["n"] == 2
        and result["reference"] is None
    )
    assert result["data"]["n_docs"] == spec.n_docs and set(result["data"]["files"]) == set(
        spec.files
    )
    assert result["content_sha256"] == sha256(content(result))
    for sample in result["samples"]:
        assert sample["status"] == "ok" and sample["prompt"] and spec.headline in sample["metrics"]
        assert (
            len(sample["token_ids"]) == len(sample["committed_at"]) == 32
            and 1 <= sample["nfe"] <= 8
        )
        assert (
            sample["finish_reason"] in ("end_token", "stop_string", "length")
            and sample["extracted"]
        )
        assert ("verdict" in sample) == (spec.kind == "code")
    assert result["profile"]["tpf"] > 0 and result["profile"]["tokens_per_second"] > 0
    assert result["meta"]["environment"]["packages"]["lm-eval"] == importlib.metadata.version(
        "lm-eval"
    )
    assert result["meta"]["device"]["device"] == "cpu"
    out, err = capsys.readouterr()
    assert spec.headline in out and "result: " in out and str(tmp_path) in out
    assert "warning" not in err.lower().replace("userwarning", "")


@pytest.fixture
def mini(tmp_path):
    """Arguments of a run on five documents."""
    data = gsm8k_dir(tmp_path / "data", 5)
    return [
        "--model_alias",
        "llada",
        "--llada_ckpt",
        LLADA,
        "--task",
        "gsm8k",
        "--data_dir",
        data,
        "--gen_length",
        16,
        "--block_length",
        8,
    ]


@pytest.mark.parametrize("options", [[], ["--temperature", "0.7", "--alg", "random"]])
def test_batch_size_changes_nothing_and_limit_is_a_prefix(tmp_path, mini, options):
    """Design rule 4: batch, order and limit never change a token at float32."""
    one, three = (run(tmp_path / str(n), *mini, *options, "--batch_size", n) for n in (1, 3))
    assert content(one) == content(three) and one["content_sha256"] == three["content_sha256"]
    two = run(tmp_path / "limit", *mini, *options, "--limit", 2)
    assert two["samples"] == one["samples"][:2] and two["id"] == one["id"]


@pytest.mark.slow
def test_seed_changes_samples_only_where_something_is_drawn(tmp_path, mini):

    def ids(*more):
        result = run(tmp_path / "-".join(map(str, more)), *mini, *more)
        return [s["token_ids"] for s in result["samples"]]

    assert ids("--seed", 1) == ids("--seed", 2)
    assert ids("--seed", 1, "--temperature", 1) != ids("--seed", 2, "--temperature", 1)


def test_profile_adds_up(tmp_path, mini):
    result = run(tmp_path / "out", *mini)
    p, samples = result["profile"], result["samples"]
    assert p["tokens_returned"] == sum(s["tokens_returned"] for s in samples)
    assert p["forward_passes"]["full"] == sum(s["nfe"] for s in samples)
    assert p["tpf"] == pytest.approx(p["tokens_returned"] / p["forward_passes"]["full"])
    assert [t["doc_id"] for t in p["sample_seconds"]] == [0, 1, 2, 3, 4]
    for s in samples:
        assert s["tokens_committed"] == sum(at >= 0 for at in s["committed_at"])


def test_published_score_only_beside_its_own_protocol(tmp_path):
    """Predictions, a limit or one changed flag make it another experiment."""
    from experiment.result import build_result

    def reference(overrides=None, limit=None, name="original", **config):
        return build_result(
            config=config,
            generation_id="x",
            result_id="y",
            protocol={
                "references": [
                    {"score": 79.3, "tokens_per_step": 1},
                    {"score": 74.8, "tokens_per_step": 2},
                ]
            },
            overrides=overrides or {},
            notes=[],
            data={"name": name},
            limit=limit,
            samples=[Sample(Request({}, 0))],
            logged=[
                {
                    "doc_id": 0,
                    "filter": "none",
                    "metrics": ["acc"],
                    "acc": 1,
                    "filtered_resps": ["x"],
                }
            ],
            headline="acc,none",
            code=False,
            profile={},
            meta={},
        )["reference"]

    steps = {"tokens_per_step": {"protocol": 1, "run": 2}}
    assert reference()["score"] == 79.3 and reference(steps)["score"] == 74.8
    assert (
        reference({"tokens_per_step": {"protocol": 1, "run": 3}}) is None
        and reference(steps | {"dtype": {}}) is None
    )
    assert (
        reference({"gen_length": {}}) is None
        and reference(limit=5) is None
        and reference(predictions="abc") is None
    )
    assert reference(name="mini") is None


def test_result_of_another_schema_is_named(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(
        BadDataError, match=f"schema_version 99, this program writes {SCHEMA_VERSION}"
    ):
        load_result(tmp_path / "r.json")
    assert load_result(tmp_path / "none.json") is None


def test_a_score_on_the_way_marks_no_other_document(monkeypatch):
    """lm-eval has gone through all documents by then: the last one was marked as failed."""
    from types import SimpleNamespace

    from experiment import lmeval

    def process_results(doc, results):
        if doc["i"] == 1:
            raise ValueError("boom")
        return {"acc": 1.0}

    filters = SimpleNamespace(
        name="none", apply=lambda requests: requests[0].filtered_resps.update(none="a")
    )
    docs = [{"i": i} for i in range(3)]
    task = SimpleNamespace(
        _filters=[filters],
        instances=[],
        process_results=process_results,
        aggregation=lambda: {"acc": "mean"},
        doc_iterator=lambda *args, **options: iter(enumerate(docs)),
    )
    score = lmeval.scorer(task, "acc,none")
    monkeypatch.setattr(lmeval, "is_mean", lambda aggregation, name: True)
    failures = lmeval._score_one_by_one(task)
    assert [doc_id for doc_id, _ in task.doc_iterator()] == [0, 1, 2]
    assert [score(doc, "a") for doc in docs] == [1.0, None, 1.0] and failures == {}
