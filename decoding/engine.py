"""The loop: prompts in, completions out. Every algorithm, every family, every batch goes through `decode`.

A canvas is a prompt and gen_length open positions. Each step of a row asks the model for its open positions,
proposes a token for each, lets the algorithm choose, and commits. Rows in flight are independent: each has its own
step, its own noise, and leaves when it is done; the next prompt takes its place.

Shapes: B rows in flight, T columns of the active block, R queried positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.algorithms import ALGORITHMS, Algorithm, StepView
from decoding.sampling import Proposal, Rules, propose, uniforms
from decoding.schedule import DecodeConfig

if TYPE_CHECKING:
    from models import ModelConfig


class Model(Protocol):
    """What decode() needs of a model: see models.Transformer."""

    config: ModelConfig
    device: torch.device

    def predict(self, tokens: Tensor, spans: Sequence, rows: Tensor, cache=None) -> Tensor: ...


@dataclass(frozen=True)
class Completion:
    """A decoded canvas.

    token_ids:     [gen_length] ids; a position that was left open holds the mask id.
    committed_at:  [gen_length] which of the row's forward passes committed the position, -1 where left open.
    nfe:           forward passes that the row took part in.
    forwards_saved: forward passes that the schedule still had when the row left (for `origin` at most so many).
    positions_computed: columns that went through the model, over all its forward passes.
    seconds:       wall time in flight. Rows of a batch share it: it is a latency, not a cost.
    finish_reason: "end_token", "stop_string" or "length".
    """

    token_ids: tuple[int, ...]
    committed_at: tuple[int, ...]
    nfe: int
    forwards_saved: int
    positions_computed: int
    seconds: float
    finish_reason: str

    @property
    def tokens_committed(self) -> int:
        return sum(at >= 0 for at in self.committed_at)


@dataclass
class _Row:
    """Host-side state of one row in flight. `canvas` is prompt and answer, `open` its answer's open positions."""

    index: int
    prompt_length: int
    canvas: np.ndarray
    open: np.ndarray
    committed_at: np.ndarray
    seed: int
    block: int = 0
    step: int = 0
    nfe: int = 0
    positions: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def answer(self) -> np.ndarray:
        return self.canvas[self.prompt_length :]

    @property
    def prefix(self) -> np.ndarray:
        """The answer up to its first open position: what no later commit can change."""
        return self.answer[: int(self.open.argmax())] if self.open.any() else self.answer


def rules_of(config: DecodeConfig, model: ModelConfig) -> Rules:
    """The sampling rules that a decoding configuration means for a family."""
    return Rules(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
        dtype={"float64": torch.float64, "float32": torch.float32, "model": None}[config.confidence_dtype],
        scores_the_draw=model.family == "dream",
        never=(model.eos_id,) if config.logits_eos_inf else (),
        last=tuple(model.end_ids) if config.confidence_eos_eot_inf else (),
    )


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Completions of the prompts, in their order. A row's tokens do not depend on the others.

    prompts:    token ids; lengths may differ.
    seeds:      one per prompt; all of a row's randomness follows from it.
    batch_size: rows in flight at a time; None is all of them.
    stop:       is given a row's committed prefix (ids before the first open position, no end token among them) and
                says whether the returned text can no longer change.
    on_finish:  is called with (index, completion) the moment a row leaves.
    Raises ValueError where the configuration is not one of the model's family, or prompts and seeds disagree.
    """
    problems = config.problems(model.config.family)
    if len(seeds) != len(prompts):
        problems.append(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    if batch_size is not None and batch_size < 1:
        problems.append(f"batch_size {batch_size} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    return _Decoder(model, config, stop).run(prompts, seeds, batch_size or len(prompts) or 1, on_finish)


class _Decoder:
    """One call of decode()."""

    def __init__(self, model: Model, config: DecodeConfig, stop: Callable[[list[int]], bool] | None):
        self.model, self.config, self.stop = model, config, stop
        self.schedule = config.schedule
        self.algorithm: Algorithm = ALGORITHMS[config.schedule.algorithm]
        self.rules = rules_of(config, model.config)
        self.end_ids = np.array(model.config.end_ids)

    @torch.inference_mode()
    def run(self, prompts, seeds, batch_size: int, on_finish) -> list[Completion]:
        done: list[Completion | None] = [None] * len(prompts)
        waiting = iter(range(len(prompts)))
        rows: list[_Row] = []
        while True:
            rows += [self._admit(i, prompts[i], seeds[i]) for _, i in zip(range(batch_size - len(rows)), waiting)]
            if not rows:
                return done
            self._step(rows)
            for row in [row for row in rows if self._final(row)]:
                rows.remove(row)
                done[row.index] = self._completion(row)
                if on_finish is not None:
                    on_finish(row.index, done[row.index])

    def _admit(self, index: int, prompt: Sequence[int], seed: int) -> _Row:
        n = self.schedule.gen_length
        canvas = np.concatenate([np.asarray(prompt, dtype=np.int64), np.full(n, self.model.config.mask_id)])
        return _Row(index, len(prompt), canvas, np.ones(n, dtype=bool), np.full(n, -1), int(seed))

    def _step(self, rows: list[_Row]) -> None:
        """One step of every row; a row that commits nothing by its schedule takes no part in the forward pass."""
        acting = [row for row in rows if self.schedule.quotas[row.step]]
        if acting and not self.algorithm.reads:
            self._choose_then_predict(acting)
        elif acting:
            self._predict_then_choose(acting)
        for row in rows:
            self._advance(row)

    def _choose_then_predict(self, rows: list[_Row]) -> None:
        """An algorithm that reads no score: the model is asked for the chosen positions alone, or for nothing."""
        noise = self._noise(rows)
        chosen = self.algorithm.select(self._view(rows, noise)).numpy()
        keep = chosen.any(axis=1)
        rows, chosen = [row for row, kept in zip(rows, keep) if kept], chosen[keep]
        if rows:
            noise = noise if noise is None else noise[:, torch.from_numpy(keep)]
            tokens = np.zeros(chosen.shape, dtype=np.int64)
            tokens[chosen] = self._propose(rows, chosen, noise).tokens.cpu().numpy()
            self._commit(rows, chosen, tokens)

    def _predict_then_choose(self, rows: list[_Row]) -> None:
        """An algorithm that reads scores: all open positions of the blocks are proposed, then some are chosen."""
        noise = self._noise(rows)
        queried = np.stack([row.open[self._block(row)] for row in rows])
        proposal = self._propose(rows, queried, noise)
        at = torch.from_numpy(queried).to(self.model.device)
        scores = {
            name: at.to(torch.float64).masked_scatter(at, getattr(proposal, name)) for name in self.algorithm.reads
        }
        chosen = self.algorithm.select(self._view(rows, noise, scores))
        tokens = at.long().masked_scatter(at, proposal.tokens)
        # one transfer for both: the step's only wait for the device
        chosen, tokens = torch.stack([chosen.long(), tokens]).cpu().numpy()
        self._commit(rows, chosen.astype(bool), tokens)

    def _block(self, row: _Row) -> slice:
        lo = row.block * self.schedule.block_length
        return slice(lo, lo + self.schedule.block_length)

    def _noise(self, rows: list[_Row]) -> Tensor | None:
        """[2, B, T] float64 on the CPU, or None where nothing is drawn."""
        if not (self.algorithm.noisy or self.config.temperature > 0):
            return None
        n, per_block = self.schedule.gen_length, self.schedule.steps_per_block
        return torch.stack(
            [uniforms(row.seed, row.block * per_block + row.step, n)[:, self._block(row)] for row in rows], dim=1
        )

    def _view(self, rows: list[_Row], noise: Tensor | None, scores: dict[str, Tensor] | None = None) -> StepView:
        """The step as the algorithm sees it: on the scores' device, or on the CPU where it reads none."""
        device = next(iter(scores.values())).device if scores else torch.device("cpu")
        steps = [row.step for row in rows]
        return StepView(
            masked=torch.from_numpy(np.stack([row.open[self._block(row)] for row in rows])).to(device),
            quota=torch.tensor([self.schedule.quotas[j] for j in steps], device=device),
            rate=torch.tensor([self.schedule.rates[j] for j in steps], dtype=torch.float64, device=device),
            noise=noise[1].to(device) if noise is not None and self.algorithm.noisy else None,
            alg_temp=self.config.alg_temp or 0.0,
            **(scores or {}),
        )

    def _propose(self, rows: list[_Row], queried: np.ndarray, noise: Tensor | None) -> Proposal:
        """One forward pass; tokens and scores of the queried positions [B, T], row by row, left to right."""
        device = self.model.device
        lengths = np.array([len(row.canvas) for row in rows])
        starts = np.cumsum(lengths) - lengths
        block_starts = np.array([row.prompt_length + self._block(row).start for row in rows])
        at_row, at_column = queried.nonzero()
        packed = torch.from_numpy(np.concatenate([row.canvas for row in rows])).to(device)
        spans = [(0, n, n) for n in lengths.tolist()]
        logits = self.model.predict(packed, spans, torch.from_numpy((starts + block_starts)[at_row] + at_column).to(device))
        for row in rows:
            row.nfe += 1
            row.positions += len(row.canvas)
        drawn = noise[0][torch.from_numpy(queried)].to(device) if self.config.temperature > 0 else None
        return propose(logits, self.rules, self.algorithm.reads, drawn)

    def _commit(self, rows: list[_Row], chosen: np.ndarray, tokens: np.ndarray) -> None:
        for row, mask, ids in zip(rows, chosen, tokens):
            block = self._block(row)
            row.answer[block][mask] = ids[mask]
            row.committed_at[block][mask] = row.nfe - 1
            row.open[block][mask] = False

    def _advance(self, row: _Row) -> None:
        row.step += 1
        if not row.open[self._block(row)].any():
            row.block, row.step = row.block + 1, 0
        assert row.step < self.schedule.steps_per_block, f"{self.schedule.algorithm} left positions open at its last step"

    def _remaining(self, row: _Row) -> int:
        """Forward passes that the schedule still has for a row (for `origin`: at most)."""
        if not row.open.any() or not self.config.early_exit:
            return 0
        per_block = np.count_nonzero(self.schedule.quotas)
        left = np.count_nonzero(self.schedule.quotas[row.step :]) + (self.schedule.n_blocks - row.block - 1) * per_block
        return int(min(left, row.open.sum()))

    def _ended(self, ids: np.ndarray) -> bool:
        return bool(np.isin(ids, self.end_ids).any())

    def _final(self, row: _Row) -> bool:
        if not row.open.any():
            return True
        if self.algorithm.ends_at_eos and (row.answer == self.model.config.eos_id).any():
            return True
        if not self.config.early_exit:
            return False
        prefix = row.prefix
        return self._ended(prefix) or bool(len(prefix) and self.stop is not None and self.stop(prefix.tolist()))

    def _completion(self, row: _Row) -> Completion:
        prefix = row.prefix
        ends = np.isin(prefix, self.end_ids)
        text = prefix[: int(ends.argmax())] if ends.any() else prefix
        if len(text) and self.stop is not None and self.stop(text.tolist()):
            reason = "stop_string"
        else:
            reason = "end_token" if ends.any() else "length"
        return Completion(
            token_ids=tuple(row.answer.tolist()),
            committed_at=tuple(row.committed_at.tolist()),
            nfe=row.nfe,
            forwards_saved=self._remaining(row),
            positions_computed=row.positions,
            seconds=time.perf_counter() - row.started,
            finish_reason=reason,
        )
