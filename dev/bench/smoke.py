"""The first minutes on a GPU: every path of the engine once, on random weights, in one JSON.

`python scripts/doctor.py --smoke` runs it. Nothing is downloaded. Each step gives its results or
its traceback, and one that fails does not end the rest. On a CPU the shapes are tiny, and steps
that need a GPU are skipped.
"""

from __future__ import annotations

import copy
import gc
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.algorithms import algorithms_of
from decoding.config import DecodeConfig
from decoding.engine import decode, decode_each, probe
from decoding.kv_cache import CACHES
from decoding.sampling import Rules, propose, uniforms
from decoding.schedule import make_schedule
from dev.bench.presets import PRESETS, random_model, random_prompts
from dev.bench.rounds import timed
from models import FAMILIES, acceleration
from models.attention import varlen_options
from models.checkpoint import load_weights
from models.config import ModelConfig, Span, parameter_shapes
from models.cost import row_bytes
from models.transformer import Transformer

LLADA, DREAM = PRESETS["llada-8b"].config, PRESETS["dream-7b"].config
TINY, TINY_DREAM = PRESETS["tiny"].config, PRESETS["tiny-dream"].config
PROMPT, CANVAS, BLOCK, PASSES = 200, 512, 32, 30
WEIGHTS = 0.6  # of the free memory that the weights of step "speed" may take

Found = tuple[str, dict[str, Any]]  # a line for the terminal, and all numbers


@dataclass(frozen=True)
class Step:
    """A step as it ended. state: ok | failed | skipped. text: one line, or the error's."""

    name: str
    state: str
    text: str
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None


class Differs(Exception):
    """Two paths that must agree do not. found: all numbers of the step."""

    def __init__(self, text: str, found: dict[str, Any]):
        super().__init__(text)
        self.found = found


def smoke(device: torch.device) -> Iterator[Step]:
    """The steps, each as soon as it has ended."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # more only wait for each other at tiny shapes
    for name, (step, needs_gpu) in STEPS.items():
        if needs_gpu and device.type != "cuda":
            yield Step(name, "skipped", "needs a GPU")
            continue
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                text, found = step(device)
            state, trace = "ok", None
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            state, text = "failed", f"{type(error).__name__}: {first}"
            found, trace = getattr(error, "found", {}), traceback.format_exc()
            del error
        yield Step(name, state, text, time.perf_counter() - began, found, trace)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _on(model: Transformer, device: torch.device) -> Transformer:
    """The same weights on the device; random numbers of a GPU are others than a CPU's."""
    return model if device.type == "cpu" else copy.deepcopy(model).to(device)


def _wide(device: torch.device, n_layers: int) -> Transformer:
    """A model of LLaDA-8B's width in bfloat16; on a CPU a tiny one in float32."""
    if device.type == "cpu":
        return random_model(TINY, "cpu", "float32")
    return random_model(replace(LLADA, n_layers=n_layers), str(device), "bfloat16")


def _passed(model: Transformer, prompts: Sequence[Sequence[int]], asked: int = 32) -> Tensor:
    """Logits [n, asked, V] of the last columns of each prompt, in one forward pass."""
    tokens = torch.tensor([i for ids in prompts for i in ids])
    spans = [Span(0, len(ids), len(ids)) for ids in prompts]
    ends = torch.tensor([len(ids) for ids in prompts]).cumsum(0)
    rows = torch.cat([torch.arange(end - asked, end) for end in ends])
    return model.predict(tokens, spans, rows).view(len(prompts), asked, -1)


# ---------------------------------------------------------------- the steps


def machine(device: torch.device) -> Found:
    """Versions, driver, device, memory, attention kernel."""
    from experiment.lmeval import device_stamp
    from utils import environment

    found = environment() | device_stamp(str(device))
    found["wsl"] = "microsoft" in platform.release().lower()
    text = f"torch {torch.__version__} on {device}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        heads = {"llada-8b": LLADA, "dream-7b": DREAM}
        flash = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
        found |= {
            "capability": torch.cuda.get_device_capability(device),
            "free_bytes": free,
            "total_bytes": total,
            "flash_attention": str(flash),
            "varlen": {
                name: varlen_options(device, torch.bfloat16, c.n_heads, c.n_kv_heads, c.head_dim)
                for name, c in heads.items()
            },
        }
        text += f" ({found['device_name']}), CUDA {torch.version.cuda}, varlen {found['varlen']}"
    return text, found


def tokens(device: torch.device) -> Found:
    """All algorithms, caches and temperatures in float32: a batch here, one by one on the CPU."""
    cases, differ = 0, []
    for config in (TINY, TINY_DREAM):
        plain = random_model(config, "cpu", "float32")
        here = _on(plain, device)
        verifier = random_model(
            replace(config, family="qwen2", causal=True, mask_id=None), "cpu", "float32"
        )
        prompts = [ids[: 5 + 7 * i] for i, ids in enumerate(random_prompts(config, 3, 20, 0))]
        for name, case in _cases(config):
            one = {"verifier": verifier} if name.startswith("apd") else {}
            many = {"verifier": _on(verifier, device)} if one else {}
            expected = [decode(plain, [p], case, [i], **one)[0] for i, p in enumerate(prompts)]
            got = decode(here, prompts, case, range(3), **many)
            cases += 1
            if [c.token_ids for c in got] != [c.token_ids for c in expected]:
                differ.append(f"{config.family} {name}")
    found = {"cases": cases, "differ": differ}
    if differ:
        raise Differs(f"{len(differ)} of {cases} cases differ: {', '.join(differ)}", found)
    return f"{cases} cases: the tokens of the CPU, one by one", found


def _cases(config: ModelConfig) -> Iterator[tuple[str, DecodeConfig]]:
    flags = FAMILIES[config.family].end_token_flags
    for name in algorithms_of(config.family):
        schedule = make_schedule(name, 8, 4, 1)
        for cache in CACHES:
            for temperature in (0.0, 0.7):
                window = 4 if cache == "window" else None
                case = DecodeConfig(
                    schedule, kv_cache=cache, kv_window=window, temperature=temperature
                )
                if not case.problems(config.family, flags):
                    yield f"{name} {cache} T={temperature:g}", case


def batch_bits(device: torch.device) -> Found:
    """Bits of a row alone, in 8, in 16, beside an empty one; the varlen kernel against SDPA."""
    model = _wide(device, 4)
    length = 64 if device.type == "cpu" else PROMPT + CANVAS
    prompts = random_prompts(model.config, 16, length, 1)
    alone = _passed(model, prompts[:1])[0]
    found: dict[str, Any] = {
        f"equal_in_{n}": torch.equal(_passed(model, prompts[:n])[0], alone) for n in (8, 16)
    }
    cache = model.new_cache()
    for _ in range(2):
        cache.add(length)
    at, ids = torch.arange(length - 32, length), torch.tensor(prompts[0])
    beside = model.predict(ids, [(0, length, length), (0, 0, 0)], at, cache)
    found["equal_beside_an_empty_one"] = torch.equal(beside, alone)
    if model.varlen is not None:
        plain = copy.copy(model)
        plain.__class__ = type("WithoutVarlen", (Transformer,), {"varlen": None})
        gap = (_passed(plain, prompts[:8]).float() - _passed(model, prompts[:8]).float()).abs()
        found["varlen_against_sdpa"] = gap[gap.isfinite()].max().item()
    return ", ".join(f"{k} {v}" for k, v in found.items()), found


def graphs(device: torch.device) -> Found:
    """CUDA graphs of eight shapes, bit for bit; then ten shapes where three are kept."""
    model, told, memory = _wide(device, 4), [], []
    prompts = random_prompts(model.config, 8, 1024, 2)
    shapes = [[ids[: 128 * (i + 1) - 8]] for i, ids in enumerate(prompts)]
    shapes += [[ids[:n] for ids in prompts[:2]] for n in (60, 120)]
    plain = [_passed(model, shape) for shape in shapes]
    model.accelerate(cuda_graphs=True, tell=told.append)
    same = [torch.equal(_passed(model, s), p) for s, p in zip(shapes[:8] * 2, plain[:8] * 2)]
    kept, most = len(model.acceleration.graphs.kept), acceleration.MOST_GRAPHS
    acceleration.MOST_GRAPHS = 3
    try:
        model.accelerate(cuda_graphs=True, tell=told.append)
        for s, p in zip(shapes * 2, plain * 2):
            same.append(torch.equal(_passed(model, s), p))
            memory.append(torch.cuda.memory_allocated(device))
    finally:
        acceleration.MOST_GRAPHS = most
    found = {"equal": same, "kept": kept, "told": told, "memory_bytes": memory}
    if not all(same):
        raise Differs(f"{same.count(False)} of {len(same)} passes differ: {told}", found)
    return f"{len(same)} passes equal, {kept} graphs; {'; '.join(told) or 'no note'}", found


def load(device: torch.device) -> Found:
    """A synthetic checkpoint, 2 GB on a GPU: rate, peaks, and the same bits."""
    small = TINY if device.type == "cpu" else replace(LLADA, n_layers=4, vocab_size=4096)
    config = replace(small, mask_id=small.vocab_size - 1, eos_id=2, end_ids=(2,))
    model = random_model(config, "cpu", "bfloat16")
    return _loaded(model, device)


def _loaded(model: Transformer, device: torch.device) -> Found:
    from safetensors.torch import save_file

    family, weights = FAMILIES[model.config.family], model.weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({family.checkpoint_name(n): w.contiguous() for n, w in weights.items()}, path)
        size = path.stat().st_size
        read, took = timed(
            lambda: load_weights(Path(folder), model.config, device, torch.bfloat16), device
        )
    differ = [name for name, w in read.weights().items() if not torch.equal(w.cpu(), weights[name])]
    found: dict[str, Any] = {"bytes": size, "seconds": took.wall, "peak_bytes": took.peak}
    if device.type == "cuda" and hasattr(torch.cuda, "host_memory_stats"):
        found["pinned"] = dict(torch.cuda.host_memory_stats())
    if differ:
        raise Differs(f"{len(differ)} tensors differ, the first is {differ[0]}", found)
    return f"{size / 1e6:.0f} MB at {size / took.wall / 1e9:.2f} GB/s, the same bits", found


def speed(device: torch.device) -> Found:
    """LLaDA-8B's shape, as many layers as fit: 30 steps, exact and with the dual cache."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        layer = replace(LLADA, n_layers=1)
        one, two = (_weight_bytes(replace(layer, n_layers=n)) for n in (1, 2))
        room = WEIGHTS * torch.cuda.mem_get_info(device)[0] - one
        model = _wide(device, max(1, min(LLADA.n_layers, 1 + int(room // (two - one)))))
        passes, runs = PASSES, [("none", 1), ("none", 8), ("dual", 1), ("dual", 8), ("dual", 16)]
        length, canvas, block = PROMPT, CANVAS, BLOCK
    else:
        model, passes, runs = _wide(device, 1), 5, [("none", 1), ("none", 2), ("dual", 2)]
        length, canvas, block = 20, 32, 8
    [prompt] = random_prompts(model.config, 1, length, 3)
    lines = []
    for cache, n in runs:
        schedule = make_schedule("low_confidence", canvas, block, 1)
        case = DecodeConfig(schedule, early_exit=False, kv_cache=cache)
        try:
            lines.append(_measured(model, prompt, case, n, passes))
        except torch.OutOfMemoryError:
            lines.append({"cache": cache, "rows": n, "out_of_memory": True})
    text = "; ".join(
        f"{line['cache']} x{line['rows']} "
        + (f"{line['ms']:.1f} ms" if "ms" in line else "out of memory")
        for line in lines
    )
    found = {"layers": model.config.n_layers, "passes": passes, "runs": lines}
    return f"{model.config.n_layers} layers, a step: {text}", found


def _weight_bytes(config: ModelConfig) -> int:
    return 2 * sum(map(prod, parameter_shapes(config).values()))


def _measured(
    model: Transformer, prompt: Sequence[int], case: DecodeConfig, n: int, passes: int
) -> dict[str, Any]:
    """One step of n rows: time, launches and memory, as means over the passes."""
    device, cached = model.device, case.kv_cache != "none"
    line: dict[str, Any] = {"cache": case.kv_cache, "rows": n}
    probe(model, prompt, case, n, passes=3)
    if device.type != "cuda":
        _, took = timed(lambda: probe(model, prompt, case, n, passes=passes), device)
        return line | {"ms": took.wall * 1e3 / passes}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock = time.perf_counter()
    began.record()
    probe(model, prompt, case, n, passes=passes)
    ended.record()
    host = time.perf_counter() - clock
    torch.cuda.synchronize(device)
    wall = time.perf_counter() - clock
    peak = torch.cuda.max_memory_allocated(device) - before
    schedule, length = case.schedule, len(prompt) + case.schedule.gen_length
    reckoned = n * row_bytes(
        model.config, length, schedule.block_length, model.dtype.itemsize, cached
    )
    kind = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profiled:
        probe(model, prompt, case, n, passes=3)
        torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA
    kernels = sum(event.device_type == cuda for event in profiled.events())
    return line | {
        "ms": began.elapsed_time(ended) / passes,
        "wall_ms": wall * 1e3 / passes,
        "host_ms": host * 1e3 / passes,
        "kernels": kernels / 3,
        "peak_bytes": peak,
        "peak_over_reckoned": peak / reckoned,
    }


def sampler(device: torch.device) -> Found:
    """32 rows of the sampler at temperature 0.2 and top_p 0.95, float64 and float32."""
    sizes = (LLADA.vocab_size, DREAM.vocab_size) if device.type == "cuda" else (TINY.vocab_size,)
    found = {}
    for size in sizes:
        noise = uniforms(0, 0, 32)[0].to(device)
        made = torch.Generator(device=device).manual_seed(0)
        logits = torch.empty(32, size, device=device).normal_(0, 6, generator=made)
        for dtype in (torch.float64, torch.float32):
            rules = Rules(temperature=0.2, top_p=0.95, dtype=dtype, scores_the_draw=True)
            drawn = partial(propose, logits.bfloat16(), rules, frozenset({"confidence"}), noise)
            drawn()
            _, took = timed(drawn, device)
            found[f"{size} {str(dtype).removeprefix('torch.')}"] = took.wall * 1e3
    return ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items()), {"ms": found}


def compiled(device: torch.device) -> Found:
    """--compile: whether three lengths need another graph than the warm-up has made."""
    from torch._dynamo.utils import counters

    model, told = _wide(device, 4), []
    model.accelerate(compile=True, tell=told.append)
    made = counters["stats"]["unique_graphs"]
    for length in (300, 500, 712):
        _passed(model, random_prompts(model.config, 1, length, 4))
    again = counters["stats"]["unique_graphs"] - made
    found = {"notes": model.acceleration.notes, "graphs": made, "recompiled": again}
    if told:
        raise Differs("; ".join(told), found)
    return f"{made} graphs, {again} more for three lengths", found


def waits(device: torch.device) -> Found:
    """Times that the host waits for the device, in ten steps."""
    model = _wide(device, 4)
    [prompt] = random_prompts(model.config, 1, PROMPT, 5)
    case = DecodeConfig(make_schedule("low_confidence", CANVAS, BLOCK, 1), kv_cache="dual")
    probe(model, prompt, case, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            probe(model, prompt, case, 4, passes=10)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    texts = [str(w.message) for w in seen if "called a synchronizing" in str(w.message)]
    found = {"waits": len(texts), "steps": 10, "messages": sorted({*texts})}
    return f"{len(texts) / 10:g} waits for the device in a step; expected: 1", found


def halving(device: torch.device) -> Found:
    """Lack of memory, provoked: the batch is halved and every sample is decoded."""
    from tqdm import tqdm

    from experiment.generation import Clock, Generation
    from experiment.sample import Request, Sample

    model = _wide(device, 4)
    case = DecodeConfig(make_schedule("low_confidence", BLOCK, BLOCK, 16))
    asked = [
        Request({}, i, key=f"{i:016x}", prompt_ids=tuple(ids))
        for i, ids in enumerate(random_prompts(model.config, 16, 2000, 6))
    ]

    def answers(requests: Sequence[Request]) -> Iterator:
        ids = [request.prompt_ids for request in requests]
        n = generation.batch_size
        for at, done in decode_each(model, ids, case, range(len(ids)), batch_size=n):
            yield requests[at], done

    def read(request: Request, completion: Any, seconds: float) -> Sample:
        return Sample(request, completion, cost_seconds=seconds)

    generation = Generation(answers, read, Clock(device), batch_size=16)
    torch.cuda.empty_cache()
    device = model.device  # with its number, which the fraction needs
    total = torch.cuda.mem_get_info(device)[1]
    each = row_bytes(model.config, 2000 + BLOCK, BLOCK, model.dtype.itemsize)
    room = torch.cuda.memory_reserved(device) + 6 * each
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        samples = generation.run(asked, tqdm(total=16, disable=True))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    failed = sum(sample.error is not None for sample in samples)
    found = {"halved": generation.halved, "samples": len(samples), "failed": failed}
    if failed or not generation.halved:
        raise Differs(f"halved {generation.halved}, {failed} of 16 samples failed", found)
    return f"{generation.halved} did not fit, {generation.batch_size} did; no sample failed", found


# name -> the step, and whether it needs a GPU
STEPS: dict[str, tuple[Callable[[torch.device], Found], bool]] = {
    "machine": (machine, False),
    "tokens": (tokens, False),
    "batch bits": (batch_bits, False),
    "graphs": (graphs, True),
    "load": (load, False),
    "speed": (speed, False),
    "sampler": (sampler, False),
    "compile": (compiled, True),
    "waits": (waits, True),
    "halving": (halving, True),
}
