"""Attention within each sequence of a packed batch: no padding, no mask.

On CUDA in half precision one variable-length kernel does all sequences (torch.nn.attention.varlen);
everywhere else, and where that kernel does not run, one scaled_dot_product_attention call a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import Span

try:
    from torch.nn.attention import varlen
except ImportError:  # an older torch
    varlen = None


@dataclass(frozen=True)
class Packed:
    """Where each sequence lies in the packed columns, worked out once for all layers.

    queries: (first, end) packed columns of each sequence; spans: what each of them reads.
    varlen:  options of the varlen kernel, None where the loop is used instead; with it
    cu_q, cu_k: [B + 1] int32 running sums of query and key counts.
    """

    queries: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    varlen: dict[str, int] | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, varlen: dict[str, int] | None) -> "Packed":
        ends = list(accumulate((s.hi - s.lo for s in spans), initial=0))
        queries = tuple(zip(ends, ends[1:]))
        if varlen is None:
            return cls(queries, tuple(spans))
        keys = list(accumulate((s.kv_end for s in spans), initial=0))
        cu_q = torch.tensor(ends, dtype=torch.int32, device=device)
        cu_k = cu_q if keys == ends else torch.tensor(keys, dtype=torch.int32, device=device)
        return cls(queries, tuple(spans), varlen, cu_q, cu_k)


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: list[Tensor] | None) -> Tensor:
    """Attention output [T, H, E] of q [T, H, E], k and v [T, K, E].

    kv: [2, length, K, E] of each sequence, written at [lo, hi) and read at [0, kv_end); None
    means that a sequence attends to its own packed columns. Rows of q behind the last sequence
    (padding) come back as zeros.
    """
    if kv is not None:
        for (a, b), s, store in zip(packed.queries, packed.spans, kv):
            store[0, s.lo : s.hi] = k[a:b]
            store[1, s.lo : s.hi] = v[a:b]
    if packed.varlen is not None:
        return _varlen(q, k, v, packed, kv)
    out = []
    for i, ((a, b), s) in enumerate(zip(packed.queries, packed.spans)):
        if a == b:
            continue
        keys, values = (k[a:b], v[a:b]) if kv is None else (kv[i][0, : s.kv_end], kv[i][1, : s.kv_end])
        out.append(_sdpa(q[a:b], keys, values))
    end = packed.queries[-1][1] if packed.queries else 0
    if end < len(q):
        out.append(torch.zeros_like(q[end:]))
    return out[0] if len(out) == 1 else torch.cat(out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, H, E] from q [n, H, E], k and v [m, K, E]: every query sees every key."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: list[Tensor] | None) -> Tensor:
    end = packed.queries[-1][1]
    if kv is not None:
        k, v = (torch.cat([t[j, : s.kv_end] for t, s in zip(kv, packed.spans)]) for j in (0, 1))
    else:
        k, v = k[:end].contiguous(), v[:end].contiguous()
    out = varlen.varlen_attn(
        q[:end].contiguous(), k, v, packed.cu_q, packed.cu_k,
        max(b - a for a, b in packed.queries), max(s.kv_end for s in packed.spans),
        enable_gqa=q.shape[1] != k.shape[1], **packed.varlen,
    )  # fmt: skip
    return out if end == len(q) else F.pad(out, (0, 0, 0, 0, 0, len(q) - end))


@lru_cache(maxsize=8)
def varlen_options(
    device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int
) -> dict[str, int] | None:
    """How to call the varlen kernel for such heads; None where the loop is to be used."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or varlen is None:
        return None
    return probe(device, dtype, n_heads, n_kv_heads, head_dim)


def probe(
    device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int
) -> dict[str, int] | None:
    """Options with which the varlen kernel runs here and agrees with SDPA on a small batch, or None.

    num_splits=1 wherever it is taken: otherwise the longest neighbour decides how a sequence's keys
    are split, and with it the last bits of its output (pytorch/pytorch#176905).
    """
    spans = (Span(0, 5, 5), Span(0, 11, 11))
    noise = torch.Generator().manual_seed(0)
    shapes = ((16, heads, head_dim) for heads in (n_heads, n_kv_heads, n_kv_heads))
    q, k, v = (torch.randn(shape, generator=noise).to(device, dtype) for shape in shapes)
    expected = attend(q, k, v, Packed.of(spans, device, None), None)
    for options in ({"num_splits": 1}, {}):
        try:
            got = _varlen(q, k, v, Packed.of(spans, device, options), None)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue
        if torch.allclose(got.float(), expected.float(), atol=2e-2, rtol=2e-2):
            return options
    return None
