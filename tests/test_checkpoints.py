"""Checkpoints: what is accepted, and what every broken one says before any weights are loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CheckpointError, check_checkpoint, fingerprint, load_model, load_tokenizer, read_config

ROOT = Path(__file__).resolve().parent.parent
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["llada-tiny", "dream-tiny"])
def either(request, conformance_dir, tmp_path) -> Path:
    return copied(conformance_dir / request.param, tmp_path)


@pytest.fixture
def llada(conformance_dir, tmp_path) -> Path:
    return copied(conformance_dir / "llada-tiny", tmp_path)


@pytest.fixture
def dream(conformance_dir, tmp_path) -> Path:
    return copied(conformance_dir / "dream-tiny", tmp_path)


def copied(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / source.name
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def edit(path: Path, **changes) -> None:
    """Set keys of a JSON object; ... deletes."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, *patterns: str) -> list[str]:
    """check_checkpoint names each of `patterns`, and load_model raises the first problem at least."""
    problems = check_checkpoint(folder)
    for pattern in patterns:
        assert any(re.search(pattern, p) for p in problems), (pattern, problems)
    assert all("\n" not in p for p in problems)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu", dtype="float32")
    assert caught.value.problems and set(caught.value.problems) <= set(problems)
    return problems


# ---- what is accepted


def test_good_checkpoints_have_no_problems(either):
    assert check_checkpoint(either) == [] == check_checkpoint(str(either))


def logits_of(folder: Path, dtype="float32") -> torch.Tensor:
    model, _ = load_model(folder, device="cpu", dtype=dtype)
    return model.logits(torch.arange(5, 30)[None]).float()


def test_one_file_and_shards_are_the_same(llada, dream):
    expected = logits_of(llada)
    save_file(load_file(llada / SHARDS[0]) | load_file(llada / SHARDS[1]), llada / "model.safetensors")
    for name in (*SHARDS, INDEX):
        (llada / name).unlink()
    assert check_checkpoint(llada) == [] and torch.equal(logits_of(llada), expected)

    expected, tensors = logits_of(dream), load_file(dream / "model.safetensors")
    (dream / "model.safetensors").unlink()
    split = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in split.items():
        save_file({name: tensors[name] for name in names}, dream / file)
    weight_map = {name: file for file, names in split.items() for name in names}
    (dream / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert check_checkpoint(dream) == [] and torch.equal(logits_of(dream), expected)


def test_llada_names_with_and_without_the_leading_model(llada):
    expected = logits_of(llada)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(llada / SHARDS[0], rename)
    assert torch.equal(logits_of(llada), expected)


def test_weights_are_cast_to_the_asked_dtype(either):
    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    from_float32 = logits_of(either, "bfloat16")
    for path in either.glob("*.safetensors"):
        edit_tensors(path, halve)
    assert read_config(either).dtype_on_disk == "bfloat16"
    assert torch.equal(logits_of(either, torch.bfloat16), from_float32)
    assert logits_of(either, "float16").isfinite().all()
    with pytest.raises(ValueError, match="unknown dtype 'int8'; there are: float32, float16, bfloat16"):
        load_model(either, device="cpu", dtype="int8")


def test_llada_with_biases_in_its_attention(llada):
    """include_qkv_bias adds three vectors to each layer; zeros change nothing, others do."""
    expected = logits_of(llada)
    edit(llada / "config.json", include_qkv_bias=True)
    refused(llada, r"9 tensors missing: model\.transformer\.blocks\.0\.q_proj\.bias, ")

    def zeros(tensors):
        for i in range(3):
            for m in "qkv":
                tensors[f"model.transformer.blocks.{i}.{m}_proj.bias"] = torch.zeros(64)

    edit_tensors(llada / SHARDS[0], zeros)
    assert torch.equal(logits_of(llada), expected)


def test_tied_embeddings(dream):
    tensors = load_file(dream / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dream / "model.safetensors")
    expected = logits_of(dream)
    edit(dream / "config.json", tie_word_embeddings=True)
    refused(dream, "1 tensors unexpected: lm_head.weight")
    edit_tensors(dream / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    assert check_checkpoint(dream) == [] and torch.equal(logits_of(dream), expected)


def test_diffucoder_ends_at_its_pad_token_too(dream):
    edit(dream / "added_tokens.json", **{"<|dlm_pad|>": 507})
    assert read_config(dream).end_ids == (500, 502, 507)
    assert load_tokenizer(dream)("<|dlm_pad|>")["input_ids"] == [507]


def test_added_tokens_from_either_file(dream):
    """Older checkpoints have no added_tokens_decoder, some no added_tokens.json."""
    text = "it's <|im_end|> <|mask|> so"
    expected = load_tokenizer(dream)(text)["input_ids"]
    (dream / "added_tokens.json").rename(dream / "aside")
    assert load_tokenizer(dream)(text)["input_ids"] == expected
    (dream / "aside").rename(dream / "added_tokens.json")
    edit(dream / "tokenizer_config.json", added_tokens_decoder=...)
    assert load_tokenizer(dream)(text)["input_ids"] == expected
    assert load_tokenizer(dream).decode(expected, skip_special_tokens=True) == "it's   so"


def test_a_template_in_its_own_file_wins(either):
    (either / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(either)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_a_window_that_is_switched_off_is_no_window(dream):
    edit(dream / "config.json", sliding_window=4096, use_sliding_window=False)
    assert check_checkpoint(dream) == []


def test_fingerprint_changes_with_the_small_files_and_names_the_shards(llada):
    before = fingerprint(llada)
    assert before["path"] == str(llada.resolve()) and before["revision"] is None
    assert set(before["shards"]) == set(SHARDS) and before["shards"][SHARDS[0]] == (llada / SHARDS[0]).stat().st_size
    assert {"config.json", "tokenizer.json", INDEX} <= before["files"].keys()
    edit(llada / "config.json", note="changed")
    after = fingerprint(llada)
    assert [name for name in before["files"] if before["files"][name] != after["files"][name]] == ["config.json"]


# ---- where it is


def test_no_such_directory(tmp_path):
    missing = tmp_path / "nowhere"
    assert check_checkpoint(missing) == [f"model path {missing} does not exist"]
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in check_checkpoint(file)[0]
    assert "config.json not found" in check_checkpoint(tmp_path)[0]
    for call in (read_config, load_tokenizer, fingerprint):
        with pytest.raises(CheckpointError, match="does not exist"):
            call(missing)


def test_a_hub_id_offline_and_not_cached():
    [problem] = check_checkpoint("some-owner/some-model")
    assert "some-owner/some-model" in problem and "not in the local cache" in problem and "HF_HUB_OFFLINE=1" in problem


def test_a_revision_of_a_local_directory_is_not_ignored(llada):
    assert "revision 'main' given" in check_checkpoint(llada, "main")[0]


def in_cache(folder: Path, home: Path, commit: str = "1" * 40) -> None:
    """Lay the checkpoint out as the hub's cache has it."""
    repo = home / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit, copy_function=shutil.copyfile)


def offline_python(code: str, home: Path) -> str:
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_cached_hub_id_loads_offline(llada, tmp_path):
    """HF_HOME is honoured; the snapshot's commit is the revision; a shard that is not cached is missed."""
    home = tmp_path / "home"
    in_cache(llada, home)
    code = (
        "from models import check_checkpoint, fingerprint, load_model\n"
        "print(check_checkpoint('owner/tiny'), fingerprint('owner/tiny')['revision'][:4])\n"
        "print(load_model('owner/tiny', device='cpu', dtype='float32')[1].name_or_path)"
    )
    assert offline_python(code, home).split("\n") == ["[] 1111", "owner/tiny"]
    (home / "hub/models--owner--tiny/snapshots" / ("1" * 40) / SHARDS[1]).unlink()
    told = offline_python("from models import check_checkpoint; print(check_checkpoint('owner/tiny'))", home)
    assert f"{SHARDS[1]} is named in {INDEX} but missing" in told


def test_checking_imports_neither_torch_nor_transformers(conformance_dir):
    """It runs before anything heavy, so that bad input answers at once."""
    code = (
        "import sys; from models import check_checkpoint, read_config, fingerprint, ModelConfig, Span, CheckpointError\n"
        f"p = {str(conformance_dir / 'dream-tiny')!r}; assert check_checkpoint(p) == []; read_config(p); fingerprint(p)\n"
        "check_checkpoint('owner/name')\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    assert offline_python(code, ROOT) == "[]"


# ---- config.json


@pytest.mark.parametrize(("changes", "pattern"), [
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
    ({"layer_norm_type": "low_precision"}, r"layer_norm_type is 'low_precision'; supported: 'rms'"),
    ({"activation_type": "gelu"}, r"activation_type is 'gelu'"),
    ({"mask_token_id": ...}, r"mask_token_id is missing; it must be an integer from 0"),
    ({"mask_token_id": 9999}, r"mask_token_id 9999 is beyond the 520 rows"),
    ({"mask_token_id": 506}, r"mask_token_id is 506, but the tokenizer files give <\|mdm_mask\|> the id 507"),
    ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>'; it must be an integer"),
    ({"n_layers": 0}, r"n_layers is 0; it must be an integer from 1"),
    ({"n_layers": "three"}, r"n_layers is 'three'"),
    ({"n_layers": 10**6}, r"1000000 layers"),
    ({"d_model": True}, r"d_model is True"),
    ({"n_heads": 5}, r"width 64 is not a multiple of 5 heads"),
    ({"n_kv_heads": 3}, r"4 heads cannot share 3"),
    ({"rope_theta": -1}, r"rope_theta is -1; it must be a number above 0"),
    ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan"),
    ({"weight_tying": "no"}, r"weight_tying is 'no'; it must be true or false"),
    ({"embedding_size": 504}, r"token ids beyond the 504 rows of the embedding: .*<\|mdm_mask\|> 507"),
])
def test_llada_configs_that_are_not_computed_here(llada, changes, pattern):
    """A field that changes the computation is an error that names it, never ignored."""
    edit(llada / "config.json", **changes)
    refused(llada, r"config\.json: " + pattern if "token ids" not in pattern else pattern)


@pytest.mark.parametrize(("changes", "pattern"), [
    ({"use_sliding_window": True}, r"use_sliding_window is True"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"rope_scaling is"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
    ({"use_mrope": True}, r"use_mrope is True"),
    ({"full_attn_mask": False}, r"full_attn_mask is False"),
    ({"num_key_value_heads": ...}, r"num_key_value_heads is missing"),
    ({"head_dim": 15}, r"head width 15 is odd"),
    ({"mask_token_id": None}, r"mask_token_id is missing"),
])
def test_dream_configs_that_are_not_computed_here(dream, changes, pattern):
    edit(dream / "config.json", **changes)
    refused(dream, r"config\.json: " + pattern)


def test_all_problems_are_told_at_once(llada):
    edit(llada / "config.json", alibi=True, n_layers=-1, mask_token_id=...)
    (llada / SHARDS[0]).unlink()
    (llada / SHARDS[1]).write_bytes(b"")
    (llada / "tokenizer.json").unlink()
    problems = refused(llada, "alibi", "n_layers", "mask_token_id", "tokenizer files not found.*tokenizer.json", SHARDS[0])
    assert len(problems) == 5


@pytest.mark.parametrize(("content", "pattern"), [
    (b"", "is empty"),
    (b"{", "not valid JSON"),
    (b"[1]", "a JSON object is needed, not a list"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"<!DOCTYPE html><html>", "HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer.*run git lfs pull"),
])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", INDEX])
def test_json_files_that_are_something_else(llada, file, content, pattern):
    (llada / file).write_bytes(content)
    refused(llada, rf"{re.escape(file)}: .*{pattern}")


# ---- weights


@pytest.mark.parametrize(("damage", "pattern"), [
    (lambda data: data[: len(data) // 2], r"truncated: 0\.\d+ of 0\.\d+ MB of tensor data|truncated: \d+\.\d+ of .* kB"),
    (lambda data: data[:-1], "truncated"),
    (lambda data: data[:100], "truncated: .* of the header alone"),
    (lambda data: data[:5], "not a safetensors file: 5 bytes"),
    (lambda data: b"", "is empty"),
    (lambda data: data + b"\0\0", "2 bytes more than its header describes"),
    (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    (lambda data: b"\n<html><body>404</body></html>", "HTML page"),
    (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file"),
    (lambda data: data[:8] + b"x" + data[9:], "bad safetensors header"),
    (lambda data: data[:8] + b"\xff" + data[9:], "bad safetensors header"),
    (lambda data: data.replace(b'"F32"', b'"I32"', 1), "dtype I32; supported: F64, F32, F16, BF16"),
    (lambda data: data.replace(b'"shape":[64', b'"shape":[65', 1), "bad safetensors header: tensor"),
    (lambda data: data.replace(b'"shape":[64', b'"shape":"64', 1), "bad safetensors header"),
])
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
        r"^1 tensors wrong shape: model\.transformer\.blocks\.0\.up_proj\.weight \[160, 63\] instead of \[160, 64\]$",
    )
    assert len(problems) == 4


def test_a_config_of_another_size_does_not_load(dream):
    edit(dream / "config.json", num_hidden_layers=4, intermediate_size=128)
    problems = refused(dream, r"12 tensors missing: model\.layers\.3\.", r"9 tensors wrong shape: ")
    edit(dream / "config.json", num_hidden_layers=40)
    assert any("and 424 more" in p for p in refused(dream, "444 tensors missing")) and len(problems) == 2


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
        'merges.txt: is a git-LFS pointer (it starts with "version https://git-lfs"); run git lfs pull'
    ]
    tokenizer = json.loads((llada / "tokenizer.json").read_text())
    del tokenizer["model"]
    (llada / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "malformed tokenizer files" in check_checkpoint(llada)[0]
    with pytest.raises(CheckpointError, match="malformed tokenizer files"):
        load_tokenizer(llada)


def test_special_tokens_that_the_files_lack(llada):
    config = json.loads((llada / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["506"]
    (llada / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((llada / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] != 506]
    (llada / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(llada, r"no token <\|eot_id\|>")
