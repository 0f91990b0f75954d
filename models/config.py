"""What a model is, without torch: ModelConfig, Span, the shape of every parameter, and Family.

A Family says in data how one line of checkpoints writes the same things: the fields of its
config.json, the names of its tensors, its special tokens and its tokenizer files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. `.problems` has one sentence for each thing wrong."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class ModelConfig:
    """Everything in which two models differ; the computation itself is one (transformer.py).

    vocab_size: rows of the embedding, which may exceed the tokenizer's size.
    end_ids:    every id that ends an answer, eos_id first.
    mask_id:    None where the family has no mask token.
    shift:      position i is predicted by the hidden state of position i-1 (Dream, Qwen2).
    causal:     a column attends to itself and to what is left of it, otherwise to all (Qwen2).
    rope_in_float32: q and k are rotated in float32 and cast back (LLaDA); otherwise cos and
                sin are cast to the model's dtype and q and k are rotated in it (Dream).
    scores_the_draw: confidence, entropy and margin are those of the filtered distribution that
                tokens are drawn from (Dream); otherwise of the plain softmax of the logits.
    end_token_flags: options of DecodeConfig about end tokens that the family has.
    dtype_on_disk: e.g. "bfloat16"; None where the checkpoint does not say.
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

    @property
    def model_type(self) -> str:
        return self.family


class Span(NamedTuple):
    """Compute the columns [lo, hi) of a sequence; they attend to its columns [0, kv_end), of a causal model to those of
    them that are not to their right."""

    lo: int
    hi: int
    kv_end: int


@dataclass(frozen=True)
class Family:
    """How one line of checkpoints writes a ModelConfig and its tensors.

    fields:   ModelConfig field -> key of config.json. An absent optional key takes its value
              from `defaults`, which may name another key as "=key".
    fixed:    ModelConfig fields that are the same for every checkpoint of the family.
    only:     key -> (values that this implementation computes, value where the key is absent). Of a list, each entry
              is looked at.
    layer, outer: our module name -> the checkpoint's, within a layer ("{i}") and outside.
    dropped_prefix: accepted in front of every tensor name, and needed in front of none.
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
