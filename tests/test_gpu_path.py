"""The path of a GPU, on the emulator of tests/emulated_cuda.py. Nothing here has run on a GPU."""

from types import SimpleNamespace

import emulated_cuda
import pytest
import safetensors
import torch
from causal import causal_twin
from emulated_cuda import Gpu, at_shape, capturing, emulated, on_gpu
from mini import DREAM, KINDS, LLADA

import decoding.engine as engine
import decoding.sampling as sampling
import models.acceleration as acceleration
from decoding.algorithms import ALGORITHMS
from decoding.config import DecodeConfig
from decoding.engine import decode
from decoding.schedule import make_schedule
from dev.bench.presets import PRESETS, rows_in_flight
from experiment.checks import choose_device
from experiment.generation import Generation
from experiment.workers import WorkerInfo
from models import load_model
from models.acceleration import Acceleration, Graphs
from models.cost import OBSERVING, batch_rows, row_bytes
from suite.local import visible_gpus
from utils import EnvironmentProblem, out_of_memory

PROMPTS = [[7, 8, 9], [4, 5, 6, 7, 8, 9, 10, 11], [30] * 5]
FOLDERS = {"llada": LLADA, "dream": DREAM}


def cases() -> dict[str, tuple[str, DecodeConfig]]:
    """name -> (family, configuration), which together take every branch of the loop.

    Algorithms beside KINDS have no case for each cache and filter, and for a temperature only if
    they choose before tokens are drawn.
    """
    found = {}

    def add(label: str, algorithm: str, block: int | None, **options) -> None:
        a = ALGORITHMS[algorithm]
        step = None if a.schedule == "adaptive" else 2
        schedule = make_schedule(algorithm, 8, block, step)
        family = "llada" if "llada" in a.families else "dream"
        found[f"{algorithm} {label}".strip()] = family, DecodeConfig(schedule, **options)

    for name, a in ALGORITHMS.items():
        block = 4 if a.blocks or "llada" not in a.families and a.schedule == "adaptive" else None
        add("", name, block)
        if name in KINDS or a.chooses_first:
            add("T", name, block, temperature=0.7)
        if a.left_to_right:
            add("window", name, 4, kv_cache="window", kv_window=2)
        if name not in KINDS:
            continue
        add("prefix", name, 4, kv_cache="prefix")
        add("dual", name, 4, kv_cache="dual")
        add("T top_p", name, block, temperature=0.7, top_p=0.9)
        add("T top_k", name, block, temperature=0.7, top_k=20)
    for name in ("entropy", "maskgit_plus", "topk_margin"):
        add("alg_temp", name, None, alg_temp=0.5, temperature=0.2, top_p=0.95)
    add("float32", "low_confidence", 4, confidence_dtype="float32")
    add("in the model's dtype", "low_confidence", 4, confidence_dtype="model")
    add(
        "no end tokens",
        "low_confidence",
        4,
        logits_eos_inf=True,
        confidence_eos_eot_inf=True,
    )
    add("refresh", "low_confidence", 8, kv_cache="dual", cache_refresh=3)
    add("lookahead", "leftright", None, max_lookahead=5, kv_cache="window", kv_window=3)
    return found


CASES = cases()
QUICK = (
    "low_confidence",
    "low_confidence dual",
    "maskgit_plus T top_p",
    "klass",
    "origin T",
    "apd window",
)
some = pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


@pytest.fixture
def small_limits(monkeypatch):
    """A vocabulary of 520 then takes the shortlist, and several chunks."""
    monkeypatch.setattr(sampling, "SHORTLIST", 64)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(sampling.CHUNK_NUMBERS, device, 10 * 520)


def models_for(config: DecodeConfig, family: str, dtype: str, gpu: Gpu | None = None):
    """(model, verifier or None), on the emulated device if there is one."""
    model = load_model(FOLDERS[family], device="cpu", dtype=dtype)[0]
    verified = ALGORITHMS[config.schedule.algorithm].verification
    twin = causal_twin(model).to(model.dtype) if verified else None
    return tuple(m if m is None or gpu is None else on_gpu(m, gpu) for m in (model, twin))


def run(model, twin, config: DecodeConfig) -> list[tuple[int, ...]]:
    done = decode(model, PROMPTS, config, range(3), batch_size=2, verifier=twin)
    return [completion.token_ids for completion in done]


@some
def test_no_step_mixes_devices_and_float32_gives_the_cpu_s_tokens(small_limits, case):
    """The emulator raises where an operation has tensors of both devices."""
    family, config = CASES[case]
    expected = run(*models_for(config, family, "float32"), config)
    with emulated() as gpu:
        assert run(*models_for(config, family, "float32", gpu), config) == expected


# waits of the host and uploads in the busiest step, with two rows in flight at temperature 0
STEPS = {
    "low_confidence": (1, 2),
    "random": (1, 1),
    "leftright": (1, 1),
    "maskgit_plus": (1, 2),
    "topk_margin": (1, 2),
    "entropy": (1, 2),
    "origin": (1, 1),
    "threshold": (1, 2),
    "confidence_threshold": (1, 2),
    "factor": (1, 2),
    "entropy_threshold": (1, 2),
    "eb_sampler": (1, 2),
    "klass": (1, 4),
    "credit": (1, 4),
    "certainty": (1, 2),
    "apd": (3, 4),
    "apd_released": (3, 4),
}


@some
def test_the_waits_and_uploads_of_a_step(small_limits, monkeypatch, case):
    """A wait that is not in the table costs more than the step of a small batch."""
    family, config = CASES[case]
    real, found = engine._Decoder._step, []

    def step(self, rows):
        gpu.reset()
        real(self, rows)
        found.append((gpu.waits.total(), gpu.uploads.total()))

    monkeypatch.setattr(engine._Decoder, "_step", step)
    waits, uploads = STEPS[config.schedule.algorithm]
    with emulated() as gpu:
        model, twin = models_for(config, family, "bfloat16", gpu)
        assert model.varlen is not None and (twin is None or twin.varlen is not None)
        run(model, twin, config)
    algorithm, drawn = ALGORITHMS[config.schedule.algorithm], config.temperature > 0
    filtered = drawn and bool(config.top_p or config.top_k) and twin is None
    uploads += drawn and algorithm.chooses_first  # the noise; others send it with their fields
    waits += 2 * (filtered and algorithm.observe is not None)  # one of each row
    # a step in which a vocabulary is sorted has one wait and one upload more
    assert max(w for w, _ in found) in (waits, waits + filtered)
    # the noise of a draft is uploaded for each chunk of it
    assert max(u for _, u in found) in (uploads, uploads + filtered) or drawn and twin is not None


@pytest.mark.parametrize(
    ("family", "algorithm", "block", "kv_cache"),
    [
        pytest.param("llada", "low_confidence", 8, "none", marks=pytest.mark.slow),
        ("dream", "entropy", None, "none"),
        ("llada", "low_confidence", 8, "dual"),
        pytest.param("dream", "entropy", 8, "prefix", marks=pytest.mark.slow),
    ],
)
def test_graphs_replay_on_fixed_addresses(family, algorithm, block, kv_cache):
    """With a cache too, whose slots other rows take over."""
    config = DecodeConfig(make_schedule(algorithm, 16, block, 4), kv_cache=kv_cache)
    prompts = [[5 + i % 90 for i in range(n)] for n in (5, 30, 100, 140)]

    def tokens(model):
        return [d.token_ids for d in decode(model, prompts, config, range(4), batch_size=2)]

    with emulated() as gpu:
        model, told = models_for(config, family, "bfloat16", gpu)[0], []
        expected = tokens(model)
        model.acceleration = Acceleration(Graphs(model, capturing(gpu), told.append))
        assert (tokens(model), told) == (expected, [])
        assert gpu.kernels["graph"] > len(model.acceleration.graphs.kept) > 0
        assert (tokens(model), told) == (expected, [])  # with another cache


# kernels of one step of LLaDA-8B with 16 samples in flight: all columns, and a block with a cache
@pytest.mark.parametrize(("kv_cache", "kernels"), [("none", 925), ("dual", 989)])
def test_the_kernels_of_a_step_at_the_real_shape(capsys, kv_cache, kernels):
    """Each launch costs the host 8 to 10 microseconds, and the cached step is bound by them."""
    assert emulated_cuda.main(["launches", "llada-8b", "16", kv_cache]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"kernels  {kernels}" and "uploads  2\nwaits    1\n" in out


# ---- graphs and memory


def test_a_full_set_of_graphs_is_dropped_whole_and_has_one_result(monkeypatch):
    """To drop one frees memory that the others use: pytorch/pytorch#193402."""
    monkeypatch.setattr(acceleration, "MOST_GRAPHS", 2)
    with emulated() as gpu:
        model = on_gpu(load_model(LLADA, device="cpu", dtype="bfloat16")[0], gpu)
        graphs = Graphs(model, capturing(gpu), [].append)
        for n in (100, 200, 100, 300, 400, 100, 300):
            tokens, spans, rows = torch.arange(5, 5 + n), [(0, n, n)], torch.tensor([2, 9])
            model.acceleration = Acceleration()
            expected = model.predict(tokens, spans, rows)
            model.acceleration = Acceleration(graphs)
            assert torch.equal(model.predict(tokens, spans, rows), expected)
            assert len(graphs.kept) <= 2 and graphs.works and len(graphs.out) == 32
        assert gpu.waits["synchronize", "models/acceleration.py _drop"] == 2


def test_compilation_warms_up_with_sizes_that_no_other_size_has():
    """128 columns would be taken for the width of a head, and other numbers compiled again."""
    sizes = []
    model = SimpleNamespace(predict=lambda tokens, spans, rows: sizes.append(len(tokens)))
    acceleration._warm_up(model)
    assert sizes == [384, 640]


# growth of the peak by a sample, in the busiest of the first two steps, over what is reckoned
@pytest.mark.parametrize("preset", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize(
    ("algorithm", "kv_cache", "block"),
    [
        (None, "none", 32),
        (None, "dual", 32),
        pytest.param(None, "none", 512, marks=pytest.mark.slow),
        pytest.param("klass", "none", 512, marks=pytest.mark.slow),
        pytest.param("credit", "none", 512, marks=pytest.mark.slow),
        pytest.param("klass", "prefix", 32, marks=pytest.mark.slow),
    ],
)
def test_a_sample_needs_the_memory_that_is_reckoned_at_the_real_shape(
    preset, algorithm, kv_cache, block
):
    peaks = []
    for rows in (8, 16):
        with at_shape(preset, rows, kv_cache, algorithm, block=block) as (gpu, step):
            step()
            first = gpu.peak
            step()
            peaks.append(max(first, gpu.peak))
    observed = ALGORITHMS[algorithm].observe is not None if algorithm else False
    reckoned = row_bytes(PRESETS[preset].config, 712, block, 2, kv_cache != "none", observed)
    assert 0.8 < (peaks[1] - peaks[0]) / 8 / reckoned < 1.1


def test_the_float64_scores_of_one_sample_at_a_time_are_reckoned():
    """Dream, klass, one block of 512: six samples took 14 GiB where 2.6 were reckoned."""
    config = PRESETS["dream-7b"].config
    with at_shape("dream-7b", 1, "none", "klass", block=512) as (gpu, step):
        step()
        step()
    left = gpu.peak - row_bytes(config, 712, 512, 2, False, True)
    assert left < OBSERVING * 8 * 512 * config.vocab_size
    assert batch_rows(config, 712, 512, 2, 8 << 30, "cuda") == 6
    assert batch_rows(config, 712, 512, 2, 8 << 30, "cuda", False, True) == 4


# ---- what else a GPU asks for


def test_weights_are_read_into_the_system_s_cache_and_copied(monkeypatch):
    """safetensors would stage them in pinned memory that it keeps: 1 to 2 GiB a process."""
    opened, current, real = [], [], safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *a, **o: opened.append(o.get("device")) or real(*a, **o)
    )
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    expected = load_model(LLADA, device="cpu", dtype="bfloat16")[0].weights()
    with emulated():
        model = load_model(LLADA, device="cuda:0", dtype="bfloat16")[0]
        assert model.device == torch.device("cuda:0")
        assert all(torch.equal(w.cpu(), expected[n]) for n, w in model.weights().items())
    assert (
        set(opened) <= {"cpu", None}
        and opened.count("cpu") == 4
        and current == [torch.device("cuda:0")]
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_a_lack_of_memory_is_known_by_its_message(message):
    assert out_of_memory(RuntimeError(message)) and not out_of_memory(ValueError(message))


def test_a_gpu_that_takes_no_more_work_ends_the_run_with_3(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    clock = SimpleNamespace(on_cuda=True, lap=lambda: 0.0)
    stub = SimpleNamespace(clock=clock, decode=fails)
    with pytest.raises(EnvironmentProblem, match="no more work after .*illegal memory access") as e:
        Generation._attempt(stub, ["a request"])
    assert e.value.exit_code == 3


@pytest.mark.parametrize(
    ("gpus", "rank", "expected"), [(1, 1, "cuda:0"), (4, 1, "cuda:1"), (4, 3, "cuda:3")]
)
def test_a_process_that_sees_one_gpu_uses_it(monkeypatch, gpus, rank, expected):
    """Some launchers show each of their processes its own GPU only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(None, WorkerInfo(rank=rank, size=4, local_rank=rank)) == expected


@pytest.mark.parametrize(
    ("driver", "count", "expected"), [(False, "7", []), (True, "2", ["0", "1"]), (True, "0", None)]
)
def test_without_nvidia_smi_torch_is_asked(monkeypatch, tmp_path, driver, count, expected):
    """ROCm and slim containers have no nvidia-smi: the suite took the CPU and said nothing."""

    def call(command, **_):
        if command[0] == "nvidia-smi":
            raise FileNotFoundError
        return SimpleNamespace(stdout=f"{count}\n")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("suite.local.subprocess.run", call)
    monkeypatch.setattr("suite.local.DRIVERS", (str(tmp_path if driver else tmp_path / "none"),))
    if expected is None:
        with pytest.raises(EnvironmentProblem, match="CUDA_VISIBLE_DEVICES= in front"):
            visible_gpus()
    else:
        assert visible_gpus() == expected


def test_the_benchmark_takes_as_many_rows_as_fit(monkeypatch):
    """16 rows with a cache need 6 GB beside the 15 GB of weights."""
    preset, free = PRESETS["llada-8b"], [24 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    model = SimpleNamespace(
        config=preset.config,
        device=torch.device("cuda:0"),
        dtype=torch.bfloat16,
        acceleration=Acceleration(),
    )
    cached = preset.regimes[-1]
    assert rows_in_flight(preset, cached, model, 16) == 16
    free[0] = 6 << 30
    assert 4 < rows_in_flight(preset, cached, model, 16) < 10
    model.device = torch.device("cpu")
    assert rows_in_flight(preset, cached, model, 16) == 16


# ---- the emulator


def test_the_emulator_raises_what_cuda_raises():
    """Otherwise the tests above could not fail."""
    with emulated() as gpu:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            there + here
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        gpu.reset()
        assert there.sum().item() == 3 and there[there > 0].shape == (3,)
        assert here.to("cuda").tolist() == [1, 1, 1]
        assert gpu.waits.total() == 4 and gpu.uploads.total() == 0
        assert here.pin_memory().to("cuda", non_blocking=True).cpu().tolist() == [1, 1, 1]
        assert gpu.uploads.total() == 1
        with pytest.raises(RuntimeError, match="stream is capturing"):
            capturing(gpu)(lambda: there if there.sum().item() else None)
