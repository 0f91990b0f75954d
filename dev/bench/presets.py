"""Models to measure: shapes, regimes and random weights. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from decoding.algorithms import ALGORITHMS
from decoding.config import DecodeConfig
from decoding.schedule import make_schedule
from models.config import ModelConfig
from models.cost import fitting_rows
from models.transformer import Transformer


@dataclass(frozen=True)
class Regime:
    """One line of the table: an algorithm and its settings.

    block:    block length; None: the whole canvas
    answer:   fraction of the canvas at which an end token is placed; None: no early exit
    needed:   the ratio to the reference that is aimed at; None: at least 1
    kv_cache: a cache changes tokens, and the reference has none, so they are not compared
    batch:    prompts per round; None: the preset's
    """

    name: str
    algorithm: str
    block: int | None = None
    answer: float | None = None
    needed: float | None = None
    kv_cache: str = "none"
    batch: int | None = None

    def config(self, gen_length: int, tokens_per_step: int, early_exit: bool) -> DecodeConfig:
        schedule = make_schedule(self.algorithm, gen_length, self.block, tokens_per_step)
        return DecodeConfig(schedule, early_exit=early_exit, kv_cache=self.kv_cache)


@dataclass(frozen=True)
class Preset:
    """The shape of a model and the regimes that are measured on it.

    batch:    prompts per round
    distinct: number of different prompts among them; None: all. The reference decodes each of them
              once, and its time is multiplied by the number of times that the engine decodes it.
    sampler:  the ratio that the top-p sampler alone is to reach; 0: no such aim; None: not measured
    """

    shape: dict[str, object]
    regimes: tuple[Regime, ...]
    gpu: bool = False
    dtype: str = "float32"
    prompt: int = 200
    gen_length: int = 128
    tokens_per_step: int = 4
    batch: int = 1
    distinct: int | None = None
    sampler: float | None = None

    @property
    def config(self) -> ModelConfig:
        family, V = self.shape["family"], self.shape["vocab_size"]
        dream = family == "dream"
        return ModelConfig(
            **self.shape,
            norm_eps=1e-6 if dream else 1e-5,
            rope_theta=1e6 if dream else 5e5,
            qkv_bias=dream,
            shift=dream,
            rope_in_float32=not dream,
            max_length=4096,
            mask_id=V - 1,
            eos_id=V - 2,
            end_ids=(V - 2,),
            tie_embeddings=False,
            scores_the_draw=dream,
        )


def _shape(
    family: str, layers: int, width: int, heads: int, kv_heads: int, d_ff: int, vocabulary: int
) -> dict[str, object]:
    return dict(
        family=family,
        n_layers=layers,
        d_model=width,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=d_ff,
        head_dim=width // heads,
        vocab_size=vocabulary,
    )


def _blocks(plain: float, half: float | None, quarter: float | None) -> tuple[Regime, ...]:
    exits = [("half", 0.5, half), ("quarter", 0.25, quarter)]
    return (
        Regime("low_confidence", "low_confidence", 32, None, plain),
        *(
            Regime(f"low_confidence, exit at a {name}", "low_confidence", 32, at, need)
            for name, at, need in exits
        ),
    )


_OTHERS = (
    Regime("low_confidence, one block", "low_confidence"),
    Regime("random", "random", 32),
    Regime("leftright", "leftright"),
)
_DREAM = (
    Regime("entropy", "entropy", None, None, 2.0),
    Regime("origin", "origin", None, None, 5.0),
    Regime("maskgit_plus", "maskgit_plus"),
    Regime("topk_margin", "topk_margin"),
    Regime("leftright", "leftright"),
)
# The reference decodes one prompt only, so that three rounds take less than ten minutes.
_GPU = dict(gpu=True, dtype="bfloat16", gen_length=512, tokens_per_step=1, batch=8, distinct=1)


def _cached(algorithm: str, batch: int | None) -> tuple[Regime, ...]:
    return tuple(
        Regime(f"{algorithm}, {kind} cache", algorithm, 32, kv_cache=kind, batch=batch)
        for kind in ("prefix", "dual")
    )


PRESETS = {
    "cpu-small": Preset(
        _shape("llada", 12, 512, 8, 8, 1536, 8192), (*_blocks(1.2, 2.5, 3.5), *_OTHERS)
    ),
    # 8 tokens per step, so that three rounds take less than ten minutes
    "cpu-vocab": Preset(
        _shape("llada", 8, 256, 4, 4, 768, 126464),
        (*_blocks(6.0, 10.0, None), *_OTHERS),
        tokens_per_step=8,
    ),
    "cpu-dream": Preset(
        _shape("dream", 8, 256, 4, 1, 1344, 152064), _DREAM, tokens_per_step=8, sampler=5.0
    ),
    "llada-8b": Preset(
        _shape("llada", 32, 4096, 32, 32, 12288, 126464),
        (
            Regime("low_confidence", "low_confidence", 32, None, 1.4),
            Regime("low_confidence, exit at 140 tokens", "low_confidence", 32, 140 / 512, 4.0),
            *_cached("low_confidence", 16),
        ),
        **_GPU,
    ),
    "dream-7b": Preset(
        _shape("dream", 28, 3584, 28, 4, 18944, 152064),
        (
            Regime("entropy", "entropy", None, None, 1.4),
            Regime("leftright, exit at 140 tokens", "leftright", None, 140 / 512, 4.0),
            *_cached("entropy", 16),
        ),
        **_GPU,
        sampler=5.0,
    ),
    "tiny": Preset(
        _shape("llada", 3, 64, 4, 4, 160, 4200),
        (*_blocks(None, None, None), *_OTHERS, *_cached("low_confidence", None)),
        prompt=20,
        gen_length=64,
        batch=8,
    ),
    "tiny-dream": Preset(
        _shape("dream", 3, 64, 4, 2, 160, 2100),
        tuple(replace(r, needed=None) for r in _DREAM),
        prompt=20,
        gen_length=32,
        batch=8,
        sampler=0.0,
    ),
}


def rows_in_flight(preset: Preset, regime: Regime, model: Transformer, wanted: int) -> int:
    """`wanted` rows, or as many as fit into the memory of a GPU."""
    length, cached = preset.prompt + preset.gen_length, regime.kv_cache != "none"
    observed = ALGORITHMS[regime.algorithm].observe is not None
    block = regime.block or preset.gen_length
    return fitting_rows(model, length, block, cached, observed, wanted)


def random_model(config: ModelConfig, device: str, dtype: str, seed: int = 0) -> Transformer:
    """A Transformer with random weights, made on the device one tensor at a time.

    With plain initialisation the answers consist of a few different tokens, which hides errors. So
    queries and keys are doubled, and the standard deviation of the logits is 6. The end token is
    never proposed, so that an answer ends only where a regime places one.
    """
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(kind).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, weight in model.weights().items():
        part, leaf = name.split(".")[-2:]
        if part.endswith("norm"):
            weight.fill_(1)
        elif leaf == "bias":
            weight.zero_()
        else:
            scales = {"embed": 1.0, "head": 6.0 / config.d_model**0.5}
            scale = scales.get(part, weight.shape[-1] ** -0.5)
            weight.normal_(0, scale * (2 if part in ("q", "k") else 1), generator=generator)
    model.head.weight[config.eos_id] = 0
    return model


def random_prompts(config: ModelConfig, n: int, length: int, seed: int) -> list[list[int]]:
    """n prompts of `length` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, config.vocab_size - 10, (n, length), generator=generator).tolist()
