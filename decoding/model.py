"""The protocol of a model that the engine runs. models.Transformer implements it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from decoding.kv_cache import Columns
    from models import ModelConfig


class Model(Protocol):
    """A model that predicts tokens: the diffusion model, or a verifier."""

    config: ModelConfig
    device: torch.device

    def predict(
        self, tokens: Tensor, spans: Sequence[Columns], rows: Tensor, cache: Any = None
    ) -> Tensor:
        """Logits [R, V] of the columns `rows` of the packed `tokens`; see models.Transformer."""

    def new_cache(self) -> Any:
        """A KV cache without slots; `add(length)` appends a slot and `drop(index)` removes one.

        `reserve(rows, length)` makes room for the slots of a batch.
        """
