"""harness.py, experiment/: from a request to a text, its record, and the result of a whole run."""

import importlib.metadata
import json
import random
import shlex
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mini import DREAM, LLADA, REAL, gsm8k_dir, real_data

import eval as cli
import models
from decoding.config import DecodeConfig
from decoding.row_state import Completion
from decoding.schedule import make_schedule
from experiment.predictions import Predictions
from experiment.result import VOLATILE, Record, load_result, profile
from experiment.sample_cache import SampleCache
from experiment.stops import first_stop, stops_of, text_is_final
from experiment.store import Store
from harness import DreamHarness, LladaHarness
from utils import BadDataError, UsageError, sample_seed, sha256


def harness_of(
    family: str,
    *,
    gen_length: int = 16,
    batch_size: int = 2,
    load=None,
    prefill=lambda doc: "",
    algorithm="leftright",
    k=1,
    ledger=None,
    **options,
):
    checkpoint, kind = (LLADA, LladaHarness) if family == "llada" else (DREAM, DreamHarness)
    decode = DecodeConfig(make_schedule(algorithm, gen_length, None, k), **options)
    return kind(
        models.load_tokenizer(checkpoint),
        models.read_config(checkpoint),
        decode,
        load=load or (lambda: models.load_model(checkpoint, device="cpu", dtype="float32")[0]),
        device="cpu",
        batch_size=batch_size,
        ledger=ledger,
        prefill=prefill,
    )


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


def read(harness, ids, stops=(), open_from=None) -> Record:
    job = SimpleNamespace(doc_id=0, repeat=0, prompt="p", ids=[1], seed=0, stops=tuple(stops))
    return harness._record(job, completion(ids, open_from), prompt_tokens=1, cost_seconds=0.1)


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
    """The rule behind early exit, on every prefix of many texts: what is cut from it is what is cut from the whole."""
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
    """Stop strings are looked for in prefixes: a tokenizer that cleans spaces would make them lie."""
    harness = harness_of(family)
    ids = harness.tokenizer.encode(
        "He said : 'do n't' , 3 . 5 \u00e9\u4e16\U0001f600 \n\n end .", add_special_tokens=False
    )
    whole = harness._text(ids)
    for n in range(len(ids) + 1):
        assert whole.startswith(harness._text(ids[:n]).rstrip("\ufffd"))


# ---------------------------------------------------------------- ids -> text


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_text_ends_at_the_first_end_token_by_id(family):
    """Stock lm-eval glues what stands behind the end token to the answer."""
    harness = harness_of(family)
    answer, junk = (harness.tokenizer.encode(t, add_special_tokens=False) for t in ("42", " junk"))
    for end in harness.model_config.end_ids:
        record = read(harness, [*answer, end, *junk])
        assert (
            record.text == "42"
            and record.cut == f"end token {end}"
            and record.finish_reason == "end_token"
        )
        assert record.tokens_returned == len(answer)
        assert record.raw_text.startswith("42<|") and "junk" not in record.raw_text


def test_text_ends_at_the_first_stop_string():
    harness = harness_of("llada")
    ids = harness.tokenizer.encode("so 42\nQuestion: and", add_special_tokens=False)
    record = read(harness, ids, stops=["Question:"])
    assert (record.text, record.cut, record.finish_reason) == (
        "so 42\n",
        "stop string 'Question:'",
        "stop_string",
    )
    assert harness._text(ids[: record.tokens_returned]).startswith("so 42\n")
    assert not harness._text(ids[: record.tokens_returned - 1]).startswith("so 42\n")
    assert "Question:" in record.raw_text


def test_open_positions_are_no_text():
    """A row that left early has mask ids behind its end: they must not be decoded."""
    harness = harness_of("dream")
    ids = harness.tokenizer.encode("all of it", add_special_tokens=False)
    mask = harness.model_config.mask_id
    record = read(harness, [*ids, mask, mask], open_from=len(ids))
    assert record.text == record.raw_text == "all of it" and record.tokens_committed == len(ids)


def test_a_full_canvas_is_said():
    harness = harness_of("dream")
    record = read(harness, harness.tokenizer.encode("no end", add_special_tokens=False))
    assert record.cut is None and record.finish_reason == "length"


# ---------------------------------------------------------------- requests -> decode


def test_prefill_is_appended_as_it_is():
    """LLaDA's template trims content, and would glue the first line of code to the fence."""
    harness = harness_of("llada", prefill=lambda doc: f"```python\n{doc['code']}\n")
    prompt = harness.apply_chat_template([{"role": "user", "content": "Go"}])
    harness.generate_until([request(prompt, doc={"code": "def f():"})], disable_tqdm=True)
    [record] = harness.records
    assert record.prompt == prompt + "```python\ndef f():\n"
    assert record.prompt_tokens == len(
        harness.tokenizer.encode(record.prompt, add_special_tokens=False)
    )


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
    harness.tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    with pytest.raises(BadDataError, match="no system"):
        harness.apply_chat_template(chat)
    harness.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(BadDataError, match="drops a message of role 'system'"):
        harness.apply_chat_template(chat)


def test_prompt_that_does_not_fit_is_reported_before_the_model_loads():
    """It is never cut in silence: the head of a prompt is its instructions."""
    harness = harness_of("llada", load=lambda: pytest.fail("loaded"))
    harness.model_config = replace(harness.model_config, max_length=40)
    with pytest.raises(
        UsageError,
        match=r"1 prompts do not fit.*canvas of 16 .* 40 positions; documents 7 \(\d+ tokens\)",
    ):
        harness.generate_until(
            [request("a b", 6), request("a b c d e " * 20, 7)], disable_tqdm=True
        )


def test_model_loads_for_the_first_sample_that_needs_it(tmp_path):
    """Scoring anew what is kept already must not read 16 GB."""
    loads = []

    def load():
        loads.append(1)
        return models.load_model(LLADA, device="cpu", dtype="float32")[0]

    with Store.open(tmp_path, {}, "f" * 64) as store:
        texts = harness_of("llada", ledger=SampleCache("f" * 64, store)).generate_until(
            [request("a")], disable_tqdm=True
        )
        harness = harness_of("llada", load=load, ledger=SampleCache("f" * 64, store))
        assert harness.generate_until([request("a")], disable_tqdm=True) == texts and loads == []
        harness.generate_until([request("a"), request("b", 1)], disable_tqdm=True)
        harness.generate_until([request("c")], disable_tqdm=True)
    assert loads == [1]


def test_loglikelihood_raises():
    """The stock method returns a plausible number."""
    for lm in (harness_of("llada"), Predictions({})):
        for method in (lm.loglikelihood, lm.loglikelihood_rolling):
            with pytest.raises(NotImplementedError):
                method([])


def test_harness_refuses_the_other_family():
    with pytest.raises(UsageError, match="dream family"):
        LladaHarness(
            models.load_tokenizer(DREAM), models.read_config(DREAM), None, load=None, device="cpu"
        )


def test_repeats_differ_and_requests_keep_their_order():
    """lm-eval repeats one Instance object; each repeat is a sample of its own, with a seed of its own."""
    harness = harness_of("llada", temperature=1.0, gen_length=8)
    a, b = request("one two three", 0), request("x", 1)
    texts = harness.generate_until([a, a, b], disable_tqdm=True)
    records = {(r.doc_id, r.repeat): r for r in harness.records}
    assert texts == [records[0, 0].text, records[0, 1].text, records[1, 0].text]
    assert records[0, 0].seed == sample_seed(0, "one two three", 0) != records[0, 1].seed
    assert records[0, 0].token_ids != records[0, 1].token_ids


def test_one_failing_sample_does_not_take_the_others_with_it(monkeypatch):
    import harness as module

    real, harness = module.decode_each, harness_of("llada", gen_length=8)
    bad = harness.tokenizer.encode("bad", add_special_tokens=False)

    def failing(model, prompts, *more, **options):
        if bad in prompts:
            raise RuntimeError("boom")
        return real(model, prompts, *more, **options)

    monkeypatch.setattr(module, "decode_each", failing)
    texts = harness.generate_until(
        [request("good", 0), request("bad", 1), request("fine", 2)], disable_tqdm=True
    )
    status = {r.doc_id: r.error for r in harness.records}
    assert (
        status[0] is None
        and status[2] is None
        and "RuntimeError: boom" in status[1]
        and texts[1] == ""
    )
    assert harness.profile()["samples"] == 2


def test_error_of_the_project_is_no_failed_sample():
    """A full disk while samples are kept must end the run, not fill the result with failed samples."""
    harness = harness_of("llada", gen_length=4)

    def full(*_):
        raise BadDataError("no space")

    harness.ledger.remember = full
    with pytest.raises(BadDataError):
        harness.generate_until([request("a")], disable_tqdm=True)


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
    """Stop strings of one and several letters, on random weights, which produce every letter soon."""
    prompts = [f"Question {i}: what?" for i in range(6)]
    for stops in (["e"], ["\n", "th", "e t"], ["1", "ing", " "]):
        outcome = {}
        for early in (True, False):
            harness = harness_of(family, gen_length=24, algorithm=algorithm, k=k, early_exit=early)
            texts = harness.generate_until(
                [request(p, i, stops) for i, p in enumerate(prompts)], disable_tqdm=True
            )
            records = sorted(harness.records, key=lambda r: r.doc_id)
            outcome[early] = (
                (texts, [(r.cut, r.finish_reason, r.tokens_returned) for r in records]),
                sum(r.nfe for r in records),
            )
        assert outcome[True][0] == outcome[False][0]
        assert (
            outcome[True][1] < outcome[False][1] or algorithm == "entropy"
        )  # the whole canvas as one block saves little


# ---------------------------------------------------------------- what it cost


def test_profile_has_one_definition():
    done = dict(prompt="", tokens_committed=8, positions_computed=100)
    records = [
        Record(
            0, 0, **done, tokens_returned=6, nfe=4, seconds=1.0, cost_seconds=0.5, forwards_saved=2
        ),
        Record(1, 0, **done, tokens_returned=2, nfe=4, seconds=3.0, cost_seconds=1.5),
        Record(2, 0, "", error="Traceback"),
    ]
    p = profile(records, peak_bytes={"device": None, "host": 1})
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


@real_data
@pytest.mark.parametrize(
    "alias, flag, checkpoint", [("llada", "--llada_ckpt", LLADA), ("dream", "--dream_ckpt", DREAM)]
)
@pytest.mark.parametrize("task", ["humaneval", "mbpp", "gsm8k", "truthfulqa"])
def test_end_to_end_offline_on_the_real_benchmarks(
    tmp_path, no_network, capsys, alias, flag, checkpoint, task
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
        REAL,
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
        result["schema_version"] == 1
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
            config_id="x",
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
            records=[Record(0, 0, "")],
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
    with pytest.raises(BadDataError, match="schema_version 99, this program writes 1"):
        load_result(tmp_path / "r.json")
    assert load_result(tmp_path / "none.json") is None
