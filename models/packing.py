"""Where everything of one forward pass lies, worked out on the host before the device hears of it.

Sequences lie end to end without padding between them. Behind the last one columns are added up to a multiple, and
behind the asked rows of each sequence rows, so that a row's last bits do not depend on how many neighbours it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.config import Span

if TYPE_CHECKING:
    from models.config import ModelConfig

# Matrix products run on a multiple of 8 rows. Other counts leave a thread with 1 to 3 rows, which
# take another kernel, so that a row's last bits would depend on how many neighbours it has
# (measured on a CPU in float32: 1-3 rows with 1, 3 or 4 threads, up to 11 with 2 or 8, up to 27
# with 16; never a multiple of 8). On CUDA whole tiles: fewer shapes, hence fewer kernels to choose from.
ROWS = {"cpu": 8, "cuda": 32}
COLUMNS = {"cpu": 8, "cuda": 128}

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """One forward pass over T packed columns of B sequences that is asked for R rows.

    spans:     what each sequence computes and reads.
    columns:   [B] first and end packed column of each sequence.
    positions: [T'] column within its sequence, T' being T to a multiple; 0 behind T.
    asked:     [A] packed columns whose hidden states are wanted, sequence by sequence, each to a multiple of rows
               (its first one repeated), so A >= R.
    queries:   [B] first and end of each sequence in `asked`.
    back:      [R'] where in `asked` each wanted row is, in the order in which it was asked for; R' as T'.
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

    Raises ValueError where a row is not one of the columns, or a shifted model would need a column that is not computed.
    """
    row_step = ROWS.get(device_type, ROWS["cpu"])
    spans = tuple(spans)
    columns, positions = _columns(spans, COLUMNS.get(device_type, COLUMNS["cpu"]))
    T = columns[-1][1]
    if len(rows) and not 0 <= rows.min() <= rows.max() < T:
        raise ValueError(
            f"predict: rows {rows.min()} to {rows.max()} asked for, but there are {T} columns"
        )
    if len(spans) == 1:  # what follows costs more than a small model's arithmetic
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
    return Plan(
        spans,
        columns,
        positions,
        asked,
        queries,
        padded(back, up_to(len(back), row_step)),
        len(rows),
    )


@lru_cache(maxsize=64)
def _columns(spans: tuple[Span, ...], step: int) -> tuple[tuple[Range, ...], np.ndarray]:
    """Plan.columns and Plan.positions: the same at every step of a row without a cache, so kept, and never written."""
    columns = ranges([s.hi - s.lo for s in spans])
    T = columns[-1][1]
    return columns, padded(np.concatenate([np.arange(s.lo, s.hi) for s in spans]), up_to(T, step))


def padded(array: np.ndarray, n: int, value: int = 0) -> np.ndarray:
    """int64 array, or a copy with `value` behind it, n long. np.pad takes ten times as long."""
    return (
        array
        if len(array) == n
        else np.concatenate([array, np.full(n - len(array), value, dtype=np.int64)])
    )


def _left_neighbours(rows: np.ndarray, first: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """Packed columns of the hidden states that predict `rows` in a shifted model; `first`: of their sequence."""
    if (first & (lo > 0)).any():
        raise ValueError(
            "predict: the first column of a span with lo > 0 was asked for, but this model reads it "
            "from the column to its left, which is not computed; start the span one column earlier"
        )
    return rows - 1 + first


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """int64 arrays as tensors on the device, in one transfer for which nothing waits."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    if device.type != "cuda":
        return [torch.from_numpy(a).to(device) for a in arrays]
    whole = torch.from_numpy(np.concatenate(arrays)).pin_memory().to(device, non_blocking=True)
    return list(whole.split([len(a) for a in arrays]))
