"""Masked-diffusion language models (LLaDA and Dream families) and causal ones (Qwen2), loaded without remote code.

Names are imported on first use, so that `from models import check_checkpoint` costs neither
torch nor transformers.
"""

from importlib import import_module

_HOME = {
    "CheckpointError": "config",
    "ModelConfig": "config",
    "Span": "config",
    "cached_revision": "hub",
    "check_checkpoint": "files",
    "fingerprint": "files",
    "read_config": "files",
    "tokenizer_disagreement": "files",
    "load_tokenizer": "tokenizer",
    "load_model": "checkpoint",
    "KVCache": "transformer",
    "Transformer": "transformer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
