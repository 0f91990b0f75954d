"""The memory that a sample needs in a forward pass, and the batch size that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from models.config import ModelConfig
from utils import out_of_memory

if TYPE_CHECKING:
    import torch

    from models.transformer import Transformer

# Beyond 2,000 to 4,000 columns a larger batch gains nothing on an H200 (calculated, not measured).
ENOUGH_COLUMNS = 4096
MOST_ROWS = 64
# With a KV cache most passes compute one block, bound by reading the weights (calculated).
CACHED_ROWS = 16
# One sample does not keep a CPU busy.
CPU_ROWS = 8
# A batch may fill this share of the free memory, less a chunk of float64 scores. The rest is for
# fragmentation and other processes.
FILL, SCORES_BYTES = 0.8, 1 << 30
# An algorithm that observes the logits needs this many float64 copies of one sample's (`klass`).
OBSERVING = 6


def row_bytes(
    config: ModelConfig,
    length: int,
    open_rows: int,
    itemsize: int,
    cached: bool = False,
    observed: bool = False,
) -> int:
    """Bytes that one more sample of `length` columns, `open_rows` of them asked, needs.

    They are the larger of a layer's peak (gate, up and their product; q, k and v; rotated q and k;
    the attention's output; three times the width) and the logits; with a cache the sample's slot;
    and where the algorithm observes the logits its memory of them, in float64.
    """
    c = config
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer = length * 3 * (c.d_ff + heads + kv + c.d_model) * itemsize
    slot = length * 2 * kv * c.n_layers * itemsize if cached else 0
    numbers = open_rows * c.vocab_size
    return max(layer, numbers * itemsize) + slot + (8 * numbers if observed else 0)


def batch_rows(
    config: ModelConfig,
    length: int,
    open_rows: int,
    itemsize: int,
    free_bytes: int | None,
    device_type: str,
    cached: bool = False,
    observed: bool = False,
    wanted: int | None = None,
) -> int:
    """How many samples to decode at once: enough columns to fill a GPU, within the free memory.

    wanted: decode so many, if they fit.
    """
    if device_type == "cpu":
        return wanted or CPU_ROWS
    helpful = wanted or min(
        MOST_ROWS, max(-(-ENOUGH_COLUMNS // length), CACHED_ROWS if cached else 1)
    )
    if free_bytes is None:
        return helpful
    each = row_bytes(config, length, open_rows, itemsize, cached, observed)
    # the scores of one sample at a time are observed
    scores = OBSERVING * 8 * open_rows * config.vocab_size if observed else SCORES_BYTES
    return max(1, min(helpful, int(free_bytes * FILL - max(scores, SCORES_BYTES)) // each))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device, with what torch has reserved and does not use; else None."""
    import torch

    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def room_of(model: Transformer) -> int | None:
    """Free memory for samples on a model's device, without that of its CUDA graphs' results."""
    from models.acceleration import MOST_COLUMNS

    free = free_bytes(model.device)
    if free is not None and model.acceleration.graphs is not None:
        # the results of all graphs, and a copy of one
        free -= 2 * MOST_COLUMNS * model.config.vocab_size * model.dtype.itemsize
    return free


def fitting_rows(
    model: Transformer,
    length: int,
    open_rows: int,
    cached: bool,
    observed: bool = False,
    wanted: int | None = None,
    probe: Callable[[int], object] | None = None,
) -> int:
    """`batch_rows` for a loaded model and the free memory of its device.

    probe: decodes the first steps of that many samples of this shape. Where it is given, the memory
           that it takes on a GPU replaces the reckoned one.
    """
    shape, more = (
        (model.config, length, open_rows, model.dtype.itemsize),
        (cached, observed, wanted),
    )
    kind = model.device.type
    reckoned = batch_rows(*shape, room_of(model), kind, *more)
    if probe is None or kind != "cuda":
        return reckoned
    return min(batch_rows(*shape, None, kind, *more), probed_rows(probe, model))


def probed_rows(probe: Callable[[int], object], model: Transformer) -> int:
    """How many samples fit into the free memory, by the peaks of one and of two; at least 1.

    What the second sample adds is counted for each sample, and the rest of the first peak once.
    """
    import torch

    device, free, peaks = model.device, room_of(model), []
    try:
        for n in (1, 2):
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            probe(n)
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return 1
    finally:
        torch.cuda.reset_peak_memory_stats(device)  # the peak of the samples is reported
    each = max(1, peaks[1] - peaks[0])
    return max(1, (int(free * FILL) - max(0, peaks[0] - each)) // each)
