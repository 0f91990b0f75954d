"""The causal family: cached pieces, batches, refusals, tokenizers, against transformers' Qwen2.

A verifier reads a draft, keeps a part of it and overwrites the rest with the next draft: the cache
must leave no trace of the rejected part.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen as varlen
from checkpoint_files import edit, edit_tensors, refused
from safetensors.torch import load_file
from test_models import plain_varlen

from models import (
    FAMILIES,
    Span,
    check_checkpoint,
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    tokenizer_disagreement,
)
from models.config import parameter_shapes
from models.transformer import KVCache

# config.json of Qwen/Qwen2.5-0.5B, every key of it, smaller
HUB = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 500,
    "eos_token_id": 500,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 544,
}


def write(folder: Path, tokenizer: Path, tied: bool) -> Path:
    """A random checkpoint as transformers saves it, with the hub's config.json and a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = HUB | {"tie_word_embeddings": tied, "torch_dtype": "float32"}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**config | {"initializer_range": 0.1}))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):  # zeros, as they are made
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, conformance_dir, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("qwen"), conformance_dir / "dream-tiny", request.param)


@pytest.fixture(scope="module")
def tied(conformance_dir, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tied"), conformance_dir / "dream-tiny", True)


@pytest.fixture
def qwen(tied, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tied, tmp_path / "qwen"))


@pytest.fixture(scope="module")
def model(tied):
    return load_model(tied, device="cpu", dtype="float32")[0]


def random_tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed))


def official(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        return model(ids).logits


def shifted(model, tokens: torch.Tensor) -> torch.Tensor:
    """The distribution for every column of one sequence; column 0, the first one, keeps its own."""
    raw = model.logits(tokens[None])[0]
    return torch.cat([raw[:1], raw[:-1]])


def cache_for(model, *lengths: int) -> KVCache:
    return KVCache(model.config, lengths, device="cpu", dtype=torch.float32)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


# ---- the logits of transformers


@pytest.mark.parametrize("length", [1, 2, 7, 33, 61, 200])
def test_float32_logits_are_those_of_transformers(made, length):
    """Measured where this was written: difference 0.0, and 1e-6 for a single column."""
    ids = torch.stack([random_tokens(length, seed) for seed in (1, 2)])
    ours, _ = load_model(made, device="cpu", dtype="float32")
    assert_close(ours.logits(ids), official(made, torch.float32, ids))


def test_bfloat16_logits_are_those_of_transformers(made):
    """The same casts in the same order.

    Measured where this was written: bit-identical, and 0.006 with the rotation in float32, which is
    about the error of bfloat16 itself. The factor of 20 leaves room for other CPUs' kernels.
    """
    ids = torch.stack([random_tokens(61, seed) for seed in (1, 2)])
    expected, exact = (
        official(made, dtype, ids).float() for dtype in (torch.bfloat16, torch.float32)
    )
    ours, _ = load_model(made, device="cpu", dtype="bfloat16")
    assert (ours.logits(ids).float() - expected).abs().mean() * 20 < (expected - exact).abs().mean()


def test_a_later_token_changes_nothing_before_it(model):
    """Not one bit: otherwise the tokens behind a draft would decide about it."""
    tokens, other = random_tokens(40, 1), random_tokens(40, 2)
    before = model.logits(tokens[None])[0, :25]
    assert torch.equal(model.logits(torch.cat([tokens[:25], other[25:]])[None])[0, :25], before)


# ---- predict


def test_predict_is_logits_shifted_and_proposes_any_token(model):
    tokens, rows = random_tokens(41, 1), torch.tensor([40, 0, 1, 7, 7])
    got = model.predict(tokens, [Span(0, 41, 41)], rows)
    assert torch.equal(got, shifted(model, tokens)[rows])
    assert got.isfinite().all()


def test_asked_rows_have_the_bits_that_all_rows_have(model):
    """The last layer has queries for the asked rows only, in any order: the mask goes by column."""
    tokens, generator = random_tokens(61, 2), torch.Generator().manual_seed(0)
    full = shifted(model, tokens)
    for n in (1, 2, 3, 7, 8, 9, 30, 61):
        rows = torch.randint(0, 61, (n,), generator=generator)
        assert torch.equal(model.predict(tokens, [(0, 61, 61)], rows), full[rows])


@pytest.mark.parametrize("cuts", [(20, 50), (1, 2, 3, 4, 50), (49, 50), (10, 26, 42, 50)])
def test_pieces_through_a_cache_are_the_whole(model, cuts):
    """Each piece begins one column early, where the hidden state for its first new column is."""
    tokens = random_tokens(50, 3)
    expected, cache, lo = shifted(model, tokens), cache_for(model, 50), 0
    for hi in cuts:
        first = max(lo - 1, 0)
        rows = torch.arange(lo - first, hi - first)
        assert_close(
            model.predict(tokens[first:hi], [(first, hi, hi)], rows, cache), expected[lo:hi]
        )
        lo = hi
    assert cache.ends == [50]


def test_a_rejected_draft_leaves_no_trace(model):
    """Of each draft of 16 tokens k are kept; the next span overwrites the keys of the others."""
    text, cache, at = random_tokens(80, 4), cache_for(model, 80), 17
    model.predict(text[:at], [(0, at, at)], torch.tensor([0]), cache)
    for k in (3, 0, 16, 1, 7):
        draft = torch.cat([text[at : at + k], random_tokens(16 - k, 100 + k)])
        read = torch.cat([text[at - 1 : at], draft])
        got = model.predict(read, [(at - 1, at + 16, at + 16)], torch.arange(1, 17), cache)
        assert_close(got, shifted(model, torch.cat([text[:at], draft]))[at:])
        at += k
    last = model.predict(text[at - 1 : 60], [(at - 1, 60, 60)], torch.arange(1, 61 - at), cache)
    assert_close(last, shifted(model, text[:60])[at:])


def test_a_column_sees_nothing_to_its_right_that_the_cache_has(model):
    """kv_end beyond hi reads columns that were written before; a causal column must not."""
    old, new = random_tokens(30, 5), random_tokens(5, 6)
    cache = cache_for(model, 30)
    model.predict(old, [(0, 30, 30)], torch.tensor([0]), cache)
    got = model.predict(new, [(10, 15, 30)], torch.arange(1, 5), cache)
    assert_close(got, shifted(model, torch.cat([old[:10], new]))[11:])


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_does_not_depend_on_its_neighbours(model, threads):
    """Bit for bit in float32, whole and from a cache: a batch must not change what is accepted."""
    lengths = [1, 2, 3, 9, 17, 31, 40, 77]
    texts, news = (
        [random_tokens(n, n) for n in lengths],
        [random_tokens(16, 90 + n) for n in lengths],
    )

    def run(chosen) -> list[torch.Tensor]:
        cache = cache_for(model, *(lengths[i] + 15 for i in chosen))
        spans = [(0, lengths[i], lengths[i]) for i in chosen]
        starts = torch.tensor([0, *(lengths[i] for i in chosen)]).cumsum(0)
        first = model.predict(torch.cat([texts[i] for i in chosen]), spans, starts[1:] - 1, cache)
        ends = [lengths[i] + 15 for i in chosen]
        rows = torch.cat([torch.arange(16 * j + 1, 16 * j + 16) for j in range(len(chosen))])
        spans = [(end - 16, end, end) for end in ends]
        then = model.predict(torch.cat([news[i] for i in chosen]), spans, rows, cache)
        return [torch.cat(pair) for pair in zip(first.split(1), then.split(15))]

    torch.set_num_threads(threads)
    try:
        alone = [run([i])[0] for i in range(len(lengths))]
        for group in ([0, 1], [7, 3, 0], range(8), range(7, -1, -1)):
            assert all(torch.equal(got, alone[i]) for i, got in zip(group, run(group)))
    finally:
        torch.set_num_threads(1)


def test_the_first_column_of_a_cut_span_is_refused(model):
    cache = cache_for(model, 8)
    model.predict(random_tokens(8, 1), [(0, 8, 8)], torch.tensor([0]), cache)
    with pytest.raises(ValueError, match="first column"):
        model.predict(random_tokens(4, 1), [(4, 8, 8)], torch.tensor([0]), cache)


def test_the_varlen_call_gives_the_same_as_the_loop(model, monkeypatch):
    """Without a cache, with one, and with the draft of one row only; any rows are asked for."""
    lengths = [7, 20, 3]
    tokens = torch.cat([random_tokens(n, n) for n in lengths])
    full, rows = [(0, n, n) for n in lengths], torch.tensor([0, 5, 26, 12, 29])

    def run() -> list[torch.Tensor]:
        cache = cache_for(model, *lengths)
        more = [(5, 7, 7), (0, 0, 0), (1, 3, 3)], torch.tensor([1, 3]), cache
        return [
            model.logits(tokens[None, :9]),
            model.predict(tokens, full, rows),
            model.predict(tokens, full, rows, cache),
            model.predict(random_tokens(4, 5), *more),
        ]

    expected = run()
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr("models.transformer.varlen_options", lambda *_: {"num_splits": 1})
    for got, wanted in zip(run(), expected):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def test_no_graph_for_a_causal_model(model, monkeypatch):
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    notes = []
    model.accelerate(cuda_graphs=True, tell=notes.append)
    assert notes == ["note: CUDA graphs: none for a causal model"]
    assert model.acceleration.graphs is None
    model.accelerate()


# ---- the checkpoint


def test_config_and_parameters(made):
    c = read_config(made)
    model, tokenizer = load_model(made, device="cpu", dtype="float32")
    assert (c.family, c.mask_id, c.end_ids) == ("qwen2", None, (500, 502))
    assert c.causal and c.shift and c.qkv_bias and FAMILIES["qwen2"].algorithm is None
    assert (c.n_heads, c.n_kv_heads, c.head_dim, c.max_length, c.rope_theta) == (4, 2, 16, 256, 1e6)
    stored = load_file(made / "model.safetensors")
    assert ("lm_head.weight" in stored) is not c.tie_embeddings
    assert ("head.weight" in parameter_shapes(c)) is not c.tie_embeddings
    assert check_checkpoint(made) == []
    assert fingerprint(made)["shards"].keys() == {"model.safetensors"}
    assert tokenizer("so <|im_end|>")["input_ids"][-1] == 502


def test_a_config_as_transformers_writes_it(qwen):
    """It adds layer_types, one entry for each layer."""
    edit(
        qwen / "config.json",
        layer_types=["full_attention"] * 3,
        sliding_window=None,
        rope_scaling=None,
    )
    assert check_checkpoint(qwen) == []


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"use_sliding_window": True}, r"use_sliding_window is True; supported: False or None"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types is \[.*sliding_attention",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling is \{'type': 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters is \{"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; supported: 'silu'"),
        ({"use_mrope": True}, r"use_mrope is True"),
        ({"attention_bias": False}, r"attention_bias is False"),
        ({"eos_token_id": 544}, r"eos_token_id 544 is beyond the 544 rows"),
        ({"num_key_value_heads": 3}, r"4 heads cannot share 3"),
        ({"rope_theta": ...}, r"rope_theta is missing"),
    ],
)
def test_configs_that_are_not_computed_here(qwen, changes, pattern):
    edit(qwen / "config.json", **changes)
    refused(qwen, r"config\.json: " + pattern)


def test_an_output_head_must_be_there_or_be_tied(qwen):
    edit(qwen / "config.json", tie_word_embeddings=...)
    refused(qwen, "1 tensors missing: lm_head.weight")
    embedding = load_file(qwen / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(
        qwen / "model.safetensors", lambda t: t.update({"lm_head.weight": embedding.clone()})
    )
    assert check_checkpoint(qwen) == []
    edit(qwen / "config.json", tie_word_embeddings=True)
    refused(qwen, "1 tensors unexpected: lm_head.weight")


# ---- tokenizers that a verifier and its model must share


def test_a_tokenizer_agrees_with_itself_whatever_either_has_alone(qwen, dream):
    """Neither the mask token matters nor tokens behind all the others."""
    assert tokenizer_disagreement(dream, qwen) == []
    decoder = json.loads((qwen / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder = {i: t for i, t in decoder.items() if t["content"] != "<|mask|>"} | {
        "509": {"content": "<tool_call>"}
    }
    edit(qwen / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert tokenizer_disagreement(dream, qwen) == []


def test_every_disagreement_names_the_first_of_its_kind(qwen, dream):
    vocab = json.loads((dream / "vocab.json").read_text())
    texts = {i: text for text, i in vocab.items()}
    edit(qwen / "vocab.json", **{texts[300]: 301, texts[301]: 300})
    lines = (qwen / "merges.txt").read_text().split("\n")
    lines[5], lines[6] = lines[6], lines[5]
    (qwen / "merges.txt").write_text("\n".join(lines))
    settings = json.loads((qwen / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    settings["502"], settings["501"] = settings["501"], settings["502"]
    edit(qwen / "tokenizer_config.json", added_tokens_decoder=settings)
    ordinary, added, merges = tokenizer_disagreement(dream, qwen)
    assert ordinary == (
        f"{qwen}: 2 of {len(vocab)} ordinary tokens have other ids than in {dream}; "
        f"the first is {texts[300]!r}, 301 instead of 300"
    )
    assert added.endswith(
        f"added tokens have other ids than in {dream}; "
        "the first is '<|im_start|>', 502 instead of 501"
    )
    assert merges.endswith(
        f"the first that differs is number 5, {lines[5]!r} instead of {lines[6]!r}"
    )


def test_another_family_s_tokenizer_is_another_one(qwen, llada):
    """LLaDA's is in tokenizer.json, its merges as pairs or as strings."""
    assert tokenizer_disagreement(llada, llada) == []
    problems = tokenizer_disagreement(llada, qwen)
    assert problems and all(problem.startswith(f"{qwen}: ") for problem in problems)


def test_a_tokenizer_that_cannot_be_read_is_a_disagreement(qwen, dream):
    (qwen / "merges.txt").unlink()
    assert tokenizer_disagreement(dream, qwen) == [
        f"tokenizer files not found in {qwen}: merges.txt"
    ]
    assert "does not exist" in tokenizer_disagreement(dream / "nowhere", qwen)[0]


def test_an_added_token_that_tokenizer_json_lists_alone_is_found(qwen):
    """The hub's files list them twice; two ids for one token are an error."""
    whole = {
        "added_tokens": [{"id": 507, "content": "<|extra|>"}, {"id": 502, "content": "<|im_end|>"}]
    }
    (qwen / "tokenizer.json").write_text(json.dumps(whole))
    assert load_tokenizer(qwen)("<|extra|>")["input_ids"] == [507]
    whole["added_tokens"][1]["id"] = 503
    (qwen / "tokenizer.json").write_text(json.dumps(whole))
    refused(qwen, r"give <\|im_end\|> two ids: 502, and 503 in tokenizer\.json")
