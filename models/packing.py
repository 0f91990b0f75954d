"""The layout of one forward pass, computed on the host before anything is sent to the device.

Sequences lie end to end without padding between them. The columns are padded behind the last
sequence, the asked rows behind each sequence, to a multiple: the last bits of a row then do not
depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.config import ModelConfig, Span

# Matrix products run on a multiple of 8 rows. Other counts leave a thread with 1 to 3 rows, for
# which the library has a different kernel: the last bits of a row would depend on how many others
# there are (measured on a CPU in float32: 1-3 rows with 1, 3 or 4 threads, up to 11 with 2 or 8, up
# to 27 with 16; never a multiple of 8). On CUDA whole tiles: fewer shapes, fewer kernels to choose.
ROWS = {"cpu": 8, "cuda": 32}
COLUMNS = {"cpu": 8, "cuda": 128}

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """One forward pass over T packed columns of B sequences that returns R rows.

    T' is T rounded up to a multiple, and R' is R.

    spans:     the columns that each sequence computes and reads.
    columns:   [B] first and end packed column of each sequence.
    positions: [T'] column within its sequence; 0 for padding.
    asked:     [A] packed columns whose hidden states are needed, sequence by sequence, each padded
               to a multiple by repeating its first one; A >= R.
    queries:   [B] first and end of each sequence in `asked`.
    back:      [R'] index in `asked` of each row, in the caller's order.
    n_rows:    R.
    """

    spans: tuple[Span, ...]
    columns: tuple[Range, ...]
    positions: np.ndarray
    asked: np.ndarray
    queries: tuple[Range, ...]
    back: np.ndarray
    n_rows: int


class Inputs(NamedTuple):
    """A Plan's arrays on the device: tokens and positions [T'], asked [A], back [R'], all int64."""

    tokens: Tensor
    positions: Tensor
    asked: Tensor
    back: Tensor


def ranges(counts: Sequence[int]) -> tuple[Range, ...]:
    """First and end of consecutive groups of these sizes."""
    ends = list(accumulate(counts, initial=0))
    return tuple(zip(ends, ends[1:]))


def up_to(n: int, multiple: int) -> int:
    """n, or the next multiple of `multiple` above it."""
    return -(-n // multiple) * multiple


def plan(spans: Sequence[Span], rows: np.ndarray, config: ModelConfig, device_type: str) -> Plan:
    """The Plan of a call to `Transformer.predict`, rows [R] int64 in any order.

    Raises ValueError where a row is not one of the columns, or a shifted model would need a column
    that is not computed.
    """
    row_step = ROWS.get(device_type, ROWS["cpu"])
    spans = tuple(spans)
    columns, positions = _columns(spans, COLUMNS.get(device_type, COLUMNS["cpu"]))
    T = columns[-1][1]
    if len(rows) and not 0 <= rows.min() <= rows.max() < T:
        raise ValueError(
            f"predict: rows {rows.min()} to {rows.max()} asked for, but there are {T} columns"
        )
    if len(spans) == 1:  # the general case costs more than a small model's arithmetic
        if config.shift:
            rows = _left_neighbours(rows, rows == 0, np.full(len(rows), spans[0].lo))
        asked = padded(rows, up_to(len(rows), row_step), rows[0] if len(rows) else 0)
        back = padded(np.arange(len(rows)), len(asked))
        return Plan(spans, columns, positions, asked, ((0, len(asked)),), back, len(rows))
    starts, ends = np.array(columns).T
    owner = np.searchsorted(ends, rows, side="right")
    if config.shift:
        rows = _left_neighbours(rows, rows == starts[owner], np.array([s.lo for s in spans])[owner])
    counts = np.bincount(owner, minlength=len(spans))
    queries = ranges([up_to(int(n), row_step) for n in counts])
    order = np.argsort(owner, kind="stable")
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[owner[order]]
    back = np.empty(len(rows), dtype=np.int64)
    back[order] = np.array([a for a, _ in queries])[owner[order]] + rank
    asked = np.zeros(queries[-1][1], dtype=np.int64)
    for (a, b), mine in zip(queries, np.split(rows[order], np.cumsum(counts)[:-1])):
        if len(mine):
            asked[a:b] = mine[0]
    asked[back] = rows
    back = padded(back, up_to(len(back), row_step))
    return Plan(spans, columns, positions, asked, queries, back, len(rows))


@lru_cache(maxsize=64)
def _columns(spans: tuple[Span, ...], step: int) -> tuple[tuple[Range, ...], np.ndarray]:
    """Plan.columns and Plan.positions. Without a KV cache they are the same at every step of a row.

    The result is shared: it must not be written to.
    """
    columns = ranges([s.hi - s.lo for s in spans])
    T = columns[-1][1]
    return columns, padded(np.concatenate([np.arange(s.lo, s.hi) for s in spans]), up_to(T, step))


def padded(array: np.ndarray, n: int, value: int = 0) -> np.ndarray:
    """The int64 array, extended to length n by `value`. np.pad takes ten times as long."""
    if len(array) == n:
        return array
    return np.concatenate([array, np.full(n - len(array), value, dtype=np.int64)])


def _left_neighbours(rows: np.ndarray, first: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """Packed columns of the hidden states that predict `rows` in a shifted model.

    first: [R] bool, the row is the first column of its span. lo: [R], where that span begins.
    """
    if (first & (lo > 0)).any():
        raise ValueError(
            "predict: the first column of a span with lo > 0 was asked for, but this model predicts"
            " it from the column to its left, which is not computed; start the span one column"
            " earlier"
        )
    return rows - 1 + first


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """int64 arrays as tensors on the device, in one transfer that does not block."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    if device.type != "cuda":
        return [torch.from_numpy(a).to(device) for a in arrays]
    whole = torch.from_numpy(np.concatenate(arrays)).pin_memory().to(device, non_blocking=True)
    return list(whole.split([len(a) for a in arrays]))
