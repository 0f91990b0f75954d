"""Attention within each sequence of a packed batch, without padding; masked in a causal model only.

On CUDA in half precision one variable-length kernel computes all sequences
(torch.nn.attention.varlen). Everywhere else, and where that kernel does not run, there is one call
of scaled_dot_product_attention for each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import Span
from models.packing import Inputs, Plan, Range, ranges, to_device

try:
    from torch.nn.attention import varlen
except ImportError:  # an older torch
    varlen = None


@dataclass(frozen=True)
class Packed:
    """The rows of q, k and v that belong to each sequence; layers share it.

    For the varlen kernel, where the padding behind the last of B sequences is one more sequence:

    varlen:  its options; None where sequences are computed one by one.
    cu_q:    [S + 1] int32 running sums of query counts, S > B.
    cu_k:    the same of key counts; with a cache the first column of each sequence in it.
    max_q, max_k: upper bounds of the counts.
    used_k:  with a cache, [S] int32 key counts.
    into:    with a cache, [T'] int64 the column in it where each computed column is written.
    causal:  a query attends to no key to its right. The queries are the last columns.

    Otherwise:

    queries: first and end row in q.
    columns: first and end row in k and v.
    spans:   the columns that each sequence computes and reads.
    slots:   first column of each sequence in a cache.
    seen:    B bool masks [n, kv_end] of the keys that each query attends to; None for all keys.
    """

    varlen: dict[str, int] | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    used_k: Tensor | None = None
    into: Tensor | None = None
    causal: bool = False
    queries: tuple[Range, ...] = ()
    columns: tuple[Range, ...] = ()
    spans: tuple[Span, ...] = ()
    slots: tuple[int, ...] = ()
    seen: tuple[Tensor, ...] | None = None

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        columns: Sequence[Range],
        queries: Sequence[Range],
        slots: Sequence[int] = (),
        at: Tensor | None = None,
    ) -> "Packed":
        """Sequence by sequence. at: column of each query within its own, in a causal model only."""
        seen = None
        if at is not None:
            keys = [torch.arange(s.kv_end, device=at.device) for s in spans]
            seen = tuple(k <= at[a:b, None] for (a, b), k in zip(queries, keys))
        ranges_of = dict(queries=tuple(queries), columns=tuple(columns), spans=tuple(spans))
        return cls(**ranges_of, slots=tuple(slots), seen=seen)


@dataclass(frozen=True)
class Sizes:
    """What fixes the shapes of a pass through the varlen kernel.

    columns, asked, back: lengths of the Plan's arrays. sequences: the padding included.
    most_q, most_k: bounds of the columns that one sequence computes and reads.
    cached, causal: whether there is a cache, and whether the model is causal.
    """

    columns: int
    asked: int
    back: int
    sequences: int
    most_q: int
    most_k: int
    cached: bool
    causal: bool

    @classmethod
    def of(cls, plan: Plan, cached: bool, causal: bool) -> "Sizes":
        n = len(plan.positions)
        padding = n - plan.columns[-1][1]
        most_q = max(padding, *(b - a for a, b in (*plan.columns, *plan.queries)))
        most_k = max(1 if cached else padding, *(s.kv_end for s in plan.spans))
        sequences = len(plan.spans) + 1
        lengths = n, len(plan.asked), len(plan.back)
        return cls(*lengths, sequences, most_q, most_k, cached, causal)

    def arrays(self, tokens: np.ndarray, plan: Plan, starts: Sequence[int]) -> list[np.ndarray]:
        """All int64 arrays of a pass, whose lengths are `lengths`.

        starts: first column of each sequence in the cache, and the column for padding; or nothing.
        """
        behind = self.sequences - len(plan.spans)
        cu_q, cu_asked = (
            np.array([0, *(b for _, b in ranges_of), *[n] * behind])
            for ranges_of, n in ((plan.columns, self.columns), (plan.queries, self.asked))
        )
        arrays = [tokens, plan.positions, plan.asked, plan.back, cu_q, cu_asked]
        if self.cached:
            # the kernel's causal mask is aligned to the last key
            used = [s.hi if self.causal else s.kv_end for s in plan.spans] + [1] * behind
            starts = np.array([*starts, *[starts[-1]] * behind])
            into = plan.positions + np.repeat(starts, np.diff(cu_q, append=self.columns))
            arrays += [starts, np.array(used), into]
        return arrays

    @property
    def lengths(self) -> list[int]:
        s = self.sequences
        cached = [s + 1, s, self.columns] if self.cached else []
        return [self.columns, self.columns, self.asked, self.back, s + 1, s + 1, *cached]

    def split(self, arrays: Tensor, varlen: dict[str, int]) -> tuple[Inputs, Packed, Packed]:
        """The arrays, end to end on the device: inputs, attention's layout of all layers but the
        last one, and that of the last one, without reading their values."""
        first = sum(self.lengths[:4])
        cu = arrays[first : first + sum(self.lengths[4:8])].int()
        cu_q, cu_asked, *cached = cu.split(self.lengths[4:8])
        cu_k, used = cached if cached else (cu_q, None)
        common = dict(
            varlen=varlen,
            cu_k=cu_k,
            max_q=self.most_q,
            max_k=self.most_k,
            used_k=used,
            into=arrays[-self.columns :] if self.cached else None,
            causal=self.causal,
        )
        inputs = Inputs(*arrays[:first].split(self.lengths[:4]))
        return inputs, Packed(cu_q=cu_q, **common), Packed(cu_q=cu_asked, **common)


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: Tensor | None) -> Tensor:
    """Attention output [A, H, E] of q [A, H, E], k and v [T, K, E].

    kv: a layer's cache [2, N, K, E]; the keys of a sequence are written to it at [lo, hi) and read
    at [0, kv_end), from the sequence's first column on. None: a sequence attends to its own packed
    columns. The output is finite, without meaning, for rows of q that are padding.
    """
    if packed.varlen is not None:
        return _varlen(q, k, v, packed, kv)
    if kv is not None:
        for (a, b), s, at in zip(packed.columns, packed.spans, packed.slots):
            kv[0, at + s.lo : at + s.hi] = k[a:b]
            kv[1, at + s.lo : at + s.hi] = v[a:b]
    out = []
    for i, ((a, b), (c, d), s) in enumerate(zip(packed.queries, packed.columns, packed.spans)):
        if a == b:
            continue
        keys, values = k[c:d], v[c:d]
        if kv is not None:
            keys, values = kv[:, packed.slots[i] : packed.slots[i] + s.kv_end]
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


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, kv: Tensor | None) -> Tensor:
    if kv is not None:
        kv[0].index_copy_(0, packed.into, k)
        kv[1].index_copy_(0, packed.into, v)
        k, v = kv
    if not len(q):
        return torch.zeros_like(q)
    return varlen.varlen_attn(
        q,
        k,
        v,
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        window_size=(-1, 0) if packed.causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
        seqused_k=packed.used_k,
        **packed.varlen,
    )


@lru_cache(maxsize=8)
def varlen_options(
    device: torch.device,
    dtype: torch.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    causal: bool = False,
) -> dict[str, int] | None:
    """Options of the varlen kernel for such heads; None where it cannot be used."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or varlen is None:
        return None
    return probe(device, dtype, n_heads, n_kv_heads, head_dim, causal)


def probe(
    device: torch.device,
    dtype: torch.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    causal: bool = False,
) -> dict[str, int] | None:
    """Options with which the varlen kernel runs here and agrees with SDPA, or None.

    It is asked as a model asks it: for slices of q, k and v in one tensor, with padding, without a
    cache and with one whose slots are not in the order of the sequences.

    num_splits=1 where the kernel accepts it: otherwise the longest sequence of the batch decides
    how all keys are split, and with it the last bits of the output (pytorch/pytorch#176905).
    """
    spans = (Span(0, 5, 5), Span(0, 11, 11))
    at, starts, heads = ranges([5, 11]), (20, 3, 40), (n_heads, n_kv_heads, n_kv_heads)
    positions = np.array([*range(5), *range(11), 0, 0])
    none = np.zeros(0, dtype=np.int64)
    asked = Plan(spans, at, positions, none, ((0, 0), (0, 0)), none, 0)
    noise = torch.Generator().manual_seed(0)
    qkv = torch.randn((18, sum(heads), head_dim), generator=noise).to(device, dtype)
    q, k, v = qkv.split(heads, dim=1)
    mask = torch.from_numpy(positions).to(device) if causal else None
    expected = attend(q[:16], k, v, Packed.of(spans, at, at, (), mask), None).float()
    for options in ({"num_splits": 1}, {}):
        try:
            for cached in (False, True):
                sizes = Sizes.of(asked, cached, causal)
                arrays = sizes.arrays(positions, asked, starts)
                [whole] = to_device(device, np.concatenate(arrays))
                kv = k.new_zeros((2, starts[-1] + 1, *k.shape[1:])) if cached else None
                got = _varlen(q, k, v, sizes.split(whole, options)[1], kv)[:16].float()
                if not torch.allclose(got, expected, atol=2e-2, rtol=2e-2):
                    break
            else:
                return options
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            continue
    return None
