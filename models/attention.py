"""Attention within each sequence of a packed batch: no padding, no mask.

On CUDA in half precision one variable-length kernel does all sequences (torch.nn.attention.varlen);
everywhere else, and where that kernel does not run, one scaled_dot_product_attention call a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import Span


@dataclass(frozen=True)
class Packed:
    """Where each sequence lies in the packed columns, worked out once for all layers.

    queries: (first, end) packed columns of each sequence; spans: what each of them reads.
    cu_q, cu_k: [B + 1] int32 running sums of query and key counts, for the varlen kernel only.
    """

    queries: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @classmethod
    def of(cls, spans: Sequence[Span], *, cached: bool, device: torch.device, dtype: torch.dtype) -> "Packed":
        ends, total = [0], [0]
        for s in spans:
            ends.append(ends[-1] + s.hi - s.lo)
            total.append(total[-1] + s.kv_end)
        queries = tuple(zip(ends, ends[1:]))
        if not varlen_works(device, dtype):
            return cls(queries, tuple(spans))
        cu_q = torch.tensor(ends, dtype=torch.int32, device=device)
        cu_k = torch.tensor(total, dtype=torch.int32, device=device) if cached else cu_q
        return cls(queries, tuple(spans), cu_q, cu_k)


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
    if packed.cu_q is not None:
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
    from torch.nn.attention.varlen import varlen_attn

    end = packed.queries[-1][1]
    if kv is not None:
        k, v = (torch.cat([t[j, : s.kv_end] for t, s in zip(kv, packed.spans)]) for j in (0, 1))
    else:
        k, v = k[:end].contiguous(), v[:end].contiguous()
    out = varlen_attn(
        q[:end].contiguous(), k, v, packed.cu_q, packed.cu_k,
        max(b - a for a, b in packed.queries), max(s.kv_end for s in packed.spans),
        enable_gqa=q.shape[1] != k.shape[1], **_no_split(),
    )  # fmt: skip
    return out if end == len(q) else F.pad(out, (0, 0, 0, 0, 0, len(q) - end))


@lru_cache(maxsize=1)
def _no_split() -> dict[str, int]:
    """num_splits=1 where this torch has it: otherwise the longest neighbour decides how keys are split."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return {"num_splits": 1} if "num_splits" in inspect.signature(varlen_attn).parameters else {}


@lru_cache(maxsize=8)
def varlen_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel runs here and agrees with SDPA on a small batch."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    spans = (Span(0, 5, 5), Span(0, 11, 11))
    cu = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    loop = Packed(((0, 5), (5, 16)), spans)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(16, heads, 64, generator=g).to(device, dtype) for heads in (4, 2, 2))
    try:
        got = _varlen(q, k, v, Packed(loop.queries, spans, cu, cu), None)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(got.float(), attend(q, k, v, loop, None).float(), atol=2e-2, rtol=2e-2)
