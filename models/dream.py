"""The Dream family (Dream-v0, DiffuCoder) as data: Qwen2's field and tensor names.

Source: config.json and model.safetensors.index.json of Dream-org/Dream-v0-Instruct-7B.
"""

from models.config import Family

DREAM = Family(
    name="dream",
    model_type="Dream",
    fields={
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "max_length": "max_position_embeddings",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={"head_dim": None, "tie_embeddings": False},
    fixed={
        "qkv_bias": True,
        "shift": True,
        "rope_in_float32": False,
    },
    only={
        "hidden_act": (("silu",), "silu"),
        "rope_scaling": ((None,), None),
        "use_mrope": ((False, None), None),
        # false makes `sliding_window` and `max_window_layers` inert, whatever their values
        "use_sliding_window": ((False, None), None),
        "full_attn_mask": ((True, None), None),
        "attention_bias": ((True, None), None),
        "mlp_bias": ((False, None), None),
    },
    outer={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer={
        "attn_norm": "model.layers.{i}.input_layernorm",
        "q": "model.layers.{i}.self_attn.q_proj",
        "k": "model.layers.{i}.self_attn.k_proj",
        "v": "model.layers.{i}.self_attn.v_proj",
        "o": "model.layers.{i}.self_attn.o_proj",
        "mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "gate": "model.layers.{i}.mlp.gate_proj",
        "up": "model.layers.{i}.mlp.up_proj",
        "down": "model.layers.{i}.mlp.down_proj",
    },
    dropped_prefix="",
    mask_token="<|mask|>",
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    optional_end_tokens=("<|dlm_pad|>",),
    tokenizer_files=("vocab.json", "merges.txt", "tokenizer_config.json"),
    algorithm="maskgit_plus",
    blocks=32,
    scores_the_draw=True,
    skip_special_tokens=False,  # as Dream's evaluation does: eval_instruct
    likelihood="dream_mc",
    likelihood_frame=("bos", "end"),
)
