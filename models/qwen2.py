"""The Qwen2 family (Qwen2.5-0.5B) as data: causal models, which verify a diffusion model's drafts.

Source: config.json and model.safetensors of Qwen/Qwen2.5-0.5B. Dream was initialised from a Qwen2
model and kept its field and tensor names.
"""

from models.config import Family
from models.dream import DREAM

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    fields={field: key for field, key in DREAM.fields.items() if field != "mask_id"},
    defaults=DREAM.defaults,
    fixed={
        "qkv_bias": True,
        "shift": True,
        "causal": True,
        "rope_in_float32": False,
        "mask_id": None,
    },
    only={key: value for key, value in DREAM.only.items() if key != "full_attn_mask"}
    | {
        # transformers 5 writes rope_theta into it
        "rope_parameters": ((None,), None),
        "layer_types": ((None, "full_attention"), None),
    },
    outer=DREAM.outer,
    layer=DREAM.layer,
    dropped_prefix="",
    mask_token=None,
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    optional_end_tokens=(),
    tokenizer_files=("vocab.json", "merges.txt", "tokenizer_config.json"),
)
