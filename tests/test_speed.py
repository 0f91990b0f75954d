"""Every fast path against the slow one that defines it; and the benchmark that measures them."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.attention.varlen as varlen
from crafted import config_of
from mini import LLADA, gsm8k_dir
from safetensors.torch import load_file
from test_models import plain_varlen

import decoding.sampling as sampling
import eval as cli
import models.packing as packing
from decoding.config import DecodeConfig
from decoding.engine import decode
from decoding.sampling import Rules, propose, shortlisted, uniforms
from decoding.schedule import make_schedule
from dev.bench import __main__ as bench
from dev.bench import rounds
from dev.bench.presets import PRESETS, random_model
from dev.bench.reference import Plain
from dev.bench.rounds import matmul_flops, moved_bytes
from experiment.generation import Generation
from models import Span, load_model
from models.acceleration import Acceleration, Graphs, capturing
from models.cost import batch_rows, row_bytes
from models.layers import rms_norm

V = 5000


def logits_of(kind: str, rows: int = 24) -> torch.Tensor:
    """[rows, V] logits: "peaked", "ties" (bfloat16 steps, as a model gives), or "flat"."""
    noise = torch.randn(rows, V, generator=torch.Generator().manual_seed(5))
    if kind == "peaked":
        return noise * 4
    if kind == "ties":
        return (noise * 4).bfloat16()
    return noise * 0.01


def by_sorting(
    logits: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None
) -> list[set[int]]:
    """The nucleus of each row, from a sort of the whole vocabulary."""
    wide = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    return [
        set(row.isfinite().nonzero()[:, 0].tolist())
        for row in sampling.filtered(wide, top_p, top_k)
    ]


@pytest.mark.parametrize("kind", ["peaked", "ties"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (0.2, 0.95, None),
        (0.7, 0.8, None),
        (0.7, 0.5, 40),
        (1.0, None, 50),
        (0.5, 1.0, 200),
        (1.0, 0.9, None),
    ],
)
def test_the_shortlist_holds_the_same_nucleus(kind, temperature, top_p, top_k):
    logits = logits_of(kind)
    ids, probs, sound = shortlisted(logits, temperature, top_p, top_k)
    expected = by_sorting(logits, temperature, top_p, top_k)
    same = [set(i[p > 0].tolist()) == kept for i, p, kept in zip(ids, probs, expected)]
    assert all(ok for ok, known in zip(same, sound.tolist()) if known)
    assert sound.float().mean() > 0.5 or temperature == 1.0, (
        "most rows are to be answered without a sort"
    )


@pytest.mark.parametrize("kind", ["peaked", "ties", "flat"])
@pytest.mark.parametrize(
    "options",
    [dict(top_p=0.95), dict(top_k=50), dict(top_p=0.8, top_k=20), dict(top_p=0.95, top_k=300)],
)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 1e-308])
@pytest.mark.parametrize("scores_the_draw", [True, False])
def test_draws_and_scores_are_those_of_the_sort(
    monkeypatch, kind, options, temperature, scores_the_draw
):
    """Tokens exactly, scores to the last bits of a float64, with any shortlist."""
    logits, noise = logits_of(kind), uniforms(3, 1, 24)[0]
    reads = frozenset({"confidence", "entropy", "margin"})
    rules = Rules(temperature=temperature, scores_the_draw=scores_the_draw, **options)
    quick = propose(logits, rules, reads, noise)
    # everything is sorted where the vocabulary is not larger than four shortlists
    monkeypatch.setattr(sampling, "SHORTLIST", V)
    slow = propose(logits, rules, reads, noise)
    assert torch.equal(quick.tokens, slow.tokens)
    for name in reads:
        torch.testing.assert_close(
            getattr(quick, name), getattr(slow, name), atol=1e-12, rtol=1e-12
        )


def test_a_peaked_distribution_is_drawn_from_without_a_sort(monkeypatch):
    """Otherwise the shortlist would only be asked, and its answer thrown away."""

    def sort(*_):
        raise AssertionError("the whole vocabulary was sorted")

    monkeypatch.setattr(sampling, "filtered", sort)
    rules = Rules(temperature=0.2, top_p=0.95, scores_the_draw=True)
    logits, noise = logits_of("peaked"), uniforms(3, 1, 24)[0]
    assert len(propose(logits, rules, frozenset({"entropy"}), noise).tokens) == 24
    with pytest.raises(AssertionError, match="sorted"):
        propose(logits_of("flat"), rules, frozenset({"entropy"}), noise)


def test_rows_that_need_the_sort_are_looked_up_once_for_all_chunks(monkeypatch):
    """Each look waits for a GPU: a batch of whole canvases has a dozen chunks a step."""
    looks, real = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: looks.append(len(x)) or real(x))
    monkeypatch.setitem(sampling.CHUNK_NUMBERS, "cpu", 5 * V)
    rules, noise = (
        Rules(temperature=0.9, top_p=0.9, scores_the_draw=True, never=(7,)),
        uniforms(3, 1, 24)[0],
    )
    logits = torch.where(torch.arange(24)[:, None] % 3 == 0, logits_of("flat"), logits_of("peaked"))
    got = propose(logits, rules, frozenset({"entropy"}), noise)
    assert looks == [24]
    monkeypatch.setattr(sampling, "SHORTLIST", V)
    expected = propose(logits, rules, frozenset({"entropy"}), noise)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-12, rtol=1e-12)


def test_a_nucleus_that_ends_among_ties_beyond_the_shortlist_is_sorted():
    """400 equal tokens: ids decide which of them belong, and the shortlist has any 256 of them."""
    logits = torch.full((1, V), -30.0)
    logits[0, 1000:1400] = 0.0
    assert not shortlisted(logits, 1.0, 0.5, None)[2].item()
    assert not shortlisted(logits, 1.0, None, 100)[2].item()
    drawn = [
        propose(logits, Rules(temperature=1.0, top_p=0.5), frozenset(), torch.tensor([u]).double())
        for u in (0, 1 - 1e-9)
    ]
    # 201 tokens are the fewest whose mass exceeds a half
    assert [d.tokens.item() for d in drawn] == [1000, 1200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_token_is_the_first_one_and_nan_is_not_hidden(dtype):
    logits = logits_of("ties", 8).to(dtype)
    logits[0, [30, 700]] = 99.0
    logits[1] = -torch.inf
    logits[2, [5, 9]] = torch.nan
    got = propose(logits, Rules(), frozenset()).tokens
    assert torch.equal(got[3:], logits.argmax(dim=-1)[3:]) and got[:3].tolist() == [30, -1, -1]


# ---- one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (91, 64), (328, 512), (40, 3584)])
def test_the_norm_has_the_bits_of_the_official_one(dtype, shape):
    noise = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=noise).to(dtype) * 3
    weight = torch.randn(shape[1], generator=noise).to(dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-6), expected)


# ---- bfloat16, batches, resume


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_bfloat16_tokens_do_not_depend_on_early_exit_or_on_what_is_kept_already(
    conformance_dir, name
):
    """An early exit and a resumed run only change which rows are in flight together."""
    model, _ = load_model(conformance_dir / name, device="cpu", dtype="bfloat16")
    algorithm, block = ("low_confidence", 8) if name == "llada-tiny" else ("leftright", None)
    schedule = make_schedule(algorithm, 24, block, tokens_per_step=2)
    generator = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(5, 400, (n,), generator=generator).tolist() for n in (9, 30, 17, 12, 25)
    ]

    def run(chosen: list[int], early_exit: bool, batch_size: int) -> dict[int, tuple[int, ...]]:
        config = DecodeConfig(schedule, early_exit=early_exit)
        done = decode(model, [prompts[i] for i in chosen], config, chosen, batch_size=batch_size)
        return {i: c.token_ids for i, c in zip(chosen, done)}

    whole = run([0, 1, 2, 3, 4], False, 3)
    left = run([1, 4], True, 2) | run([3, 0, 2], True, 3)
    for i, ids in left.items():
        end = ids.index(model.config.mask_id) if model.config.mask_id in ids else len(ids)
        ends = [at for at, token in enumerate(ids[:end]) if token in model.config.end_ids]
        end = ends[0] + 1 if ends else end
        assert ids[:end] == whole[i][:end] and (ends or end == len(ids))


# ---- graphs and compilation, as far as a CPU can show them


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def tiny(request, conformance_dir):
    return load_model(conformance_dir / request.param, device="cpu", dtype="float32")[0]


def tokens_of(
    lengths: tuple[int, ...], seed: int = 0
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(5, 400, (sum(lengths),), generator=noise), [(0, n, n) for n in lengths]


@pytest.fixture
def replayed(tiny, monkeypatch):
    """(model, shapes of captured results, notes): graphs with a fake capture and CUDA's buckets."""
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr("models.transformer.varlen_options", lambda *_: {"num_splits": 1})
    monkeypatch.setattr(packing, "ROWS", {"cpu": 32})
    monkeypatch.setattr(packing, "COLUMNS", {"cpu": 128})
    found = []

    def capture(run):
        out = run()
        found.append(tuple(out.shape))
        return lambda: out.copy_(run()), out

    notes = []
    tiny.acceleration = Acceleration(Graphs(tiny, capture, notes.append))
    yield tiny, found, notes
    tiny.acceleration = Acceleration()


def plain_logits(model, tokens, spans, rows) -> torch.Tensor:
    kept, model.acceleration = model.acceleration, Acceleration()
    try:
        return model.predict(tokens, spans, rows)
    finally:
        model.acceleration = kept


def test_a_replayed_graph_gives_the_bits_of_the_plain_path(replayed):
    """Other lengths, rows and tokens in one bucket: the capture must leave nothing behind."""
    model, found, notes = replayed
    for seed, (lengths, rows) in enumerate(
        [
            ((20,), [3, 19]),
            ((90,), [0, 5, 80]),
            ((128,), list(range(32))),
            ((5, 30, 60), [4, 5, 94]),
            ((40, 41, 40, 7), [127]),
            ((100, 100), list(range(60))),
            ((101, 103), list(range(100, 130))),
        ]
    ):
        tokens, spans = tokens_of(lengths, seed)
        rows = torch.tensor(rows)
        assert torch.equal(
            model.predict(tokens, spans, rows), plain_logits(model, tokens, spans, rows)
        ), lengths
    # three single sequences share a bucket; the others differ in sequences, asked or wanted rows
    assert len(found) == 5 and notes == []


def test_long_passes_and_cached_ones_are_not_replayed(replayed):
    model, found, _ = replayed
    tokens, spans = tokens_of((600, 600))
    model.predict(tokens, spans, torch.tensor([5]))
    cache = model.new_cache()
    cache.add(20)
    tokens, spans = tokens_of((20,))
    model.predict(tokens, spans, torch.tensor([5]), cache)
    assert found == []


@pytest.mark.parametrize("fault", ["raises", "other bits", "does nothing"])
def test_graphs_that_do_not_work_are_given_up_with_a_note(replayed, fault):
    model, _, notes = replayed

    def capture(run):
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        out = run()
        # a capture on another device than the tensors' computes, but its graph is empty:
        # pytorch/pytorch#87894
        return (lambda: fault == "does nothing" or out.copy_(run() + 1e-3)), out

    model.acceleration.graphs.capture = capture
    for seed in range(2):
        (tokens, spans), rows = tokens_of((20,), seed), torch.tensor([3])
        assert torch.equal(
            model.predict(tokens, spans, rows), plain_logits(model, tokens, spans, rows)
        )
    [note] = notes
    assert ("not permitted" if fault == "raises" else "do not keep the bits") in note
    assert model.acceleration.notes == (note.removeprefix("note: "),), (
        "the result would say that they ran"
    )


def test_graphs_are_captured_on_the_models_device_into_one_pool(monkeypatch):
    """The calls of torch.cuda, replaced by fakes.

    With `--devices 0,1` cuda:0 is the current device of every worker.
    """
    within, captures, device = [], [], torch.device("cuda:1")

    @contextmanager
    def entered(kind, what):
        within.append((kind, what))
        yield
        within.pop()

    def stream(of):
        return SimpleNamespace(wait_stream=lambda other: None, device=of)

    fakes = {
        "device": lambda d: entered("device", d),
        "stream": lambda s: entered("stream", s),
        "graph_pool_handle": object,
        "current_stream": stream,
        "Stream": stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": lambda g, **options: entered("graph", options),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture = capturing(device)
    for _ in range(2):
        capture(lambda: captures.append(dict(within)))
    graphs = [c["graph"] for c in captures if "graph" in c]
    assert all(c["device"] == device for c in captures) and len(graphs) == 2
    assert graphs[0]["pool"] is graphs[1]["pool"] and graphs[0]["stream"] is graphs[1]["stream"]


def test_a_cpu_has_no_graphs_and_notes_it(tiny):
    notes = []
    tiny.accelerate(cuda_graphs=True, tell=notes.append)
    assert notes == ["note: CUDA graphs: none on cpu"]
    assert tiny.acceleration.notes == ("CUDA graphs: none on cpu",)
    tiny.accelerate()
    assert tiny.acceleration.notes == ()


def test_a_failed_compilation_is_noted_and_the_plain_path_runs(tiny, monkeypatch):
    def broken(*_, **__):
        def part(*_):
            raise RuntimeError("no C++ compiler found\nand a long story")

        return part

    tokens, spans = tokens_of((20, 9))
    expected, notes = tiny.predict(tokens, spans, torch.arange(8)), []
    monkeypatch.setattr(torch, "compile", broken)
    tiny.accelerate(compile=True, tell=notes.append)
    assert notes == [
        "note: compile failed, the plain path runs: RuntimeError: no C++ compiler found"
    ]
    assert torch.equal(tiny.predict(tokens, spans, torch.arange(8)), expected)
    tiny.accelerate()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_are_near_the_plain_ones(conformance_dir, monkeypatch, backend):
    """One compilation serves every layer and every length.

    Users get inductor, which takes minutes on a busy CPU.
    """
    if backend == "inductor" and not os.environ.get("DLLMEXP_TEST_COMPILE"):
        pytest.skip("minutes of C++ compilation; DLLMEXP_TEST_COMPILE=1 runs it")
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, **options: real(part, backend=backend, **options)
    )
    model = load_model(conformance_dir / "llada-tiny", device="cpu", dtype="float32")[0]
    cases = [tokens_of(lengths, 3) for lengths in ((24,), (40, 9), (77,), (130, 3, 60))]
    expected = [model.predict(tokens, spans, torch.arange(20)) for tokens, spans in cases]
    notes, eager = [], model.layers[0].parts
    model.accelerate(compile=True, tell=notes.append)
    if notes:
        pytest.skip(notes[0])
    assert model.acceleration.notes == ("compiled",)
    assert model.layers[0].parts.finish is not eager.finish
    with torch.inference_mode():
        for (tokens, spans), plain in zip(cases, expected):
            torch.testing.assert_close(
                model.predict(tokens, spans, torch.arange(20)), plain, atol=2e-3, rtol=1e-3
            )


# ---- the size of a batch


def test_a_batch_fills_a_gpu_and_no_more_than_its_memory():
    config = PRESETS["llada-8b"].config
    assert batch_rows(config, 712, 32, 2, 100 << 30, "cuda") == 6  # 4272 columns
    assert batch_rows(config, 100, 32, 2, 100 << 30, "cuda") == 41
    assert batch_rows(config, 712, 32, 2, 13 << 27, "cuda") == 3
    assert batch_rows(config, 712, 32, 2, 0, "cuda") == 1
    assert batch_rows(config, 712, 32, 4, None, "cpu") == 8


def test_a_cache_needs_memory_and_is_filled_by_more_samples():
    """A cache of 712 columns takes 373 MB for LLaDA-8B and 41 MB for Dream-7B."""
    config, dream = PRESETS["llada-8b"].config, PRESETS["dream-7b"].config
    for c, expected in ((config, 373e6), (dream, 41e6)):
        slot = row_bytes(c, 712, 32, 2, True) - row_bytes(c, 712, 32, 2)
        assert slot == pytest.approx(expected, rel=0.01)
    assert batch_rows(config, 712, 32, 2, 100 << 30, "cuda", True) == 16
    assert batch_rows(config, 712, 32, 2, 4 << 30, "cuda", True) == 4


def test_the_bytes_of_a_forward_pass():
    """LLaDA-8B in bfloat16 reads 14.99 GB of weights, and 373 MB of a cache of 712 columns."""
    config, spans = PRESETS["llada-8b"].config, [Span(0, 712, 712)]
    assert moved_bytes(config, spans, 0, 2, False) == pytest.approx(14.99e9, rel=1e-3)
    block = [Span(200, 232, 712)]
    kept = moved_bytes(config, block, 0, 2, True) - moved_bytes(config, block, 0, 2, False)
    assert kept == pytest.approx(373e6 * 744 / 712, rel=1e-2)


def test_the_arithmetic_of_a_forward_pass():
    """LLaDA-8B, 712 columns: 10.94 TFLOP for all rows, a tenth less for 32 of them."""
    config, spans = PRESETS["llada-8b"].config, [Span(0, 712, 712)]
    assert matmul_flops(config, spans, 712) == pytest.approx(10.94e12, rel=0.01)
    assert matmul_flops(config, spans, 32) == pytest.approx(9.98e12, rel=0.01)


# ---- the benchmark


@pytest.mark.parametrize(
    ("preset", "regimes"), [("tiny", 8), pytest.param("tiny-dream", 6, marks=pytest.mark.slow)]
)
def test_the_benchmark_finds_the_references_tokens(tmp_path, capsys, preset, regimes):
    """Every algorithm and every early exit against the official loop; the file has the figures."""
    out = tmp_path / "b.json"
    assert (
        bench.main(
            [
                "--preset",
                preset,
                "--rounds",
                "1",
                "--gen_length",
                "32",
                "--prompts",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())["regimes"]
    assert len(found) == regimes and not any(f["samples_that_differ"] for f in found)
    assert len(found[0]["noise"]) == 1 and all(f["ratio"] > 0 for f in found)
    assert (
        found[0]["tpf"] == pytest.approx(4.0)
        and 0 < found[0]["share_of_matmul"] < 1.001 * found[0]["share_of_floor"]
    )
    assert "equal" in capsys.readouterr().out
    assert [f["regime"] for f in found if not f["samples"]] == [
        f["regime"] for f in found if "cache" in f["regime"]
    ]


def test_the_reference_takes_each_prompt_once_and_counts_as_often_as_the_engine_has_it(monkeypatch):
    preset, asked, given = replace(PRESETS["tiny"], gen_length=32, batch=4), [], []
    model, line = random_model(preset.config, "cpu", "float32"), rounds.Line(preset.regimes[0])
    real, decode = rounds.reference, rounds.decode
    monkeypatch.setattr(rounds, "reference", lambda *a: asked.append(a[1]) or real(*a))
    monkeypatch.setattr(
        rounds, "decode", lambda *a, **o: given.append((a[1], a[3])) or decode(*a, **o)
    )
    monkeypatch.setattr(
        rounds, "timed", lambda work, device: (work(), rounds.Timing(1.0, 1.0, None))
    )
    rounds.run_round(
        preset, model, Plain(model), [[5, 6, 7], [8, 9]], [line], None, 0, lambda name: None
    )
    assert asked == [[5, 6, 7], [8, 9]] * 2 and given == [([[5, 6, 7], [8, 9]] * 2, [0, 1] * 2)]
    assert line.ratios == [2.0] and (line.samples, line.differ) == (4, 0)


def test_capturing_graphs_is_in_no_figure_of_the_benchmark(monkeypatch):
    """It takes longer than the steps that a short run replays."""
    preset, real, noted = replace(PRESETS["tiny"], gen_length=32), rounds.decode, []
    model = random_model(preset.config, "cpu", "float32")
    model.acceleration = Acceleration(SimpleNamespace(seconds=0.0, logits=lambda *_: None, note=""))

    def decode_and_capture(*args, **options):
        model.acceleration.graphs.seconds += 60
        return real(*args, **options)

    monkeypatch.setattr(rounds, "decode", decode_and_capture)
    monkeypatch.setattr(rounds, "_note", lambda *args: noted.append(args[4]))
    rounds.run_round(
        preset,
        model,
        Plain(model),
        [[5, 6, 7]],
        [rounds.Line(preset.regimes[0])],
        1,
        0,
        lambda name: None,
    )
    assert -60 < noted[0].wall < 0


def test_the_benchmark_ends_with_1_where_tokens_differ(tmp_path, monkeypatch, capsys):
    real = rounds.reference
    monkeypatch.setattr(
        rounds, "reference", lambda *a: [5 if i == 3 else t for i, t in enumerate(real(*a))]
    )
    arguments = [
        "--preset",
        "tiny",
        "--rounds",
        "1",
        "--gen_length",
        "32",
        "--only",
        "random",
        "--prompts",
        "1",
        "--out",
        str(tmp_path / "b.json"),
    ]
    assert bench.main(arguments) == 1 and "1 of 1 DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset 'huge'; there are: cpu-small"),
        (["--preset", "tiny", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--preset", "tiny", "--only", "entropy"], "--only 'entropy'; regimes: low_confidence"),
        (
            ["--preset", "tiny", "--gen_length", "40"],
            "--gen_length 40 is not a multiple of block_length 32",
        ),
        (["--preset", "tiny", "--answer_fraction", "2"], "--answer_fraction 2 must be above 0"),
    ],
)
def test_the_benchmark_says_what_is_wrong(tmp_path, capsys, arguments, message):
    assert bench.main([*arguments, "--out", str(tmp_path / "b.json")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_reference_model_is_the_official_one(conformance_dir):
    """The recorded logits of the official implementation, so that the comparison is with it."""
    golden = load_file(conformance_dir / "golden" / "logits.safetensors")
    for name in ("llada-tiny", "dream-tiny"):
        model = Plain(load_model(conformance_dir / name, device="cpu", dtype="float32")[0])
        with torch.inference_mode():
            got = model(golden[f"{name}.0.input_ids"].long()[None])[0]
        assert (got - golden[f"{name}.0.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (
            "llada-tiny",
            dict(algorithm="low_confidence", gen_length=16, block_length=8, num_steps=6),
        ),
        ("llada-tiny", dict(algorithm="random", gen_length=16, block_length=8, num_steps=8)),
        ("dream-tiny", dict(algorithm="entropy", gen_length=16, num_steps=7)),
        ("dream-tiny", dict(algorithm="topk_margin", gen_length=16, num_steps=16)),
        ("dream-tiny", dict(algorithm="origin", gen_length=16, num_steps=9)),
    ],
)
def test_the_reference_loop_is_the_plain_oracle(conformance_dir, name, steps):
    model = load_model(conformance_dir / name, device="cpu", dtype="float32")[0]
    config = DecodeConfig(make_schedule(**steps), early_exit=False)
    got = rounds.reference(Plain(model), [7, 8, 9, 200], config, 4)
    assert got == getattr(oracle, name.removesuffix("-tiny"))(
        model, [7, 8, 9, 200], seed=4, **steps
    )


# ---- from the command line


def test_what_auto_comes_to_is_told(caplog):
    batches = []
    stub = SimpleNamespace(cache=SimpleNamespace(batches_of=batches.append))
    Generation.choose_batch_size(stub, 3)
    assert "--batch_size auto: 3 samples in flight" in caplog.text
    assert stub.batch_size == 3 and batches == [3]


def test_auto_batch_and_graphs_are_told_and_keep_the_identity(tmp_path, capsys, caplog):
    """The result says what was chosen; --compile alone makes another configuration of it."""
    data, common = (
        gsm8k_dir(tmp_path / "data"),
        f"--model_alias llada --llada_ckpt {LLADA} --task gsm8k --gen_length 32",
    )
    run = f"{common} --device cpu --dtype float32 --data_dir {data} --limit 2 --tokens_per_step 8"
    ids = []
    for i, more in enumerate(["--batch_size auto --cuda_graphs", "--batch_size 2"]):
        assert cli.main([*f"{run} {more} --output_dir {tmp_path / str(i)}".split()]) == 0
        [path] = (tmp_path / str(i)).glob("*.json")
        ids.append(json.loads(path.read_text()))
    told = capsys.readouterr().err + caplog.text
    assert "note: CUDA graphs: none on cpu" in told
    # the default of a CPU; it was 1, which takes longer
    assert ids[0]["meta"]["batch_size"] == ids[0]["meta"]["samples_made"][0]["batch_size"] == 8
    assert ids[0]["meta"]["acceleration"] == ["CUDA graphs: none on cpu"]
    assert ids[0]["id"] == ids[1]["id"] and ids[0]["content_sha256"] == ids[1]["content_sha256"]
    plain = config_of("llada", "gsm8k", 1)
    assert replace(plain, compile=True).generation_id != plain.generation_id
    assert "compile" not in plain.as_dict()
