"""Every broken checkpoint is refused with its reason before weights are loaded."""

import json
import os
import re

import pytest
import torch
from checkpoint_files import INDEX, SHARDS, edit, edit_tensors, refused

from models import CheckpointError, check_checkpoint, load_model, load_tokenizer

# ---- config.json


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'; supported: llada, Dream"),
        ({"model_type": ...}, r"model_type is None; supported"),
        ({"block_type": "sequential"}, r"block_type is 'sequential'; supported: 'llama'"),
        ({"block_type": ...}, r"block_type is 'sequential'"),
        ({"alibi": True}, r"alibi is True; supported: False"),
        ({"attention_layer_norm": True}, r"attention_layer_norm is True"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling is \{'type': 'yarn'\}"),
        ({"include_bias": True}, r"include_bias is True"),
        ({"rope_full_precision": False}, r"rope_full_precision is False"),
        ({"multi_query_attention": True}, r"multi_query_attention is True"),
        ({"sliding_window": 512}, r"sliding_window is 512"),
        ({"scale_logits": True}, r"scale_logits is True"),
        (
            {"layer_norm_type": "low_precision"},
            r"layer_norm_type is 'low_precision'; supported: 'rms'",
        ),
        ({"activation_type": "gelu"}, r"activation_type is 'gelu'"),
        ({"mask_token_id": ...}, r"mask_token_id is missing; it must be an integer from 0"),
        ({"mask_token_id": 9999}, r"mask_token_id 9999 is beyond the 520 rows"),
        (
            {"mask_token_id": 506},
            r"mask_token_id is 506, but the tokenizer files give <\|mdm_mask\|> the id 507",
        ),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'; it must be an integer"),
        ({"n_layers": 0}, r"n_layers is 0; it must be an integer from 1"),
        ({"n_layers": "three"}, r"n_layers is 'three'"),
        ({"n_layers": 10**6}, r"1000000 layers"),
        ({"d_model": True}, r"d_model is True"),
        ({"n_heads": 5}, r"width 64 is not a multiple of 5 heads"),
        ({"n_kv_heads": 3}, r"4 heads cannot share 3"),
        ({"rope_theta": -1}, r"rope_theta is -1; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan"),
        ({"rope_theta": 10**400}, r"rope_theta is 10{59}; it must be a number above 0"),
        ({"weight_tying": "no"}, r"weight_tying is 'no'; it must be true or false"),
        (
            {"embedding_size": 504},
            r"token ids beyond the 504 rows of the embedding: .*<\|mdm_mask\|> 507",
        ),
    ],
)
def test_llada_configs_that_are_not_computed_here(llada, changes, pattern):
    """A field that changes the computation is an error that names it, never ignored."""
    edit(llada / "config.json", **changes)
    refused(llada, r"config\.json: " + pattern if "token ids" not in pattern else pattern)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"use_sliding_window": True}, r"use_sliding_window is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"rope_scaling is"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"use_mrope": True}, r"use_mrope is True"),
        ({"full_attn_mask": False}, r"full_attn_mask is False"),
        ({"num_key_value_heads": ...}, r"num_key_value_heads is missing"),
        ({"head_dim": 15}, r"head width 15 is odd"),
        ({"mask_token_id": None}, r"mask_token_id is missing"),
    ],
)
def test_dream_configs_that_are_not_computed_here(dream, changes, pattern):
    edit(dream / "config.json", **changes)
    refused(dream, r"config\.json: " + pattern)


def test_all_problems_are_reported_at_once(llada):
    edit(llada / "config.json", alibi=True, n_layers=-1, mask_token_id=...)
    (llada / SHARDS[0]).unlink()
    (llada / SHARDS[1]).write_bytes(b"")
    (llada / "tokenizer.json").unlink()
    no_tokenizer = "tokenizer files not found.*tokenizer.json"
    problems = refused(llada, "alibi", "n_layers", "mask_token_id", no_tokenizer, SHARDS[0])
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON object is needed, not a list"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "git-LFS pointer.*run git lfs pull",
        ),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", INDEX])
def test_json_files_that_are_something_else(llada, file, content, pattern):
    (llada / file).write_bytes(content)
    refused(llada, rf"{re.escape(file)}: .*{pattern}")


@pytest.mark.parametrize("file", ["config.json", INDEX, "tokenizer.json"])
def test_a_fifo_is_no_file_of_a_checkpoint(llada, file):
    """Reading one never ends."""
    (llada / file).unlink()
    os.mkfifo(llada / file)
    assert check_checkpoint(llada)


# ---- weights

BROKEN = r"its \d+ bytes are not a whole safetensors file: .*; download it again"


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda data: data[: len(data) // 2], BROKEN),
        (lambda data: data[:-1], BROKEN),
        (lambda data: data[:100], BROKEN),
        (lambda data: data[:5], BROKEN),
        (lambda data: b"", "is empty"),
        (lambda data: data + b"\0\0", BROKEN),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (lambda data: b"\n<html><body>404</body></html>", "HTML page"),
        (lambda data: b"\xff" * 8 + data[8:], BROKEN),
        (lambda data: data[:8] + b"x" + data[9:], BROKEN),
        (lambda data: data[:8] + b"\xff" + data[9:], BROKEN),
        (
            lambda data: data.replace(b'"F32"', b'"I32"', 1),
            "dtype I32; supported: F64, F32, F16, BF16",
        ),
        (lambda data: data.replace(b'"F32"', b'"BF16"', 1), BROKEN),
        (lambda data: data.replace(b'"shape":[64', b'"shape":[65', 1), BROKEN),
        (lambda data: data.replace(b'"shape":[64', b'"shape":"64', 1), BROKEN),
        (lambda data: data.replace(b'"shape":[64', b'"shape":[-1', 1), BROKEN),
    ],
)
@pytest.mark.parametrize("file", SHARDS)
def test_damaged_shards(llada, file, damage, pattern):
    path = llada / file
    path.write_bytes(damage(path.read_bytes()))
    problems = refused(llada, rf"{re.escape(file)}: .*(?:{pattern})")
    assert len(problems) == 1


def test_a_shard_that_the_index_names_is_missing(llada):
    (llada / SHARDS[1]).unlink()
    refused(llada, rf"{SHARDS[1]} is named in {INDEX} but missing")


def test_an_index_may_not_leave_the_directory(llada):
    (llada / INDEX).write_text(json.dumps({"weight_map": {"a": "../llada-tiny/" + SHARDS[0]}}))
    refused(llada, "shard names with a path")
    (llada / INDEX).write_text("{}")
    refused(llada, "no weight_map")


def test_weights_in_another_format_are_named(dream):
    (dream / "model.safetensors").rename(dream / "pytorch_model.bin")
    refused(dream, r"neither model\.safetensors nor .*; there are pytorch_model\.bin")


def test_missing_unexpected_repeated_and_misshapen_tensors_are_listed(llada):
    def change(tensors):
        del tensors["model.transformer.blocks.0.attn_out.weight"]
        tensors["model.transformer.blocks.9.extra.weight"] = torch.zeros(2)
        tensors["model.transformer.ln_f.weight"] = torch.zeros(64)  # also in the other shard
        tensors["model.transformer.blocks.0.up_proj.weight"] = torch.zeros(160, 63)

    edit_tensors(llada / SHARDS[0], change)
    problems = refused(
        llada,
        r"^1 tensors missing: model\.transformer\.blocks\.0\.attn_out\.weight$",
        r"^1 tensors unexpected: model\.transformer\.blocks\.9\.extra\.weight$",
        r"^1 tensors repeated: model\.transformer\.ln_f\.weight$",
        r"^1 tensors wrong shape: model\.transformer\.blocks\.0\.up_proj\.weight "
        r"\[160, 63\] instead of \[160, 64\]$",
    )
    assert len(problems) == 4


def test_a_config_of_another_size_does_not_load(dream):
    edit(dream / "config.json", num_hidden_layers=4, intermediate_size=128)
    problems = refused(dream, r"12 tensors missing: model\.layers\.3\.", r"9 tensors wrong shape: ")
    edit(dream / "config.json", num_hidden_layers=40)
    assert (
        any("and 424 more" in p for p in refused(dream, "444 tensors missing"))
        and len(problems) == 2
    )


# ---- tokenizer files


def test_tokenizer_files_missing(llada, dream):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (llada / file).rename(llada / "aside")
        refused(llada, rf"tokenizer files not found in .*: {re.escape(file)}")
        (llada / "aside").rename(llada / file)
    (dream / "vocab.json").unlink()
    (dream / "merges.txt").unlink()
    refused(dream, r"tokenizer files not found in .*: vocab\.json, merges\.txt")


def test_tokenizer_files_that_do_not_fit(dream, llada):
    edit(dream / "vocab.json", zzz=600)
    refused_checks = check_checkpoint(dream)
    assert refused_checks == ["vocab.json: token id 600 is beyond the 519 rows of the embedding"]
    with pytest.raises(CheckpointError):
        load_model(dream, device="cpu", dtype="float32")
    edit(dream / "vocab.json", zzz=...)
    edit(dream / "added_tokens.json", **{"<|im_end|>": 503})
    refused(dream, r"give <\|im_end\|> two ids: 502, and 503 in added_tokens\.json")
    (dream / "added_tokens.json").unlink()
    (dream / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert check_checkpoint(dream) == [
        'merges.txt: is a git-LFS pointer (it starts with "version https://git-lfs"); '
        "run git lfs pull"
    ]
    tokenizer = json.loads((llada / "tokenizer.json").read_text())
    del tokenizer["model"]
    (llada / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "malformed tokenizer files" in check_checkpoint(llada)[0]
    with pytest.raises(CheckpointError, match="malformed tokenizer files"):
        load_tokenizer(llada)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        *(({"chat_template": t}, "chat_template is .*; it must be a text") for t in (5, [1], {})),
        ({"chat_template": [{"name": "a"}]}, "a list of texts with names"),
        ({"bos_token": 5}, "bos_token is 5; it must be a text"),
        ({"eos_token": {"lstrip": True}}, "eos_token is .*; it must be a text"),
        ({"additional_special_tokens": 5}, "it must be a list of texts"),
        ({"model_max_length": "x"}, "model_max_length is 'x'; it must be a number"),
        ({"padding_side": "up"}, "it must be left or right"),
    ],
)
def test_tokenizer_settings_of_another_type(llada, changes, pattern):
    """They failed in transformers, some of them with exit code 1."""
    edit(llada / "tokenizer_config.json", **changes)
    [problem] = check_checkpoint(llada)
    assert re.search(rf"^tokenizer_config\.json: .*{pattern}", problem)
    with pytest.raises(CheckpointError, match=pattern):
        load_tokenizer(llada)


def test_special_tokens_that_the_files_lack(llada):
    config = json.loads((llada / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["506"]
    (llada / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((llada / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] != 506]
    (llada / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(llada, r"no token <\|eot_id\|>")
