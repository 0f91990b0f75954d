"""The verifier of a batch: its KV cache for the rows in flight, the noise of drafts, its agreement.

Shapes: R drafted positions, V vocabulary of the diffusion model, A vocabulary of the verifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from decoding.sampling import NoFiniteLogits, Rules, chunks, scrambled, to_device
from decoding.step_view import Verification

if TYPE_CHECKING:
    from decoding.model import Model


@dataclass(frozen=True)
class Draft:
    """The draft of one row: its canvas and first column, the sample's seed, and the step."""

    canvas: np.ndarray
    start: int
    seed: int
    step: int


class Verifier:
    """A causal model that checks drafts, with a cache slot for each row in flight.

    Keys and values of committed tokens stay valid. Each pass therefore computes only the columns of
    the new draft and those committed since the previous pass.
    """

    def __init__(
        self, model: Model, verification: Verification, rules: Rules, options: Mapping[str, float]
    ):
        self.model, self.cache = model, model.new_cache()
        self.verification, self.rules, self.options = verification, rules, options
        self.seen: list[int] = []  # number of columns in the cache, for each row

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` columns."""
        self.cache.reserve(rows, length)

    def add(self, length: int) -> None:
        """Append a row of `length` columns."""
        self.cache.add(length)
        self.seen.append(0)

    def drop(self, index: int) -> None:
        """Remove a row; later rows move up."""
        self.cache.drop(index)
        del self.seen[index]

    def draft(
        self, logits: Tensor, rows: Sequence[Draft], counts: Sequence[int]
    ) -> tuple[Tensor, list[int] | None]:
        """Tokens [R] drawn from logits [R, V], counts[i] for rows[i], and their noise keys."""
        keys = None
        if self.rules.temperature > 0:
            keys = [
                scrambled(scrambled(row.seed, row.step), row.start + j)
                for row, n in zip(rows, counts)
                for j in range(n)
            ]
        parts = [
            self.verification.draft(logits[part], self.rules, self._noise(keys, part, logits))
            for part in chunks(logits)
        ]
        return torch.cat(parts), keys

    def agreed(
        self,
        in_flight: Sequence[Draft | None],
        counts: Sequence[int],
        logits: Tensor,
        tokens: Tensor,
        keys: list[int] | None,
    ) -> Tensor:
        """[R] bool: whether the mixture draws the drafted token too.

        It is not evaluated, and False, at the first position of each row. Raises NoFiniteLogits
        where the verifier's logits are not finite.

        in_flight: the draft of each row in flight; None for a row that sits out.
        counts:    drafted positions of each row that does not sit out.
        """
        # from row.start on the cache may hold a rejected draft
        for i, row in enumerate(in_flight):
            if row is not None:
                self.seen[i] = min(self.seen[i], row.start)
        begins = np.cumsum(counts) - counts
        later = np.ones(len(logits), dtype=bool)
        later[begins] = False
        agreed = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if not later.any():
            return agreed
        drafted = iter(np.split(tokens.cpu().numpy(), begins[1:]))
        expected = self._expected(
            in_flight, [None if row is None else next(drafted) for row in in_flight]
        )
        at = to_device(torch.from_numpy(later.nonzero()[0]), logits.device)
        kept = None if keys is None else [key for key, is_later in zip(keys, later) if is_later]
        logits = logits[at]
        parts = [
            self.verification.target(
                logits[part],
                expected[part],
                self.rules,
                self.options,
                self._noise(kept, part, logits),
            )
            for part in chunks(logits)
        ]
        agreed[at] = torch.cat(parts) == tokens[at]
        # last, so that the device has its work before the host waits for it
        if n := int((~expected.amax(dim=-1).isfinite()).sum()):
            raise NoFiniteLogits(n, len(at), "verifier")
        return agreed

    def _expected(
        self, in_flight: Sequence[Draft | None], drafts: Sequence[np.ndarray | None]
    ) -> Tensor:
        """[sum of len(draft) - 1, A]: the verifier's logits, without each row's first position."""
        spans, packed, asked, at = [], [], [], 0
        for i, (row, ids) in enumerate(zip(in_flight, drafts)):
            if row is None or len(ids) < 2:
                spans.append((0, 0, 0))
                continue
            lo, hi = self.seen[i], row.start + len(ids)
            spans.append((lo, hi, hi))
            packed += [row.canvas[lo : row.start], ids]
            asked.append(np.arange(row.start + 1 - lo, hi - lo) + at)
            self.seen[i], at = hi, at + hi - lo
        tokens = np.concatenate(packed)
        # the verifier never agrees to a token outside its vocabulary; it reads a committed one as 0
        tokens[tokens >= self.model.config.vocab_size] = 0
        return self.model.predict(
            torch.from_numpy(tokens), spans, torch.from_numpy(np.concatenate(asked)), self.cache
        )

    def _noise(self, keys: list[int] | None, part: slice, logits: Tensor) -> Tensor | None:
        return None if keys is None else gumbels(keys[part], logits.shape[1], logits.device)


def gumbels(keys: Sequence[int], n_tokens: int, device: torch.device) -> Tensor:
    """[R, n_tokens] float64: standard Gumbel noise, a function of 64-bit key and token only."""
    z = to_device(torch.tensor([_signed(k) for k in keys]), device)[:, None]
    # splitmix64 of the key; int64 products wrap, and _shifted shifts logically
    z = z + torch.arange(1, n_tokens + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    uniform = (_shifted(z, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shifted(z: Tensor, n: int) -> Tensor:
    return (z >> n) & ((1 << (64 - n)) - 1)
