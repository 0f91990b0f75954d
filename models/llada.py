"""The LLaDA family (LLaDA-8B, LLaDA-1.5) as data: OLMo's field and tensor names.

Source: config.json and model.safetensors.index.json of GSAI-ML/LLaDA-8B-Instruct.
"""

from models.config import Family

LLADA = Family(
    name="llada",
    model_type="llada",
    fields={
        "n_layers": "n_layers",
        "d_model": "d_model",
        "n_heads": "n_heads",
        "n_kv_heads": "n_kv_heads",
        "d_ff": "mlp_hidden_size",
        "vocab_size": "embedding_size",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "qkv_bias": "include_qkv_bias",
        "max_length": "max_sequence_length",
        "mask_id": "mask_token_id",
        "eos_id": "eos_token_id",
        "tie_embeddings": "weight_tying",
    },
    defaults={"n_kv_heads": "=n_heads", "vocab_size": "=vocab_size", "qkv_bias": False},
    fixed={
        "shift": False,
        "rope_in_float32": True,
    },
    only={
        "block_type": (("llama",), "sequential"),
        "activation_type": (("silu",), "swiglu"),
        "layer_norm_type": (("rms",), "default"),
        "layer_norm_with_affine": ((True,), True),
        "rope": ((True,), False),
        "rope_full_precision": ((True,), True),
        "rope_scaling": ((None,), None),
        "alibi": ((False,), False),
        "attention_layer_norm": ((False,), False),
        "include_bias": ((False,), True),
        "bias_for_layer_norm": ((False, None), None),
        "scale_logits": ((False,), False),
        "input_emb_norm": ((False,), False),
        "multi_query_attention": ((None, False), None),
        "block_group_size": ((1,), 1),
        "clip_qkv": ((None,), None),
        "use_sliding_window": ((False, None), None),
        "sliding_window": ((None,), None),
    },
    outer={"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "transformer.ff_out"},
    layer={
        "attn_norm": "transformer.blocks.{i}.attn_norm",
        "q": "transformer.blocks.{i}.q_proj",
        "k": "transformer.blocks.{i}.k_proj",
        "v": "transformer.blocks.{i}.v_proj",
        "o": "transformer.blocks.{i}.attn_out",
        "mlp_norm": "transformer.blocks.{i}.ff_norm",
        "gate": "transformer.blocks.{i}.ff_proj",
        "up": "transformer.blocks.{i}.up_proj",
        "down": "transformer.blocks.{i}.ff_out",
    },
    dropped_prefix="model.",
    mask_token="<|mdm_mask|>",
    end_tokens=("<|endoftext|>", "<|eot_id|>"),
    optional_end_tokens=(),
    tokenizer_files=("tokenizer.json", "tokenizer_config.json"),
    algorithm="low_confidence",
    blocks=32,
    end_token_flags=("logits_eos_inf", "confidence_eos_eot_inf"),
    skip_special_tokens=True,  # as LLaDA's evaluation does: OpenCompass, models/dllm.py
    likelihood="llada_mc",
)
