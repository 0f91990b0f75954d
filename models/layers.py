"""The arithmetic of a layer around its attention, as pure functions: what torch.compile may be given.

T packed columns, A asked rows, D width, H query heads, K key/value heads, E head width, F feed-forward width.
Cast order as in LLaDA's modeling_llada.py and transformers' Qwen2: norms in float32, cast, then times the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig


class Parts(NamedTuple):
    """project: (x [T, D], cos, sin [T, 1, E], norm, weight, bias) -> q [T, H, E] and k [T, K, E], rotated, v [T, K, E].
    project_asked: the same with `asked` [A] int64 at the end, q [A, H, E] for these rows alone.
    finish: (x [T, D], mixed [T, H * E], o, norm, gate_up, down) -> [T, D], the rest of the layer after its attention.
    """

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    project_asked: Callable[..., tuple[Tensor, Tensor, Tensor]]
    finish: Callable[..., Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32 and x.device.type == "cpu":  # the same bits (tested) in one call
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return wide.to(x.dtype).mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [T, heads, E], in the dtype of cos and sin [T, 1, E].

    The first half of sin is negated: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    wide = x.to(cos.dtype)
    return (wide * cos).add_(wide.roll(x.shape[-1] // 2, -1).mul_(sin)).to(x.dtype)


def parts_of(config: ModelConfig) -> Parts:
    """The three functions for a model's shape. Matrix products are fused: q, k and v one, gate and up one."""
    H, K, E, eps = config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
    n = H * E

    def project(
        x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None
    ):
        qkv = F.linear(rms_norm(x, norm, eps), weight, bias).unflatten(-1, (H + 2 * K, E))
        q, k = rotate(qkv[:, : H + K], cos, sin).split((H, K), dim=1)
        return q, k, qkv[:, H + K :]

    def project_asked(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        asked: Tensor,
    ):
        h = rms_norm(x, norm, eps)
        bq, bkv = (None, None) if bias is None else (bias[:n], bias[n:])
        q = F.linear(h[asked], weight[:n], bq).unflatten(-1, (H, E))
        kv = F.linear(h, weight[n:], bkv).unflatten(-1, (2 * K, E))
        return rotate(q, cos[asked], sin[asked]), rotate(kv[:, :K], cos, sin), kv[:, K:]

    def finish(
        x: Tensor, mixed: Tensor, o: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        x = F.linear(mixed, o).add_(x)
        gate, up = F.linear(rms_norm(x, norm, eps), gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), down).add_(x)

    return Parts(project, project_asked, finish)
