"""experiment/config.py: what identifies an experiment, and how its result is named."""

from dataclasses import replace

import pytest

from decoding.config import DecodeConfig
from decoding.schedule import make_schedule
from experiment import config as module
from experiment.config import RunConfig, result_name, run_lengths

DECODE = DecodeConfig(make_schedule("low_confidence", 64, 32, 2))
CONFIG = RunConfig(
    model_alias="llada",
    family="llada",
    checkpoint="/a",
    task="gsm8k",
    protocol="uniform",
    prompt_form="chat",
    num_fewshot=0,
    chat_template=True,
    system=None,
    decode=DECODE,
    dtype="float32",
    fingerprint={
        "path": "/a",
        "revision": None,
        "files": {"config.json": "1"},
        "shards": {"a": "1"},
    },
    data={"f": "1"},
)


def decoding(**change) -> RunConfig:
    return replace(CONFIG, decode=replace(DECODE, **change))


@pytest.mark.parametrize(
    "other",
    [
        replace(CONFIG, seed=1),
        replace(CONFIG, dtype="bfloat16"),
        replace(CONFIG, compile=True),
        replace(CONFIG, protocol="official"),
        replace(CONFIG, data={"f": "2"}),
        replace(CONFIG, predictions="abc", decode=None),
        replace(CONFIG, plugins=({"path": "/p.py", "sha256": "1"},)),
        decoding(schedule=make_schedule("low_confidence", 64, 32, 1)),
        decoding(schedule=make_schedule("threshold", 64, 32, 2)),
        decoding(temperature=0.1),
        decoding(confidence_dtype="model"),
        decoding(early_exit=False),
        decoding(kv_cache="dual"),
        decoding(kv_cache="dual", cache_refresh=4),
        decoding(logits_eos_inf=True),
        decoding(schedule=make_schedule("threshold", 64, 32, 2), given=(("threshold", 0.5),)),
    ],
)
def test_generation_id_changes_with_everything_that_can_change_a_token(other):
    assert other.generation_id != CONFIG.generation_id
    assert other.result_id != CONFIG.result_id


def test_options_that_are_off_are_left_out():
    left_out = {"kv_cache", "cache_refresh", "options", "compile", "plugins", "verifier", "top_p"}
    assert not left_out & CONFIG.as_dict().keys()
    told = decoding(kv_cache="dual").as_dict() | replace(CONFIG, compile=True).as_dict()
    assert {"kv_cache", "compile", "temperature", "seed", "early_exit"} <= told.keys()


@pytest.mark.parametrize(
    "other",
    [
        replace(CONFIG, model_alias="mine"),
        replace(CONFIG, checkpoint="../a"),
        decoding(schedule=make_schedule("low_confidence", 64, 32, num_steps=32)),
        replace(CONFIG, strict_exec=True),
    ],
)
def test_generation_id_ignores_names_and_scoring(other):
    """Two ways to write one experiment must find each other's samples."""
    assert other.generation_id == CONFIG.generation_id


def test_result_id_is_the_scorings_too(monkeypatch):
    assert replace(CONFIG, strict_exec=True).result_id != CONFIG.result_id
    before = CONFIG.generation_id, CONFIG.result_id
    monkeypatch.setattr(module, "SCORING_VERSION", module.SCORING_VERSION + 1)
    mended = replace(CONFIG)
    assert (mended.generation_id, mended.result_id) != before
    assert mended.generation_id == before[0]


def test_a_plugin_is_its_bytes_and_not_its_path():
    def at(path, digest):
        return replace(CONFIG, plugins=({"path": path, "sha256": digest},)).generation_id

    assert at("/x/a.py", "1") == at("/y/b.py", "1") != at("/x/a.py", "2")


def test_id_goes_by_what_a_checkpoint_holds_and_not_by_where_it_lies():
    """A hub snapshot is its commit, also before it is downloaded; a directory its contents."""

    def at(path, revision, shards):
        found = {"path": path, "revision": revision, "files": {}, "shards": shards}
        return replace(CONFIG, fingerprint=found).generation_id

    assert at("/x", "c1", {}) == at("/y", "c1", {"a": "1"}) != at("/x", "c2", {})
    assert at("/x", None, {"a": "1"}) == at("/y", None, {"a": "1"}) != at("/x", None, {"a": "2"})


def test_id_of_predictions_ignores_decoding():
    texts = replace(CONFIG, predictions="abc", decode=None)
    assert replace(texts, seed=5, dtype="float16").result_id == texts.result_id


def test_ids_are_stable():
    """An id that changes by itself would make every kept sample foreign: raise a version."""
    assert (CONFIG.generation_id, CONFIG.result_id) == (
        "06e39aced27fb399295a8e7e864943b59ff79e6c9d2ed9227987e4ceb7595bbe",
        "f833dd9977a7cbde77752e80c040c19992c73a565db3bb5607cdebbc4e629ce2",
    )


@pytest.mark.parametrize(
    "schedule, tag, limit, name",
    [
        ({"tokens_per_step": 2}, None, None, "llada_gsm8k_low_confidence_tps2_float32.json"),
        ({"tokens_per_step": 2}, "x", 5, "llada_gsm8k_low_confidence_tps2_float32_x_limit5.json"),
        ({"num_steps": 16}, None, None, "llada_gsm8k_low_confidence_tps4_float32.json"),
        ({"num_steps": 22}, None, None, "llada_gsm8k_low_confidence_tps2.90909_float32.json"),
    ],
)
def test_result_name(schedule, tag, limit, name):
    config = decoding(schedule=make_schedule("low_confidence", 64, 32, **schedule))
    assert result_name(config, tag=tag, limit=limit) == name


@pytest.mark.parametrize(
    "change, part",
    [
        ({"kv_cache": "dual"}, "dual"),
        ({"kv_cache": "prefix", "cache_refresh": 4}, "prefix_refresh4"),
        ({"given": (("threshold", 0.5),)}, ""),
    ],
)
def test_options_and_cache_are_part_of_the_name(change, part):
    config = decoding(schedule=make_schedule("threshold", 64, 32, 2), **change)
    share = dict(change.get("given", ())).get("threshold", 0.9)
    middle = f"threshold{share:g}" + (f"_{part}" if part else "")
    assert result_name(config) == f"llada_gsm8k_threshold_{middle}_tps2_float32.json"


def test_a_plugin_is_part_of_the_name():
    config = replace(CONFIG, plugins=({"path": "/home/me/my rule.py", "sha256": "0"},))
    assert "_float32_my-rule.json" in result_name(config)


def test_a_window_is_part_of_the_caches_name():
    schedule = make_schedule("leftright", 64, tokens_per_step=2)
    config = decoding(schedule=schedule, kv_cache="window", kv_window=8, max_lookahead=5)
    assert result_name(config) == "llada_gsm8k_leftright_window8_lookahead5_tps2_float32.json"


def test_result_name_of_predictions_has_no_schedule():
    config = replace(CONFIG, decode=None, predictions="abc")
    assert result_name(config, limit=2) == "llada_gsm8k_predictions_limit2.json"


@pytest.mark.parametrize(
    "change, defaults, part",
    [
        ({"dtype": "bfloat16"}, {}, ""),
        ({}, {"dtype": "float32"}, ""),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, "_bfloat16"),
        ({}, {}, "_float32"),
        ({"protocol": "official"}, {}, "_float32_official"),
        ({"protocol": "official"}, {"data": "my set"}, "_float32_official_my-set"),
        ({"protocol": "official"}, {"data": "mini", "tag": "t"}, "_float32_official_mini_t"),
        ({"checkpoint": "/elsewhere", "fingerprint": None, "data": None}, {}, "_float32"),
    ],
)
def test_a_name_has_the_dtype_the_protocol_and_the_data_that_are_no_defaults(
    change, defaults, part
):
    name = result_name(replace(CONFIG, **change), **defaults)
    assert name == f"llada_gsm8k_low_confidence_tps2{part}.json"


def test_rows_of_the_hub_are_in_the_result_id_alone():
    """A changed gold answer is scored anew; a changed prompt has a key of its own."""
    unread, one, other = (
        replace(CONFIG, data={"hub": "a/b"} | rows) for rows in ({}, {"rows": "1"}, {"rows": "2"})
    )
    assert unread.generation_id == one.generation_id == other.generation_id
    assert len({unread.result_id, one.result_id, other.result_id}) == 3


def test_run_lengths():
    assert run_lengths((0, 1, 1, 1, 2)) == "0,1x3,2"
