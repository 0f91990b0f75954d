"""Describe a model without torch: ModelConfig, Span, the shape of every parameter, and Family.

A Family says in data how one line of checkpoints writes a model: the fields of its config.json, the
names of its tensors, its special tokens and its tokenizer files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from utils import BadDataError


class CheckpointError(BadDataError):
    """A checkpoint cannot be used. `.problems` has one sentence for each fault."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything in which two models differ; all of them share one computation (transformer.py).

    vocab_size: rows of the embedding, which may exceed the tokenizer's size.
    end_ids:    every id that ends an answer, eos_id first.
    mask_id:    None where the family has no mask token.
    shift:      the hidden state of position i-1 predicts position i (Dream, Qwen2).
    causal:     a column attends to itself and to the columns left of it (Qwen2), otherwise to all.
    rope_in_float32: q and k are rotated in float32 and cast back (LLaDA); otherwise cos and sin are
                cast to the model's dtype and q and k are rotated in it (Dream).
    dtype_on_disk: e.g. "bfloat16"; None where the checkpoint does not say.
    scores_the_draw, end_token_flags, skip_special_tokens: see Family.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    max_length: int
    mask_id: int | None
    eos_id: int
    end_ids: tuple[int, ...]
    shift: bool
    rope_in_float32: bool
    tie_embeddings: bool
    dtype_on_disk: str | None = None
    causal: bool = False
    scores_the_draw: bool = False
    end_token_flags: tuple[str, ...] = ()
    skip_special_tokens: bool = False


class Span(NamedTuple):
    """Compute the columns [lo, hi) of a sequence; they attend to its columns [0, kv_end).

    In a causal model a column attends to those of them that are not to its right. Functions that
    take spans accept plain (lo, hi, kv_end) triples too.
    """

    lo: int
    hi: int
    kv_end: int


@dataclass(frozen=True)
class Family:
    """How one line of checkpoints writes a ModelConfig and its tensors, and how it is decoded.

    model_type: as in config.json, in any case.
    fields:   ModelConfig field -> key of config.json. An absent optional key takes its value from
              `defaults`, which may name another key as "=key".
    fixed:    ModelConfig fields that are the same for every checkpoint of the family.
    only:     key -> (values that this implementation computes, value where the key is absent).
              Every entry of a list must be one of the values.
    layer, outer: our module name -> the checkpoint's, within a layer ("{i}") and outside.
    dropped_prefix: optional in front of every tensor name.
    optional_end_tokens: end an answer where the tokenizer has them.
    algorithm: the default decoding algorithm; None for a causal family.
    blocks:   block length under the uniform protocol; None: the whole canvas is one block.
    scores_the_draw: confidence is the probability under the distribution that the token is drawn
              from, after temperature, top_p and top_k (Dream); otherwise under the plain softmax.
    end_token_flags: options for end tokens that the family's decoding has.
    skip_special_tokens: special tokens inside an answer are removed from its text.
    likelihood: the default of decoding.likelihood.ESTIMATORS; None: there are no likelihoods.
    likelihood_frame: what they add to a text: "bos" the start token before the prefix, "end" the
              end token behind the target, scored but never hidden by draws, "tail" the same,
              never scored.
    """

    name: str
    model_type: str
    fields: Mapping[str, str]
    defaults: Mapping[str, object]
    fixed: Mapping[str, object]
    only: Mapping[str, tuple[tuple, object]]
    layer: Mapping[str, str]
    outer: Mapping[str, str]
    dropped_prefix: str
    mask_token: str | None
    end_tokens: tuple[str, ...]
    optional_end_tokens: tuple[str, ...]
    tokenizer_files: tuple[str, ...]
    algorithm: str | None = None
    blocks: int | None = None
    scores_the_draw: bool = False
    end_token_flags: tuple[str, ...] = ()
    skip_special_tokens: bool = False
    likelihood: str | None = None
    likelihood_frame: tuple[str, ...] = ()

    @property
    def constants(self) -> dict[str, object]:
        """The ModelConfig fields that every checkpoint of the family shares."""
        names = ("scores_the_draw", "end_token_flags", "skip_special_tokens")
        return {"family": self.name, **self.fixed, **{n: getattr(self, n) for n in names}}

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of our parameter `name`, e.g. "layers.3.q.weight"."""
        module, leaf = name.rsplit(".", 1)
        if not module.startswith("layers."):
            return f"{self.outer[module]}.{leaf}"
        _, i, part = module.split(".")
        return f"{self.layer[part].format(i=i)}.{leaf}"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a Transformer with this config."""
    d, f = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, d)}
    for i in range(config.n_layers):
        layer = {
            "attn_norm.weight": (d,),
            "q.weight": (q, d),
            "k.weight": (kv, d),
            "v.weight": (kv, d),
            "o.weight": (d, q),
            "mlp_norm.weight": (d,),
            "gate.weight": (f, d),
            "up.weight": (f, d),
            "down.weight": (d, f),
        }
        if config.qkv_bias:
            layer |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, d)
    return shapes
