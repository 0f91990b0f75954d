"""One bidirectional transformer for every family; ModelConfig says where they differ.

B sequences of L columns, T packed columns (all sequences end to end), R asked rows, D width,
H query heads, K key/value heads, E head width, V vocabulary. There is no padding between
sequences: everything but attention works on [T, D], attention goes sequence by sequence. In the
last layer only keys and values are computed for all columns, the rest for the asked rows.
Cast order as in LLaDA's modeling_llada.py and transformers' Qwen2: norms in float32, cast,
then times the weight.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Packed, attend, varlen_options
from models.config import ModelConfig, Span
from models.packing import Plan, plan, to_device

# Several matrices of a checkpoint in one parameter: one product instead of two or three, the same bits.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


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
        self.heads, self.head_dim = (c.n_heads, c.n_kv_heads, c.n_kv_heads), c.head_dim
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, packed: Packed, kv: list[Tensor] | None, asked: Tensor | None
    ) -> Tensor:
        """x: [T, D] -> [T, D], or [A, D] for the rows `asked` [A]. kv: this layer's [2, length, K, E] of each
        sequence, or None."""
        if asked is None:
            q, k, v = self.project(x, cos, sin)
        else:
            q, k, v = self.project_asked(x, cos, sin, asked)
            x = x[asked]
        return self.finish(x, attend(q, k, v, packed, kv).flatten(1))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, E] and k [T, K, E], rotated, and v [T, K, E] of x [T, D]."""
        H, K, _ = self.heads
        qk, v = self.qkv(self.attn_norm(x)).unflatten(-1, (-1, self.head_dim)).split((H + K, K), dim=1)
        return (*rotate(qk, cos, sin).split((H, K), dim=1), v)

    def project_asked(self, x: Tensor, cos: Tensor, sin: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As project, q [A, H, E] for the rows `asked` [A] alone."""
        H, K, _ = self.heads
        h, n = self.attn_norm(x), H * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        wq, wkv = weight[:n], weight[n:]
        bq, bkv = (None, None) if bias is None else (bias[:n], bias[n:])
        q = F.linear(h[asked], wq, bq).unflatten(-1, (H, self.head_dim))
        k, v = F.linear(h, wkv, bkv).unflatten(-1, (2 * K, self.head_dim)).split(K, dim=1)
        return rotate(q, cos[asked], sin[asked]), rotate(k, cos, sin), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual stream [T, D] after attention's output `mixed` [T, H * E] and the feed-forward part."""
        x = self.o(mixed).add_(x)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up)).add_(x)


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

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its name in `parameter_shapes`: views, to be filled or read."""
        c, found = self.config, {}
        sizes = {"qkv": [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)], "gate_up": [c.d_ff] * 2}
        for name, parameter in self.named_parameters():
            *path, module, leaf = name.split(".")
            parts = parameter.split(sizes[module]) if module in FUSED else (parameter,)
            for part, view in zip(FUSED.get(module, (module,)), parts):
                found[".".join([*path, part, leaf])] = view
        return found

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Raw logits [B, L, V] of input_ids [B, L] int64: no shift, the mask token untouched."""
        B, L = input_ids.shape
        spans = [Span(0, L, L)] * B
        self._check(input_ids.reshape(-1), spans, None)
        columns = plan(spans, np.zeros(0, dtype=np.int64), self.config, self.device.type)
        x = self._trunk(input_ids.reshape(-1).cpu().numpy(), columns, None, all_columns=True)[: B * L]
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
        On the host, tokens and rows cost no wait for the device. Raises ValueError where spans, tokens, rows and cache
        do not fit together.
        """
        spans = [Span(*s) for s in spans]
        self._check(tokens, spans, cache)
        asked = plan(spans, rows.cpu().numpy(), self.config, self.device.type)
        x = self._trunk(tokens.cpu().numpy(), asked, cache)
        if cache is not None:
            cache.ends = [cache.after(i, s) for i, s in enumerate(spans)]
        out = self._head(x)[: asked.n_rows]
        out[:, self.config.mask_id] = -torch.inf
        return out

    def _head(self, x: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, D]."""
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return F.linear(self.norm(x), weight)

    def _trunk(self, tokens: np.ndarray, plan: Plan, cache: KVCache | None, all_columns: bool = False) -> Tensor:
        """Hidden states before the last norm: of the rows plan.back, or [T', D] of all columns."""
        tokens = np.pad(tokens, (0, len(plan.positions) - len(tokens)))
        tokens, positions, asked, back = to_device(self.device, tokens, plan.positions, plan.asked, plan.back)
        table = self._rope_table(max(s.hi for s in plan.spans))
        cos, sin = (t[positions] for t in table)
        c = self.config
        options = varlen_options(self.device, self.dtype, c.n_heads, c.n_kv_heads, c.head_dim)
        packed = Packed.of(plan.spans, plan.columns, plan.columns, self.device, options)
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            kv = None if cache is None else [slot[i] for slot in cache.slots]
            if all_columns or i < len(self.layers) - 1:
                x = layer(x, cos, sin, packed, kv, None)
            else:
                packed = Packed.of(plan.spans, plan.columns, plan.queries, self.device, options)
                x = layer(x, cos, sin, packed, kv, asked)[back]
        return x

    def _rope_table(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [at least `end`, 1, E], float32 for LLaDA, else in the model's dtype."""
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
        return table

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
