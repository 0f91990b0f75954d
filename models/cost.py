"""What a forward pass costs: arithmetic and memory, from a ModelConfig alone; and how many samples it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.config import ModelConfig, Span

if TYPE_CHECKING:
    from models.transformer import Transformer

# One H200 needs 2,000 to 4,000 columns a forward pass before a larger batch gains nothing (arithmetic, not measured).
ENOUGH_COLUMNS = 4096
MOST_ROWS = 64
# A CPU is busy with one sample already.
CPU_ROWS = 1
# Of the free memory, what a batch may fill (fragments and other processes have the rest), less a chunk of float64 scores.
FILL, SCORES_BYTES = 0.8, 1 << 30


def matmul_flops(config: ModelConfig, spans: Sequence[Span], n_rows: int) -> int:
    """Floating-point operations of one `predict`: matrix products and attention, the last layer for n_rows alone."""
    c = config
    columns = sum(s.hi - s.lo for s in spans)
    pairs = sum((s.hi - s.lo) * s.kv_end for s in spans)
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    keys, others = 2 * 2 * c.d_model * kv, 2 * (2 * c.d_model * heads + 3 * c.d_model * c.d_ff)
    full = columns * (keys + others) + 4 * heads * pairs
    last = columns * keys + n_rows * others + 4 * heads * pairs * n_rows // max(columns, 1)
    return (c.n_layers - 1) * full + last + 2 * n_rows * c.d_model * c.vocab_size


def row_bytes(config: ModelConfig, length: int, open_rows: int, itemsize: int) -> int:
    """Bytes that one more sample of `length` columns, `open_rows` of them asked for, needs during a forward pass.

    The largest moment of a layer (residual, normed copy, gate, up and their product) or the logits with one copy.
    """
    c = config
    layer = length * (3 * c.d_model + 3 * c.d_ff) * itemsize + length * c.d_model * 4
    logits = 2 * open_rows * c.vocab_size * itemsize
    return layer + logits


def batch_rows(
    config: ModelConfig, length: int, open_rows: int, itemsize: int, free_bytes: int | None, device_type: str
) -> int:
    """Samples in flight that fit and help: enough columns to fill a GPU, within the memory that is free."""
    if device_type == "cpu":
        return CPU_ROWS
    helpful = min(MOST_ROWS, -(-ENOUGH_COLUMNS // length))
    if free_bytes is None:
        return helpful
    return max(1, min(helpful, int(free_bytes * FILL - SCORES_BYTES) // row_bytes(config, length, open_rows, itemsize)))


def fitting_rows(model: Transformer, length: int, open_rows: int) -> int:
    """`batch_rows` for a loaded model and the memory that its device has left."""
    import torch

    free, device = None, model.device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    return batch_rows(model.config, length, open_rows, model.dtype.itemsize, free, device.type)
