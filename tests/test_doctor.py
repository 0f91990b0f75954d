"""What a machine can run: the batch that fits, the doctor's findings, the smoke run."""

from types import SimpleNamespace

import pytest
import torch
from mini import LLADA

from decoding.config import DecodeConfig
from decoding.engine import probe
from decoding.schedule import make_schedule
from dev.bench.presets import PRESETS
from models import load_model
from models.cost import fitting_rows, row_bytes

GIB = 1 << 30


class Memory:
    """A stub of torch's memory statistics of a CUDA device: bytes of the weights, of each sample
    and of what all samples share.

    most: samples beyond which memory runs out.
    """

    def __init__(self, monkeypatch, free: int, each: int, shared: int = 0, most: int = 99):
        self.each, self.shared, self.most = each, shared, most
        self.weights, self.peak, self.probed = 16 * GIB, 0, []
        values = {
            "memory_allocated": lambda device: self.weights,
            "memory_reserved": lambda device: self.weights + GIB,
            "mem_get_info": lambda device: (free - GIB, 80 * GIB),
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.weights),
            "synchronize": lambda device: None,
        }
        for name, function in values.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def probe(self, n: int) -> None:
        self.probed.append(n)
        if n > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.peak = self.weights + self.shared + n * self.each


@pytest.fixture
def model():
    config = PRESETS["llada-8b"].config
    return SimpleNamespace(config=config, device=torch.device("cuda:0"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("free", "each", "shared", "rows"),
    [
        (40, GIB, 0, 6),  # no more than helps
        (5, GIB, 0, 4),  # 0.8 x 5 GiB
        (5, GIB, GIB, 3),
        (5, 2 * GIB, 0, 2),
        (1, 4 * GIB, 0, 1),
    ],
)
def test_auto_takes_the_memory_that_two_samples_were_seen_to_take(
    monkeypatch, model, free, each, shared, rows
):
    """An algorithm that keeps scores of all rows took five times of what was reckoned."""
    memory = Memory(monkeypatch, free * GIB, each, shared)
    assert fitting_rows(model, 712, 32, False, memory.probe) == rows
    assert memory.probed == [1, 2] and memory.peak == memory.weights


def test_auto_is_reckoned_where_nothing_is_probed(monkeypatch, model):
    memory = Memory(monkeypatch, 5 * GIB, 4 * GIB)
    reckoned = (int(5 * GIB * 0.8) - GIB) // row_bytes(model.config, 712, 32, 2)
    assert fitting_rows(model, 712, 32, False) == min(6, reckoned) and not memory.probed
    model.device = torch.device("cpu")
    assert fitting_rows(model, 712, 32, False, memory.probe) == 1 and not memory.probed


def test_auto_is_one_where_two_samples_do_not_fit(monkeypatch, model):
    memory = Memory(monkeypatch, 40 * GIB, GIB, most=1)
    assert fitting_rows(model, 712, 32, False, memory.probe) == 1
    with pytest.raises(ValueError, match="another fault"):
        fitting_rows(model, 712, 32, False, lambda n: int("another fault"))


@pytest.mark.parametrize("algorithm", ["low_confidence", "klass"])
def test_a_probe_runs_two_passes_of_all_its_samples(algorithm, monkeypatch):
    tiny, seen = load_model(LLADA, device="cpu", dtype="float32")[0], []
    real = tiny.predict
    monkeypatch.setattr(
        tiny, "predict", lambda *args: seen.append((len(args[1]), args[3] is None)) or real(*args)
    )
    config = DecodeConfig(make_schedule(algorithm, 16, 8, 1), kv_cache="dual")
    probe(tiny, [7, 8, 9], config, 3)
    assert seen == [(3, False)] * 2
