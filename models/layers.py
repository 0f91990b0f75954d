"""The arithmetic of a layer around its attention, as pure functions that torch.compile accepts.

T packed columns, A asked rows, D width, H query heads, K key/value heads, E head width, F
feed-forward width. Casts as in LLaDA's modeling_llada.py and transformers' Qwen2: norms are
computed in float32, cast, then multiplied by the weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig


class Parts(NamedTuple):
    """The three functions of a layer.

    project: (x [T, D], cos, sin [T, 1, E], norm, weight, bias) -> q [T, H, E] and k [T, K, E], both
             rotated, and v [T, K, E].
    project_asked: the same with a last argument `asked` [A] int64; q is [A, H, E], of these rows.
    finish:  (x [T, D], mixed [T, H * E], o, norm, gate_up, down) -> [T, D], the layer's output
             from its attention's.
    """

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    project_asked: Callable[..., tuple[Tensor, Tensor, Tensor]]
    finish: Callable[..., Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of x [..., D], times weight [D]."""
    if x.dtype == torch.float32 and x.device.type == "cpu":  # one call, the same bits (tested)
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(wide, scale, out=torch.empty_like(x)).mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [T, heads, E], in the dtype of cos and sin [T, 1, E].

    The first half of sin is negated: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    other = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == cos.dtype:
        return (x * cos).add_(other.mul_(sin))
    # products of two dtypes are computed in the wider one
    return torch.add(x * cos, other * sin, out=torch.empty_like(x))


def parts_of(config: ModelConfig) -> Parts:
    """The three functions for a model's shape. q, k and v are one product, gate and up another."""
    H, K, E, eps = config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
    n = H * E

    def project(x, cos, sin, norm, weight, bias):
        qkv = F.linear(rms_norm(x, norm, eps), weight, bias).unflatten(-1, (H + 2 * K, E))
        q, k = rotate(qkv[:, : H + K], cos, sin).split((H, K), dim=1)
        return q, k, qkv[:, H + K :]

    def project_asked(x, cos, sin, norm, weight, bias, asked):
        h = rms_norm(x, norm, eps)
        bq, bkv = (None, None) if bias is None else (bias[:n], bias[n:])
        q = F.linear(h[asked], weight[:n], bq).unflatten(-1, (H, E))
        kv = F.linear(h, weight[n:], bkv).unflatten(-1, (2 * K, E))
        return rotate(q, cos[asked], sin[asked]), rotate(kv[:, :K], cos, sin), kv[:, K:]

    def finish(x, mixed, o, norm, gate_up, down):
        x = F.linear(mixed, o).add_(x)
        gate, up = F.linear(rms_norm(x, norm, eps), gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), down).add_(x)

    return Parts(project, project_asked, finish)
