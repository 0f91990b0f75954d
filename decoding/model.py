"""What the engine needs of a model, as a protocol. models.Transformer implements it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from decoding.kv_cache import Columns
    from models import ModelConfig


class KVCache(Protocol):
    """Keys and values of the rows in flight, one slot for each row, in their order."""

    def add(self, length: int) -> None:
        """Append a slot of `length` columns."""

    def drop(self, index: int) -> None:
        """Remove a slot; later slots move up."""


class Model(Protocol):
    """A model that predicts tokens, for the diffusion model and for a verifier."""

    config: ModelConfig
    device: torch.device

    def predict(
        self, tokens: Tensor, spans: Sequence[Columns], rows: Tensor, cache: Any = None
    ) -> Tensor:
        """Logits [R, V] of the positions `rows` in the packed `tokens`; see models.Transformer."""

    def new_cache(self) -> KVCache:
        """A cache without slots."""
