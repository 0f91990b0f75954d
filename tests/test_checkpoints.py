"""Valid checkpoints: their forms and their places. test_bad_checkpoints.py has the broken ones."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from checkpoint_files import INDEX, SHARDS, edit, edit_tensors, refused
from safetensors.torch import load_file, save_file

from models import (
    FAMILIES,
    CheckpointError,
    check_checkpoint,
    digests,
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
)
from models.hub import hub_id

ROOT = Path(__file__).resolve().parent.parent


# ---- accepted forms


def test_good_checkpoints_have_no_problems(either):
    assert check_checkpoint(either) == [] == check_checkpoint(str(either))


def logits_of(folder: Path, dtype="float32") -> torch.Tensor:
    model, _ = load_model(folder, device="cpu", dtype=dtype)
    return model.logits(torch.arange(5, 30)[None]).float()


def test_one_file_and_shards_are_the_same(llada, dream):
    expected = logits_of(llada)
    save_file(
        load_file(llada / SHARDS[0]) | load_file(llada / SHARDS[1]), llada / "model.safetensors"
    )
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
    with pytest.raises(
        ValueError, match="unknown dtype 'int8'; there are: float32, float16, bfloat16"
    ):
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


def test_a_new_family_is_one_record(dream, monkeypatch):
    """Nothing in models/ knows a family by its name."""
    expected = logits_of(dream)
    record = replace(FAMILIES["dream"], name="mine", model_type="Mine", scores_the_draw=False)
    monkeypatch.setitem(FAMILIES, "mine", record)
    edit(dream / "config.json", model_type="mine")
    assert check_checkpoint(dream) == [] and torch.equal(logits_of(dream), expected)
    config = read_config(dream)
    assert (config.family, config.shift, config.scores_the_draw) == ("mine", True, False)


def test_a_template_in_its_own_file_wins(either):
    (either / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(either)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    )


def test_a_window_that_is_switched_off_is_no_window(dream):
    edit(dream / "config.json", sliding_window=4096, use_sliding_window=False)
    assert check_checkpoint(dream) == []


def test_fingerprint_changes_with_the_small_files_and_names_the_shards(llada):
    before = fingerprint(llada)
    assert before["path"] == str(llada.resolve()) and before["revision"] is None
    assert set(before["shards"]) == set(SHARDS)
    assert {"config.json", "tokenizer.json", INDEX} <= before["files"].keys()
    edit(llada / "config.json", note="changed")
    after = fingerprint(llada)
    assert [name for name in before["files"] if before["files"][name] != after["files"][name]] == [
        "config.json"
    ]
    assert before["shards"] == after["shards"]


def test_fingerprint_sees_every_byte_of_the_weights(llada):
    """A fine-tuned head or a zeroed row may lie anywhere in a tensor."""
    before, path = fingerprint(llada), llada / SHARDS[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = fingerprint(llada)
    assert before["shards"][SHARDS[0]] == after["shards"][SHARDS[0]]
    assert before["shards"][SHARDS[1]] != after["shards"][SHARDS[1]]
    assert after["shards"][SHARDS[1]] == hashlib.sha256(data).hexdigest()


def test_files_that_are_not_read_change_no_fingerprint(llada, dream):
    before = fingerprint(llada), fingerprint(dream)
    (llada / "notes.txt").write_text("x")
    shutil.copy(llada / SHARDS[0], llada / "old.safetensors")
    shutil.copy(llada / "config.json", llada / "training_args.json")
    (dream / INDEX).write_text("not read beside model.safetensors")
    assert (fingerprint(llada), fingerprint(dream)) == before


def no_hashing(*_):
    raise AssertionError("weights were hashed")


def test_weights_are_hashed_once(llada, monkeypatch):
    """The digests are in the user's cache: another process has them, a plan only reads them."""
    assert fingerprint(llada, hashing=False) is None
    found = fingerprint(llada)
    monkeypatch.setattr(digests, "_hashed", no_hashing)
    monkeypatch.setattr(digests, "_known", {})
    assert fingerprint(llada) == found == fingerprint(llada, hashing=False)
    os.utime(llada / SHARDS[0])
    assert fingerprint(llada, hashing=False) is None
    with pytest.raises(AssertionError, match="were hashed"):
        fingerprint(llada)


@pytest.mark.parametrize("content", [b"", b"[1]", b"[" * 100_000, b'{"a": 1}', b"\xff"])
def test_a_damaged_cache_of_digests_costs_a_hashing(llada, tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = fingerprint(llada)
    cache = tmp_path / "cache" / "dllmexp" / "digests.json"
    kept = cache.read_bytes()
    cache.write_bytes(content)
    monkeypatch.setattr(digests, "_known", {})
    assert fingerprint(llada) == expected and json.loads(cache.read_bytes()) == json.loads(kept)


def test_a_cache_that_cannot_be_written_costs_a_hashing_per_process(llada, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    expected = fingerprint(llada)
    monkeypatch.setattr(digests, "_hashed", no_hashing)
    assert fingerprint(llada) == expected


def test_processes_that_keep_digests_at_once_lose_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = (
        "import sys; from models import digests\n"
        "for i in range(20): digests.keep(f'{sys.argv[1]} {i}', 64 * sys.argv[1])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, n], cwd=ROOT) for n in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(digests.kept(f"{n} {i}" for n in "abc" for i in range(20))) == 60


def test_a_file_that_changes_while_it_is_hashed_is_refused(llada):
    path = llada / SHARDS[0]
    with pytest.raises(CheckpointError, match="changes while it is read"):
        digests._hash(path, lambda n: os.utime(path, ns=(1, 1)), Event())


def test_only_a_snapshot_of_the_hubs_cache_is_a_commit(llada, tmp_path):
    """A training run may keep its own checkpoints below a directory `snapshots`."""
    own = shutil.copytree(llada, tmp_path / "snapshots" / ("1" * 40))
    assert fingerprint(own)["revision"] is None and fingerprint(own)["shards"]


# ---- places


def test_no_such_directory(tmp_path):
    missing = tmp_path / "nowhere"
    assert check_checkpoint(missing) == [
        f"model path {missing} does not exist; give a directory, or a hub id such as org/name"
    ]
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in check_checkpoint(file)[0]
    assert "config.json not found" in check_checkpoint(tmp_path)[0]
    for call in (read_config, load_tokenizer, fingerprint):
        with pytest.raises(CheckpointError, match="does not exist"):
            call(missing)


def test_a_hub_id_offline_and_not_cached():
    [problem] = check_checkpoint("some-owner/some-model")
    assert (
        "some-owner/some-model" in problem
        and "not in the local cache" in problem
        and "HF_HUB_OFFLINE=1" in problem
    )


def test_a_directory_whose_name_has_an_at_sign_is_a_directory(llada, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    shutil.copytree(llada, tmp_path / "owner" / "tiny@main")
    monkeypatch.chdir(tmp_path)
    assert check_checkpoint("owner/tiny@main") == []
    assert fingerprint("owner/tiny@main")["revision"] is None
    assert "does not exist" in check_checkpoint(llada / "x@main")[0]


def in_cache(folder: Path, hub: Path, commit: str = "1" * 40, ref: str = "main") -> Path:
    """Lay the checkpoint out as the hub's cache has it; returns the snapshot's directory."""
    repo = hub / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return Path(shutil.copytree(folder, repo / "snapshots" / commit, copy_function=shutil.copyfile))


def offline_python(code: str, home: Path, **more: str) -> str:
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | more
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
def test_a_cached_hub_id_loads_offline(llada, tmp_path):
    """HF_HOME is honoured, the snapshot's commit is the revision, a missing shard is a problem."""
    home = tmp_path / "home"
    snapshot = in_cache(llada, home / "hub")
    code = (
        "from models import check_checkpoint, fingerprint, load_model\n"
        "print(check_checkpoint('owner/tiny'), fingerprint('owner/tiny')['revision'][:4])\n"
        "print(load_model('owner/tiny', device='cpu', dtype='float32')[1].name_or_path)"
    )
    assert offline_python(code, home).split("\n") == ["[] 1111", "owner/tiny"]
    (snapshot / SHARDS[1]).unlink()
    problems = offline_python(
        "from models import check_checkpoint; print(check_checkpoint('owner/tiny'))", home
    )
    assert f"{SHARDS[1]} is named in {INDEX} but missing" in problems


@pytest.mark.slow
def test_a_revision_of_a_hub_id_is_pinned(llada, tmp_path):
    """A tag, a branch and a commit; every reader takes the pinned snapshot, not the default one."""
    home = tmp_path / "home"
    in_cache(llada, home / "hub")
    edit(llada / "config.json", max_sequence_length=128)
    in_cache(llada, home / "hub", "2" * 40, "v1.0")
    in_cache(llada, home / "hub", "3" * 40, "a-branch")
    code = (
        "from models import check_checkpoint, fingerprint, load_model\n"
        "from models import load_tokenizer, read_config\n"
        "for pin in ('', '@v1.0', '@a-branch', '@' + '3' * 40):\n"
        "    name = 'owner/tiny' + pin\n"
        "    length = load_model(name, device='cpu', dtype='float32')[0].config.max_length\n"
        "    assert read_config(name).max_length == length and not check_checkpoint(name)\n"
        "    assert load_tokenizer(name).name_or_path == name\n"
        "    print(length, fingerprint(name)['revision'][:4])\n"
        "print(check_checkpoint('owner/tiny@v2')[0])"
    )
    *found, refusal = offline_python(code, home).split("\n")
    assert found == ["4096 1111", "128 2222", "128 3333", "128 3333"]
    assert refusal.startswith("owner/tiny@v2: ") and "not in the local cache" in refusal


def test_the_commit_of_a_cached_hub_id(llada, tmp_path):
    """Nothing is downloaded, a partial snapshot has a commit, HF_HUB_CACHE is honoured."""
    hub = tmp_path / "elsewhere"
    in_cache(llada, hub)
    partial = in_cache(llada, hub, "2" * 40, "v1.0")
    for path in partial.iterdir():
        if path.name != "config.json":
            path.unlink()
    (hub / "models--owner--tiny" / "refs" / "lost").write_text("4" * 40)  # no snapshot of it
    names = ["owner/tiny", "owner/tiny@v1.0", f"owner/tiny@{'2' * 40}", "owner/tiny@lost"]
    names += ["owner/tiny@v2", "owner/never-seen", "a--b/c", "no hub id", str(llada)]
    code = (
        "from models import cached_revision\n"
        f"print(*(str(cached_revision(name))[:4] for name in {names}))"
    )
    found = offline_python(code, tmp_path / "home", HF_HUB_CACHE=str(hub)).split()
    assert found == ["1111", "2222", "2222", *["None"] * 6]
    assert offline_python(code, tmp_path / "home").split() == ["None"] * 9


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/na.me-1_x@v1.0", ("owner/na.me-1_x", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", None),
        ("owner/name@../../x", None),
        ("owner@v1/name", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("name", None),
    ],
)
def test_hub_ids(name, parts):
    assert hub_id(name) == parts


def test_a_name_that_the_hub_does_not_allow_is_refused():
    [problem] = check_checkpoint("a--b/c")
    assert problem.startswith("a--b/c: no such directory here and no name of a model on the hub")


def test_checking_imports_neither_torch_nor_transformers(conformance_dir):
    """It runs before anything heavy is loaded, so that bad input is refused at once."""
    code = (
        "import sys\n"
        "from models import FAMILIES, CheckpointError, ModelConfig, Span, cached_revision\n"
        "from models import check_checkpoint, fingerprint, load_tokenizer, read_config\n"
        f"p = {str(conformance_dir / 'dream-tiny')!r}\n"
        "assert check_checkpoint(p) == [] and read_config(p) and fingerprint(p)\n"
        "assert check_checkpoint('owner/name')\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    assert offline_python(code, ROOT) == "[]"
