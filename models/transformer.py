"""One bidirectional transformer for every family; ModelConfig says where they differ.

B sequences of L columns, T packed columns (all sequences end to end), R asked rows, D width,
H query heads, K key/value heads, E head width, V vocabulary. There is no padding between
sequences: everything but attention works on [T, D], attention goes sequence by sequence.
Cast order as in LLaDA's modeling_llada.py and transformers' Qwen2: norms in float32, cast,
then times the weight.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Packed, attend, varlen_options
from models.config import ModelConfig, Span

# Matrix products run on a multiple of 8 rows. Other counts leave a thread with 1 to 3 rows, which
# take another kernel, so that a row's last bits would depend on how many neighbours it has
# (measured on a CPU in float32: 1-3 rows with 1, 3 or 4 threads, up to 11 with 2 or 8, up to 27
# with 16; never a multiple of 8).
ROWS = 8


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """Keys (after rotation) and values of some sequences, one tensor for each of them.

    slots[i]: [n_layers, 2, lengths[i], K, E]. `ends[i]` columns from the left have been written.
    Sequence i of a call to `predict` uses slot i; `drop` and `add` follow rows that leave and
    join the batch.
    """

    def __init__(self, config: ModelConfig, lengths: Sequence[int], *, device, dtype: torch.dtype):
        self._make = lambda length: torch.zeros(
            (config.n_layers, 2, length, config.n_kv_heads, config.head_dim), device=device, dtype=dtype
        )
        self.slots: list[Tensor] = []
        self.ends: list[int] = []
        for length in lengths:
            self.add(length)

    def add(self, length: int) -> None:
        """Append an empty slot for a sequence of `length` columns."""
        self.slots.append(self._make(length))
        self.ends.append(0)

    def after(self, index: int, span: Span) -> int:
        """`ends[index]` once the columns of `span` are written."""
        end = self.ends[index]
        return max(end, span.hi) if span.lo <= end else end

    def drop(self, index: int) -> None:
        """Forget slot `index`; later slots move up by one."""
        del self.slots[index], self.ends[index]


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.q = nn.Linear(c.d_model, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)
        self.head_dim = c.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packed: Packed, kv: list[Tensor] | None) -> Tensor:
        """x: [T, D] -> [T, D]. kv: this layer's [2, length, K, E] of each sequence, or None."""
        h = self.attn_norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, packed, kv)
        x = x + self.o(mixed.flatten(1))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [T, heads, E], in the dtype of cos and sin [T, 1, E].

    The first half of sin is negated: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    wide = x.to(cos.dtype)
    return (wide * cos).add_(wide.roll(x.shape[-1] // 2, -1).mul_(sin)).to(x.dtype)


class Transformer(nn.Module):
    """Token ids -> logits. See `logits` for whole sequences and `predict` for decoding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def new_cache(self) -> KVCache:
        """A cache without slots, for the sequences that `KVCache.add` brings."""
        return KVCache(self.config, [], device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Raw logits [B, L, V] of input_ids [B, L] int64: no shift, the mask token untouched."""
        B, L = input_ids.shape
        spans = [Span(0, L, L)] * B
        self._check(input_ids.reshape(-1), spans, None)
        x = self._trunk(input_ids.reshape(-1), spans, None)[: B * L]
        return self._head(x).view(B, L, -1)

    @torch.no_grad()
    def predict(
        self, tokens: Tensor, spans: Sequence[Span], rows: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [R, V] for the columns `rows`, in the model's dtype, the mask token at -inf.

        tokens: [T] int64, the columns [lo, hi) of every sequence laid end to end.
        spans:  one (lo, hi, kv_end) for each sequence. Without a cache lo = 0 and kv_end = hi. With one, keys and
                values of the computed columns are written and [0, kv_end) is read.
        rows:   [R] int64, packed indices. Row i of the result is the distribution FOR that column:
                Dream reads the hidden state one column to the left, but for column 0.
        Raises ValueError where spans, tokens, rows and cache do not fit together.
        """
        spans = [Span(*s) for s in spans]
        spans = [Span(*s) for s in spans]
        self._check(tokens, spans, cache)
        if self.config.shift:
            rows = self._left_neighbours(rows, spans, len(tokens))
        x = self._trunk(tokens, spans, cache)
        if cache is not None:
            cache.ends = [cache.after(i, s) for i, s in enumerate(spans)]
        out = self._head(x[rows])
        out[:, self.config.mask_id] = -torch.inf
        return out

    def _head(self, x: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, D], computed on a multiple of 8 rows."""
        R = len(x)
        if R % ROWS:
            x = F.pad(x, (0, 0, 0, -R % ROWS))
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return F.linear(self.norm(x), weight)[:R]

    def _trunk(self, tokens: Tensor, spans: Sequence[Span], cache: KVCache | None) -> Tensor:
        """Hidden states [T to a multiple of 8, D] before the last norm; rows from T on mean nothing."""
        cos, sin = self._angles(spans)
        if extra := -len(tokens) % ROWS:
            tokens = F.pad(tokens, (0, extra))
            cos, sin = (F.pad(t, (0, 0, 0, 0, 0, extra)) for t in (cos, sin))
        c = self.config
        options = varlen_options(self.device, self.dtype, c.n_heads, c.n_kv_heads, c.head_dim)
        packed = Packed.of(spans, self.device, options)
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, packed, None if cache is None else [slot[i] for slot in cache.slots])
        return x

    def _angles(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """cos and signed sin [T, 1, E] of the spans' columns, float32 for LLaDA, else the model's dtype."""
        end = max((s.hi for s in spans), default=0)
        dtype = torch.float32 if self.config.rope_in_float32 else self.dtype
        table = self._rope
        if table is None or len(table[0]) < end or table[0].device != self.device or table[0].dtype != dtype:
            columns = max(end, min(2048, self.config.max_length))
            steps = torch.arange(0, self.config.head_dim, 2, dtype=torch.int64).float()
            inverse = 1.0 / (self.config.rope_theta ** (steps / self.config.head_dim))
            angle = torch.outer(torch.arange(columns).float(), inverse)[:, None, :]
            cos, sin = angle.cos(), angle.sin()
            halves = ((cos, cos), (-sin, sin))
            self._rope = table = tuple(torch.cat(h, -1).to(self.device, dtype) for h in halves)
        if len(spans) == 1:
            return table[0][spans[0].lo : spans[0].hi], table[1][spans[0].lo : spans[0].hi]
        return tuple(torch.cat([t[s.lo : s.hi] for s in spans]) for t in table)

    def _left_neighbours(self, rows: Tensor, spans: Sequence[Span], T: int) -> Tensor:
        """Packed index of the hidden state that predicts each row of a shifted model."""
        first = torch.zeros(T, dtype=torch.int64)
        start, cut = 0, []
        for s in spans:
            if s.hi > s.lo:
                first[start] = 1
                cut += [start] * (s.lo > 0)
            start += s.hi - s.lo
        if cut and torch.isin(rows, torch.tensor(cut, device=rows.device)).any():
            raise ValueError(
                "predict: the first column of a span with lo > 0 was asked for, but this model reads it "
                "from the column to its left, which is not computed; start the span one column earlier"
            )
        return rows - 1 + first.to(rows.device)[rows]

    def _check(self, tokens: Tensor, spans: Sequence[Span], cache: KVCache | None) -> None:
        if not len(tokens):
            raise ValueError("predict: no tokens")
        if sum(s.hi - s.lo for s in spans) != len(tokens):
            raise ValueError(f"predict: {len(tokens)} tokens, but the spans have {sum(s.hi - s.lo for s in spans)}")
        if cache is not None and len(cache.slots) != len(spans):
            raise ValueError(f"predict: {len(spans)} spans, but the cache has {len(cache.slots)} slots")
        for i, s in enumerate(spans):
            if not 0 <= s.lo <= s.hi <= s.kv_end:
                raise ValueError(f"predict: {s} is not 0 <= lo <= hi <= kv_end")
            if s.kv_end > self.config.max_length:
                raise ValueError(f"predict: {s.kv_end} columns; the model has {self.config.max_length} positions")
            if cache is None:
                if s.lo or s.kv_end != s.hi:
                    raise ValueError(f"predict: {s} needs a cache; without one lo = 0 and kv_end = hi")
                continue
            length = cache.slots[i].shape[2]
            if s.kv_end > length:
                raise ValueError(f"predict: {s} does not fit slot {i} of {length} columns")
            if s.kv_end > cache.after(i, s):
                raise ValueError(f"predict: {s} reads columns that were never written; slot {i} has {cache.ends[i]}")
