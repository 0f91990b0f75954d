"""One transformer for every family, bidirectional or causal; ModelConfig says where they differ.

B sequences of L columns, T packed columns (all sequences end to end), R asked rows, D width,
H query heads, K key/value heads, E head width, V vocabulary. There is no padding between
sequences: everything but attention works on [T, D], attention works sequence by sequence. The last
layer computes keys and values for all columns, everything else for the asked rows only.
The arithmetic within a layer is in layers.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.acceleration import Acceleration
from models.attention import Packed, Sizes, attend, varlen_options
from models.config import ModelConfig, Span
from models.layers import Parts, parts_of, rms_norm
from models.packing import Inputs, Plan, Range, padded, plan, to_device

# Several matrices of a checkpoint form one parameter: fewer products, the same bits.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class KVCache:
    """Keys (after rotation) and values of all sequences, in one tensor.

    slab:     [n_layers, 2, N, K, E]. The last of its N columns is for padding.
    slots[i]: first and end column of sequence i of a call to `predict`.
    ends[i]:  how many of its columns have been written, from the left.
    `add` and `drop` follow the sequences that join and leave the batch.
    """

    def __init__(self, config: ModelConfig, lengths: Sequence[int], *, device, dtype: torch.dtype):
        self._make = lambda columns: torch.zeros(
            (config.n_layers, 2, columns, config.n_kv_heads, config.head_dim),
            device=device,
            dtype=dtype,
        )
        self.slab = self._make(1)
        self.slots: list[Range] = []
        self.ends: list[int] = []
        self._free: list[int] = []  # first columns
        self._width = 0
        if lengths:
            self.reserve(len(lengths), max(lengths))
        for length in lengths:
            self.add(length)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` slots, those in use included, of `length` columns each.

        It moves all of them, and for a moment both tensors are there.
        """
        old, used = self.slab, self.slots
        self._width = max(length, self._width)
        starts = [i * self._width for i in range(max(rows, len(used)))]
        self.slab = self._make(len(starts) * self._width + 1)
        self.slots = [(at, at + b - a) for at, (a, b) in zip(starts, used)]
        self._free = starts[len(used) :][::-1]
        for (a, b), (c, d) in zip(self.slots, used):
            self.slab[:, :, a:b] = old[:, :, c:d]

    def add(self, length: int) -> None:
        """Append an empty slot for a sequence of `length` columns."""
        if length > self._width or not self._free:
            self.reserve(len(self.slots) + 1, length)
        at = self._free.pop()
        self.slots.append((at, at + length))
        self.ends.append(0)

    @property
    def starts(self) -> list[int]:
        """The first columns of the sequences, and behind them the column for padding."""
        return [*(first for first, _ in self.slots), self.slab.shape[2] - 1]

    def after(self, index: int, span: Span) -> int:
        """`ends[index]` once the columns of `span` are written."""
        end = self.ends[index]
        return max(end, span.hi) if span.lo <= end else end

    def drop(self, index: int) -> None:
        """Forget slot `index`; later slots move up by one."""
        self._free.append(self.slots.pop(index)[0])
        del self.ends[index]


class Layer(nn.Module):
    """The parameters of a layer, and its forward pass with the functions `parts`."""

    def __init__(self, config: ModelConfig, parts: Parts):
        super().__init__()
        c, heads = config, config.n_heads + 2 * config.n_kv_heads
        self.parts = parts
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        packed: Packed,
        kv: Tensor | None,
        asked: Tensor | None,
    ) -> Tensor:
        """x [T, D] -> [T, D], or [A, D] for the rows `asked` [A] int64.

        kv: this layer's part [2, N, K, E] of the cache, or None.
        """
        inputs = (x, cos, sin, self.attn_norm.weight, self.qkv.weight, self.qkv.bias)
        if asked is None:
            q, k, v = self.parts.project(*inputs)
        else:
            q, k, v = self.parts.project_asked(*inputs, asked)
            x = x[asked]
        mixed = attend(q, k, v, packed, kv).flatten(1)
        return self.parts.finish(
            x, mixed, self.o.weight, self.mlp_norm.weight, self.gate_up.weight, self.down.weight
        )


class Transformer(nn.Module):
    """Token ids -> logits. See `logits` for whole sequences and `predict` for decoding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        parts = parts_of(config)
        self.layers = nn.ModuleList(Layer(config, parts) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._rope: tuple[Tensor, Tensor] | None = None
        self.acceleration = Acceleration()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def new_cache(self) -> KVCache:
        """A cache without slots; `KVCache.add` appends them."""
        return KVCache(self.config, [], device=self.device, dtype=self.dtype)

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its name in `parameter_shapes`, as a view of ours."""
        c, found = self.config, {}
        sizes = {
            "qkv": [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)],
            "gate_up": [c.d_ff] * 2,
        }
        for name, parameter in self.named_parameters():
            *path, module, leaf = name.split(".")
            parts = parameter.split(sizes[module]) if module in FUSED else (parameter,)
            for part, view in zip(FUSED.get(module, (module,)), parts):
                found[".".join([*path, part, leaf])] = view
        return found

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Raw logits [B, L, V] of input_ids [B, L] int64: no shift, the mask token's unchanged."""
        B, L = input_ids.shape
        spans = [Span(0, L, L)] * B
        self._check(input_ids.reshape(-1), spans, None)
        whole = plan(spans, np.zeros(0, dtype=np.int64), self.config, self.device.type)
        tokens = padded(input_ids.reshape(-1).cpu().numpy(), len(whole.positions))
        inputs, packed, _ = self.prepared(tokens, whole, None)
        x = self._trunk(inputs, packed, None, None)[: B * L]
        return self._head(x).view(B, L, -1)

    @torch.no_grad()
    def predict(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        rows: Tensor,
        cache: KVCache | None = None,
        raw: bool = False,
    ) -> Tensor:
        """Logits [R, V] for the columns `rows`, in the model's dtype; the mask token's are -inf.

        tokens: [T] int64, the columns [lo, hi) of every sequence, end to end.
        spans:  one (lo, hi, kv_end) for each sequence. Without a cache lo = 0 and kv_end = hi.
                With one, keys and values of the computed columns are written to it and those of
                [0, kv_end) are read.
        rows:   [R] int64, packed indices. Row i of the result is the distribution FOR that column:
                a shifted model (Dream, Qwen2) takes it from the hidden state one column to the
                left, except for column 0.
        raw:    the mask token keeps its logit, as in likelihoods.
        Tensors on the host save a wait for the device. Raises ValueError where spans, tokens, rows
        and cache do not fit together.
        """
        spans = [Span(*s) for s in spans]
        self._check(tokens, spans, cache)
        asked = plan(spans, rows.cpu().numpy(), self.config, self.device.type)
        tokens = padded(tokens.cpu().numpy(), len(asked.positions))
        out = None
        if self.acceleration.graphs is not None and not raw:
            out = self.acceleration.graphs.logits(tokens, asked, cache)
        if out is None:
            out = self.answer(*self.prepared(tokens, asked, cache), cache, raw)
        if cache is not None:
            cache.ends = [cache.after(i, s) for i, s in enumerate(spans)]
        return out[: asked.n_rows]

    def accelerate(
        self,
        *,
        compile: bool = False,
        cuda_graphs: bool = False,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Use exactly these accelerations from now on; see models/acceleration.py.

        tell: called with one line for each that does not work here.
        """
        self.acceleration = Acceleration.of(self, compile, cuda_graphs, tell)

    def answer(
        self,
        inputs: Inputs,
        packed: Packed,
        last: Packed,
        cache: KVCache | None,
        raw: bool = False,
    ) -> Tensor:
        """Logits [R', V] of the rows inputs.back; all arguments are on the device.

        packed: for all layers but the last one. last: for the last one.
        """
        out = self._head(self._trunk(inputs, packed, last, cache))
        if self.config.mask_id is not None and not raw:
            out[:, self.config.mask_id] = -torch.inf
        return out

    def prepared(
        self, tokens: np.ndarray, plan: Plan, cache: KVCache | None
    ) -> tuple[Inputs, Packed, Packed]:
        """The inputs on the device for tokens [T'] int64 and their plan, and attention's layout:
        for all layers but the last one, and for the last one."""
        self.rope_table(max(s.hi for s in plan.spans))
        if (varlen := self.varlen) is not None:
            sizes = Sizes.of(plan, cache is not None, self.config.causal)
            arrays = sizes.arrays(tokens, plan, () if cache is None else cache.starts)
            [whole] = to_device(self.device, np.concatenate(arrays))
            return sizes.split(whole, varlen)

        slots = () if cache is None else cache.starts

        def layout(queries: Sequence[Range], at: np.ndarray) -> Packed:
            [at] = to_device(self.device, at) if self.config.causal else [None]
            return Packed.of(plan.spans, plan.columns, queries, slots, at)

        inputs = to_device(self.device, tokens, plan.positions, plan.asked, plan.back)
        last = layout(plan.queries, plan.positions[plan.asked])
        return Inputs(*inputs), layout(plan.columns, plan.positions), last

    @property
    def varlen(self) -> dict[str, int] | None:
        """Options of the varlen kernel; None where attention works sequence by sequence."""
        c = self.config
        heads = (c.n_heads, c.n_kv_heads, c.head_dim)
        return varlen_options(self.device, self.dtype, *heads, c.causal)

    def _head(self, x: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, D]."""
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return F.linear(self.norm(x), weight)

    def _trunk(
        self, inputs: Inputs, packed: Packed, last: Packed | None, cache: KVCache | None
    ) -> Tensor:
        """Hidden states before the last norm: [R', D] of the rows inputs.back.

        With last None it is [T', D], of all columns.
        """
        cos, sin = (t[inputs.positions] for t in self._rope)
        x = self.embed(inputs.tokens)
        for i, layer in enumerate(self.layers):
            kv = None if cache is None else cache.slab[i]
            if last is None or i < len(self.layers) - 1:
                x = layer(x, cos, sin, packed, kv, None)
            elif last.causal:
                # the kernel's causal mask needs consecutive queries; the asked rows may be any
                x = layer(x, cos, sin, packed, kv, None)[inputs.asked[inputs.back]]
            else:
                x = layer(x, cos, sin, last, kv, inputs.asked)[inputs.back]
        return x

    def rope_table(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [at least `end`, 1, E].

        They are float32 if rope_in_float32, else in the model's dtype, and are computed on its
        device, as in LLaDA's code: powers and cosines of a GPU and a CPU differ in the last bit.
        """
        dtype = torch.float32 if self.config.rope_in_float32 else self.dtype
        table = self._rope
        if (
            table is None
            or len(table[0]) < end
            or table[0].device != self.device
            or table[0].dtype != dtype
        ):
            columns = max(end, min(2048, self.config.max_length))
            E, places = self.config.head_dim, torch.arange(columns, device=self.device)
            steps = torch.arange(0, E, 2, dtype=torch.int64, device=self.device).float()
            inverse = 1.0 / (self.config.rope_theta ** (steps / E))
            angle = torch.outer(places.float(), inverse)[:, None, :]
            cos, sin = angle.cos(), angle.sin()
            halves = ((cos, cos), (-sin, sin))
            self._rope = table = tuple(torch.cat(h, -1).to(dtype) for h in halves)
        return table

    def _check(self, tokens: Tensor, spans: Sequence[Span], cache: KVCache | None) -> None:
        if not len(tokens):
            raise ValueError("predict: no tokens")
        if (columns := sum(s.hi - s.lo for s in spans)) != len(tokens):
            raise ValueError(f"predict: {len(tokens)} tokens, but the spans have {columns}")
        if cache is not None and len(cache.slots) != len(spans):
            raise ValueError(
                f"predict: {len(spans)} spans, but the cache has {len(cache.slots)} slots"
            )
        for i, s in enumerate(spans):
            if not 0 <= s.lo <= s.hi <= s.kv_end:
                raise ValueError(f"predict: {s} is not 0 <= lo <= hi <= kv_end")
            if s.kv_end > self.config.max_length:
                raise ValueError(
                    f"predict: {s.kv_end} columns; the model has {self.config.max_length} positions"
                )
            if cache is None:
                if s.lo or s.kv_end != s.hi:
                    raise ValueError(
                        f"predict: {s} needs a cache; without one lo = 0 and kv_end = hi"
                    )
                continue
            length = cache.slots[i][1] - cache.slots[i][0]
            if s.kv_end > length:
                raise ValueError(f"predict: {s} does not fit slot {i} of {length} columns")
            if s.kv_end > cache.after(i, s):
                raise ValueError(
                    f"predict: {s} reads columns that were never written; "
                    f"slot {i} has {cache.ends[i]}"
                )
