"""The official loops, written plainly: the reference against which the engine's speed is measured.

Every column goes through every layer and the head, all probabilities are computed in float64,
nothing is batched, nothing ends early, and the modules are those of the official code. Sources:
ML-GSAI/LLaDA modeling_llada.py and generate.py (float64 as in danielmisrael/apd and
NVlabs/Fast-dLLM), DreamLM/Dream generation_utils.py, transformers' Qwen2. Two differences make the
tokens comparable: the mask token is never proposed, and random orders use the engine's noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.config import DecodeConfig
from decoding.sampling import uniforms
from models.transformer import Transformer


class Plain:
    """The model with the official code's modules and casts. It shares the engine's weights."""

    def __init__(self, model: Transformer):
        self.config, self.device = model.config, model.device
        whole = model.weights()
        self.outer = {name: w for name, w in whole.items() if not name.startswith("layers.")}
        self.layers = [
            {
                name.removeprefix(f"layers.{i}."): w
                for name, w in whole.items()
                if name.startswith(f"layers.{i}.")
            }
            for i in range(model.config.n_layers)
        ]

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [1, L, V] of ids [1, L], not shifted."""
        x = F.embedding(ids, self.outer["embed.weight"])
        cos, sin = self._angles(ids.shape[1], x.dtype)
        for w in self.layers:
            h = self._norm(x, w["attn_norm.weight"])
            q, k, v = (
                F.linear(h, w[f"{p}.weight"], w.get(f"{p}.bias"))
                .unflatten(-1, (-1, self.config.head_dim))
                .transpose(1, 2)
                for p in "qkv"
            )
            q, k = self._rotated(q, cos, sin), self._rotated(k, cos, sin)
            if k.shape[1] != q.shape[1]:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)
            x = x + F.linear(mixed.transpose(1, 2).contiguous().flatten(2), w["o.weight"])
            h = self._norm(x, w["mlp_norm.weight"])
            gate, up = F.linear(h, w["gate.weight"]), F.linear(h, w["up.weight"])
            x = x + F.linear(F.silu(gate) * up, w["down.weight"])
        head = self.outer["embed.weight" if self.config.tie_embeddings else "head.weight"]
        return F.linear(self._norm(x, self.outer["norm.weight"]), head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + self.config.norm_eps)
        return weight * wide.to(x.dtype)

    def _angles(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = self.config
        steps = torch.arange(0, c.head_dim, 2, dtype=torch.int64, device=self.device).float()
        inverse = 1.0 / (c.rope_theta ** (steps / c.head_dim))
        angle = torch.outer(torch.arange(length, device=self.device).float(), inverse)
        angle = torch.cat([angle, angle], dim=-1)[None, None]
        kind = torch.float32 if c.rope_in_float32 else dtype
        return angle.cos().to(kind), angle.sin().to(kind)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.to(cos.dtype)
        first, second = wide.chunk(2, dim=-1)
        return ((wide * cos) + (torch.cat([-second, first], dim=-1) * sin)).to(x.dtype)


@torch.inference_mode()
def reference(model: Plain, prompt: Sequence[int], config: DecodeConfig, seed: int) -> list[int]:
    """The canvas of one prompt, decoded at temperature 0 by the official loop."""
    mask, schedule = model.config.mask_id, config.schedule
    start = torch.tensor([[*prompt]], device=model.device)
    x = F.pad(start, (0, schedule.gen_length), value=mask)
    dream = schedule.algorithm in ("maskgit_plus", "topk_margin", "entropy", "origin")
    loop = _dream if dream else _llada
    loop(model, x, len(prompt), config, seed)
    return x[0, len(prompt) :].tolist()


def _llada(model: Plain, x: Tensor, P: int, config: DecodeConfig, seed: int) -> None:
    """LLaDA's generate() with low_confidence or random remasking, or APD's left to right.

    x: the canvas [1, L], changed in place. P: length of the prompt.
    """
    s, mask = config.schedule, model.config.mask_id
    for block in range(s.n_blocks):
        end = P + (block + 1) * s.block_length
        for step, quota in enumerate(s.quotas):
            masked = x == mask
            logits = model(x)
            if model.config.shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            logits[:, :, mask] = -torch.inf
            proposed = logits.argmax(dim=-1)
            if s.algorithm == "low_confidence":
                score = logits.to(torch.float64).softmax(dim=-1)  # a name for it would keep it
                score = score.gather(-1, proposed[..., None])[..., 0]
            elif s.algorithm == "random":
                noise = uniforms(seed, block * s.steps_per_block + step, s.gen_length)[1]
                score = F.pad(noise, (P, 0))[None].to(x.device)
            else:
                score = -torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[None]
            score[:, end:] = -torch.inf
            proposed = torch.where(masked, proposed, x)
            score = torch.where(masked, score, -torch.inf)
            chosen = torch.zeros_like(masked)
            chosen[0, score[0].topk(quota).indices] = True
            x[chosen] = proposed[chosen]


def _dream(model: Plain, x: Tensor, P: int, config: DecodeConfig, seed: int) -> None:
    """Dream's diffusion_generate().

    x: the canvas [1, L], changed in place. P: length of the prompt.
    """
    s, mask = config.schedule, model.config.mask_id
    t = torch.linspace(1, 1e-3, s.num_steps + 1, device=x.device)
    for step in range(s.num_steps):
        masked, last = x == mask, step == s.num_steps - 1
        logits = model(x)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        logits[:, :, mask] = -torch.inf
        open_logits = logits[masked]
        share = 1 if last else 1 - t[step + 1] / t[step]
        committed = torch.full_like(x[masked], mask)
        if s.algorithm == "origin":
            noise = uniforms(seed, step, s.gen_length)[1].to(x.device)
            transfer = noise[masked[0, P:]] < share
            probs = open_logits[transfer].to(torch.float64).softmax(dim=-1)
            committed[transfer] = probs.max(dim=-1).indices
        else:
            probs = open_logits.to(torch.float64).softmax(dim=-1)
            score, proposed = probs.max(dim=-1)
            if s.algorithm == "topk_margin":
                ordered = probs.sort(dim=-1, descending=True).values
                score = ordered[:, 0] - ordered[:, 1]
            elif s.algorithm == "entropy":
                score = (probs * (probs + 1e-10).log()).sum(dim=-1)
            number = int(masked.sum() * share)
            if number:
                best = score.topk(number).indices
                committed[best] = proposed[best]
        x[masked] = committed


def official_sampler(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Dream's sample_tokens on logits [R, V]: tokens' confidence [R], and the drawn tokens [R]."""
    logits = logits / temperature
    ordered, indices = logits.sort(descending=True)
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
    outside[..., 1:] = outside[..., :-1].clone()
    outside[..., 0] = 0
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, indices, outside)
    probs = logits.masked_fill(mask, torch.finfo(logits.dtype).min).softmax(dim=-1)
    tokens = torch.distributions.Categorical(probs=probs).sample()
    return probs.gather(-1, tokens[:, None])[:, 0], tokens
