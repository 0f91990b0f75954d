"""Masked-diffusion models (LLaDA, Dream) and causal ones (Qwen2), loaded without remote code.

Checking a checkpoint imports neither torch nor transformers: the names that need torch are
imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from models.config import CheckpointError, Family, ModelConfig, Span
from models.families import FAMILIES
from models.files import check_checkpoint, fingerprint, read_config, tokenizer_disagreement
from models.hub import cached_revision
from models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from models.checkpoint import load_model
    from models.transformer import Transformer

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "Family",
    "ModelConfig",
    "Span",
    "Transformer",
    "cached_revision",
    "check_checkpoint",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "read_config",
    "tokenizer_disagreement",
]

_NEEDS_TORCH = {
    "Transformer": "models.transformer",
    "load_model": "models.checkpoint",
}


def __getattr__(name: str):
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TORCH[name]), name)
