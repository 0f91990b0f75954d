"""Write a tiny checkpoint in the hub's layout: tokenizer, chat template, config.json, weights.

The tokenizer is byte-level BPE, so that it reproduces any text exactly. Its merges are learnt from
the training texts until every word is one token. Numbers below 100 and 000 are one token each, and
the fixed wording of the prompts is added as whole phrases: both keep sequences short enough to
train on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from models import FAMILIES, load_tokenizer
from models.config import ModelConfig

# transformers' Qwen2 splits text with this pattern; LLaDA's tokenizer.json carries it
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "llada": (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mdm_mask|>",
    ),
    "dream": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
}
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant") %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' "
    "+ message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
TEMPLATES = {"llada": LLADA_TEMPLATE, "dream": DREAM_TEMPLATE}
MAX_LENGTH = 1024


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_tokenizer(folder: Path, family: str, texts: Iterable[str], phrases: Iterable[str]) -> int:
    """Train a tokenizer on texts and write its files in the family's layout.

    phrases: texts that become one token each. Returns the number of tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [AddedToken(t, normalized=False, special=True) for t in SPECIAL[family]]
    numbers = ["000", *map(str, range(10, 100))]
    whole = [
        AddedToken(t, normalized=False, special=False) for t in [*numbers, *sorted(set(phrases))]
    ]
    tokenizer.add_tokens(special + whole)
    ids = {t.content: tokenizer.token_to_id(t.content) for t in special + whole}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(i): {"content": text, "special": text in SPECIAL[family], **flags}
            for text, i in ids.items()
        },
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": TEMPLATES[family],
    }
    folder.mkdir(parents=True, exist_ok=True)
    if family == "llada":
        settings |= {"bos_token": "<|startoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        settings |= {
            "bos_token": "<|beginoftext|>",
            "mask_token": "<|mask|>",
            "unk_token": None,
            "errors": "replace",
            "add_bos_token": False,
            "add_prefix_space": False,
            "split_special_tokens": False,
            "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
            "tokenizer_class": "DreamTokenizer",
        }
        tokenizer.model.save(str(folder))  # vocab.json and merges.txt
        (folder / "added_tokens.json").write_text(_json(ids), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(_json(settings), encoding="utf-8")
    return tokenizer.get_vocab_size()


def copy_tokenizer(source: Path, folder: Path) -> int:
    """Write Dream's tokenizer in Qwen2's layout with the same ids. Returns the number of tokens."""
    tokenizer = load_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}
    del settings["mask_token"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(_json(settings), encoding="utf-8")
    return len(tokenizer)


def write_config(folder: Path, family: str, n_tokens: int, shape: Mapping[str, int]) -> None:
    """Write config.json with the family's own keys.

    shape: n_layers, d_model, n_heads, n_kv_heads, d_ff.
    """
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {entry["content"]: int(i) for i, entry in settings["added_tokens_decoder"].items()}
    rows = -(-n_tokens // 32) * 32
    end, c = ids["<|endoftext|>"], shape
    common = {
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
        "rope_theta": 10000.0,
    }
    if family == "llada":
        config = common | {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "mask_token_id": ids["<|mdm_mask|>"],
            "n_layers": c["n_layers"],
            "d_model": c["d_model"],
            "n_heads": c["n_heads"],
            "n_kv_heads": c["n_kv_heads"],
            "mlp_hidden_size": c["d_ff"],
            "vocab_size": rows,
            "embedding_size": rows,
            "rms_norm_eps": 1e-5,
            "max_sequence_length": MAX_LENGTH,
            "weight_tying": False,
            "include_qkv_bias": False,
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "rope": True,
            "rope_full_precision": True,
            "alibi": False,
            "attention_layer_norm": False,
            "include_bias": False,
            "bias_for_layer_norm": False,
            "scale_logits": False,
            "input_emb_norm": False,
            "multi_query_attention": None,
            "block_group_size": 1,
        }
    else:
        config = common | {
            "num_hidden_layers": c["n_layers"],
            "hidden_size": c["d_model"],
            "num_attention_heads": c["n_heads"],
            "num_key_value_heads": c["n_kv_heads"],
            "intermediate_size": c["d_ff"],
            "vocab_size": rows,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": MAX_LENGTH,
            "hidden_act": "silu",
            "use_mrope": False,
            "use_sliding_window": False,
        }
        if family == "dream":
            config |= {
                "architectures": ["DreamModel"],
                "model_type": "Dream",
                "mask_token_id": ids["<|mask|>"],
                "bos_token_id": ids["<|beginoftext|>"],
                "rope_scaling": None,
                "sliding_window": None,
                "full_attn_mask": True,
                "tie_word_embeddings": False,
            }
        else:
            config |= {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "bos_token_id": end,
                "sliding_window": MAX_LENGTH,
                "max_window_layers": c["n_layers"],
                "attention_dropout": 0.0,
                "tie_word_embeddings": True,
                "use_cache": True,
            }
    (folder / "config.json").write_text(_json(dict(sorted(config.items()))), encoding="utf-8")


def write_weights(
    folder: Path, config: ModelConfig, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Write model.safetensors in bfloat16, with the family's names of tensors."""
    from safetensors.torch import save_file

    family = FAMILIES[config.family]
    tensors = {
        family.dropped_prefix + family.checkpoint_name(k): v.detach().to("cpu", torch.bfloat16)
        for k, v in parameters.items()
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
