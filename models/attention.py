"""Attention within each sequence of a packed batch, without padding; masked in a causal model only.

On CUDA in half precision one variable-length kernel computes all sequences
(torch.nn.attention.varlen). Everywhere else, where that kernel does not run, and in a causal model
there is one call of scaled_dot_product_attention for each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import Span
from models.packing import Range, ranges, to_device

try:
    from torch.nn.attention import varlen
except ImportError:  # an older torch
    varlen = None


@dataclass(frozen=True)
class Packed:
    """The rows of q, k and v that belong to each of B sequences; layers share it.

    queries: first and end row in q.
    columns: first and end row in k and v.
    spans:   the columns that each sequence computes and reads.
    varlen:  options of the varlen kernel; None where sequences are computed one by one.
    cu_q, cu_k: for the kernel, [B + 1] int32 running sums of query and key counts.
    max_q, max_k: for the kernel, upper bounds of the counts.
    seen:    B bool masks [n, kv_end] of the keys that each query attends to; None for all keys.
    """

    queries: tuple[Range, ...]
    columns: tuple[Range, ...]
    spans: tuple[Span, ...]
    varlen: dict[str, int] | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    seen: tuple[Tensor, ...] | None = None

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        columns: Sequence[Range],
        queries: Sequence[Range],
        device: torch.device,
        varlen: dict[str, int] | None,
        at: Tensor | None = None,
    ) -> "Packed":
        """at: column of each query within its sequence, in a causal model; None in any other."""
        ranges_of = (tuple(queries), tuple(columns), tuple(spans))
        if at is not None:
            assert varlen is None, "the varlen kernel takes no mask"
            keys = [torch.arange(s.kv_end, device=device) for s in spans]
            seen = tuple(k <= at[a:b, None] for (a, b), k in zip(queries, keys))
            return cls(*ranges_of, seen=seen)
        if varlen is None:
            return cls(*ranges_of)
        read = ranges([s.kv_end for s in spans])
        sums = [np.array([0, *(end for _, end in part)]) for part in (queries, read)]
        cu_q, cu_k = (t.int() for t in to_device(device, *sums))
        max_q, max_k = (max(b - a for a, b in part) for part in (queries, read))
        return cls(*ranges_of, varlen, cu_q, cu_k, max_q, max_k)


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: list[Tensor] | None) -> Tensor:
    """Attention output [A, H, E] of q [A, H, E], k and v [T, K, E].

    kv: for each sequence its cache [2, length, K, E], written at [lo, hi) and read at [0, kv_end);
    None: a sequence attends to its own packed columns. The output is zero for rows of q behind the
    last sequence, which are padding.
    """
    if kv is not None:
        for (a, b), s, store in zip(packed.columns, packed.spans, kv):
            store[0, s.lo : s.hi] = k[a:b]
            store[1, s.lo : s.hi] = v[a:b]
    if packed.varlen is not None:
        return _varlen(q, k, v, packed, kv)
    out = []
    for i, ((a, b), (c, d), s) in enumerate(zip(packed.queries, packed.columns, packed.spans)):
        if a == b:
            continue
        keys, values = (
            (k[c:d], v[c:d]) if kv is None else (kv[i][0, : s.kv_end], kv[i][1, : s.kv_end])
        )
        out.append(_sdpa(q[a:b], keys, values, None if packed.seen is None else packed.seen[i]))
    end = packed.queries[-1][1]
    if end < len(q) or not out:
        out.append(torch.zeros_like(q[end:]))
    return out[0] if len(out) == 1 else torch.cat(out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """[n, H, E] of q [n, H, E], k and v [m, K, E]. seen: bool mask [n, m] of keys; None: all."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
    )[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: list[Tensor] | None) -> Tensor:
    end = packed.queries[-1][1]
    if not end:
        return torch.zeros_like(q)
    if kv is not None:
        k, v = (torch.cat([t[j, : s.kv_end] for t, s in zip(kv, packed.spans)]) for j in (0, 1))
    else:
        n = packed.columns[-1][1]
        k, v = k[:n].contiguous(), v[:n].contiguous()
    out = varlen.varlen_attn(
        q[:end].contiguous(),
        k,
        v,
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        enable_gqa=q.shape[1] != k.shape[1],
        **packed.varlen,
    )
    return out if end == len(q) else F.pad(out, (0, 0, 0, 0, 0, len(q) - end))


@lru_cache(maxsize=8)
def varlen_options(
    device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int
) -> dict[str, int] | None:
    """Options of the varlen kernel for such heads; None where it cannot be used."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or varlen is None:
        return None
    return probe(device, dtype, n_heads, n_kv_heads, head_dim)


def probe(
    device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int
) -> dict[str, int] | None:
    """Options with which the varlen kernel runs here and agrees with SDPA, or None.

    num_splits=1 where the kernel accepts it: otherwise the longest sequence of the batch decides
    how all keys are split, and with it the last bits of the output (pytorch/pytorch#176905).
    """
    spans, at = (Span(0, 5, 5), Span(0, 11, 11)), ranges([5, 11])
    noise = torch.Generator().manual_seed(0)
    shapes = ((16, heads, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads))
    q, k, v = (torch.randn(shape, generator=noise).to(device, dtype) for shape in shapes)
    expected = attend(q, k, v, Packed.of(spans, at, at, device, None), None)
    for options in ({"num_splits": 1}, {}):
        try:
            got = _varlen(q, k, v, Packed.of(spans, at, at, device, options), None)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue
        if torch.allclose(got.float(), expected.float(), atol=2e-2, rtol=2e-2):
            return options
    return None
