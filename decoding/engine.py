"""The decoding loop: prompts in, completions out. All algorithms, families and batches use it.

A canvas is a prompt followed by gen_length open positions. Each step of a row asks the model for
the row's open positions, proposes a token for each, lets the algorithm choose positions, and
commits. Rows in flight are independent: each has its own step, noise and KV cache slot. A finished
row leaves, and the next prompt takes its place.

Shapes: B rows in flight, T columns of the active block, R queried positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from decoding.algorithms import ALGORITHMS
from decoding.config import DecodeConfig
from decoding.kv_cache import CACHES, CacheView, Columns
from decoding.model import Model
from decoding.row_state import Completion, Row
from decoding.sampling import (
    NoFiniteLogits,
    Proposal,
    Rules,
    all_to_device,
    joined,
    marked,
    mask_tokens,
    propose,
    quick_proposal,
    to_device,
    uniforms,
)
from decoding.step_view import StepView
from decoding.verifier import Draft, Verifier

if TYPE_CHECKING:
    from models import ModelConfig

Stop = Callable[[list[int]], bool]


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    stop: Stop | None = None,
    verifier: Model | None = None,
) -> list[Completion]:
    """Completions of the prompts, in their order. Arguments and errors: see `decode_each`."""
    each = decode_each(
        model, prompts, config, seeds, batch_size=batch_size, stop=stop, verifier=verifier
    )
    return [completion for _, completion in sorted(each, key=itemgetter(0))]


def decode_each(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    stop: Stop | None = None,
    verifier: Model | None = None,
) -> Iterator[tuple[int, Completion]]:
    """(index of the prompt, completion) of each prompt, as soon as its row leaves.

    A row's tokens do not depend on the other rows. Nothing is computed between two items, and
    closing the generator frees the rows in flight.

    prompts:    token ids; lengths may differ.
    seeds:      one per prompt; all randomness of a row follows from it.
    batch_size: rows in flight at a time; None means all.
    stop:       takes a row's committed prefix (the ids before its first open position, without end
                tokens) and returns whether the returned text can no longer change.
    verifier:   autoregressive model, for an algorithm that needs one. Model and verifier must share
                one tokenizer.
    Raises ValueError at the call if the configuration does not fit the model's family, or if
    prompts and seeds differ in number; NoFiniteLogits in a step.
    """
    problems = config.problems(model.config.family, model.config.end_token_flags)
    if len(seeds) != len(prompts):
        problems.append(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    if batch_size is not None and batch_size < 1:
        problems.append(f"batch_size {batch_size} must be at least 1")
    name = config.schedule.algorithm
    if (ALGORITHMS[name].verification is None) != (verifier is None):
        problems.append(f"{name} {'needs a' if verifier is None else 'has no'} verifier")
    if problems:
        raise ValueError("; ".join(problems))
    return _Decoder(model, config, stop, verifier).run(
        prompts, seeds, batch_size or len(prompts) or 1
    )


def probe(
    model: Model,
    prompt: Sequence[int],
    config: DecodeConfig,
    n: int,
    *,
    passes: int = 2,
    verifier: Model | None = None,
) -> None:
    """Decode n copies of a prompt for `passes` forward passes, as `decode_each` would.

    Algorithms that remember a step need the memory of two.
    """
    copies = _Passes(model, passes)
    with suppress(_Passed):
        decode(copies, [prompt] * n, config, range(n), verifier=verifier)


class _Passed(Exception):
    """All forward passes of a probe are done."""


class _Passes:
    """A Model whose forward passes are limited; the next one raises _Passed."""

    def __init__(self, model: Model, passes: int):
        self.config, self.device, self.new_cache = model.config, model.device, model.new_cache
        self._predict, self._left = model.predict, passes

    def predict(self, *arguments: Any) -> Tensor:
        if not self._left:
            raise _Passed
        self._left -= 1
        return self._predict(*arguments)


def rules_of(config: DecodeConfig, model: ModelConfig) -> Rules:
    """The sampling rules of a decoding configuration for a model."""
    algorithm = ALGORITHMS[config.schedule.algorithm]
    return Rules(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        dtype={"float64": torch.float64, "float32": torch.float32, "model": None}[
            config.confidence_dtype
        ],
        scores_the_draw=model.scores_the_draw and not algorithm.reads_the_model,
        never=(model.eos_id,) if config.logits_eos_inf else (),
        last=tuple(model.end_ids) if config.confidence_eos_eot_inf else (),
    )


def _check_finite(tokens: np.ndarray) -> None:
    """Raises NoFiniteLogits where a proposed token is -1."""
    if n := int(np.count_nonzero(tokens < 0)):
        raise NoFiniteLogits(n, tokens.size)


class _Decoder:
    """The rows, the cache and the verifier of one call of decode_each()."""

    def __init__(
        self, model: Model, config: DecodeConfig, stop: Stop | None, verifier: Model | None
    ):
        self.model, self.config, self.stop = model, config, stop
        self.schedule = config.schedule
        self.algorithm = ALGORITHMS[config.schedule.algorithm]
        self.rules = rules_of(config, model.config)
        self.end_ids = np.array(model.config.end_ids)
        self.rows: list[Row] = []
        self.away = 0.0  # seconds that the caller took between two items
        self.verifier = None
        if verifier is not None:
            self.verifier = Verifier(
                verifier, self.algorithm.verification, self.rules, config.options
            )
        self.cache = None if config.kv_cache == "none" else model.new_cache()
        # number of columns to the left of a block that a pass with a cache needs
        self.shift = int(self.cache is not None and model.config.shift)

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        waiting = iter(range(len(prompts)))
        for slots in (self.cache, self.verifier):
            if slots is not None and prompts:
                longest = max(map(len, prompts)) + self.schedule.gen_length
                slots.reserve(min(batch_size, len(prompts)), longest)
        while True:
            for _, i in zip(range(batch_size - len(self.rows)), waiting):
                self._admit(i, prompts[i], seeds[i])
            if not self.rows:
                return
            self._step(self.rows)
            final = [row for row in self.rows if self._final(row)]
            for row in final:
                self._dismiss(row)
            for item in [(row.index, self._completion(row)) for row in final]:
                began = time.perf_counter()
                yield item
                self.away += time.perf_counter() - began

    def _admit(self, index: int, prompt: Sequence[int], seed: int) -> None:
        n = self.schedule.gen_length
        canvas = np.concatenate(
            [np.asarray(prompt, dtype=np.int64), np.full(n, self.model.config.mask_id)]
        )
        self.rows.append(
            Row(
                index,
                len(prompt),
                canvas,
                np.ones(n, dtype=bool),
                np.full(n, -1),
                int(seed),
                started=self._now(),
            )
        )
        for slots in (self.cache, self.verifier):
            if slots is not None:
                slots.add(len(canvas))

    def _now(self) -> float:
        """Seconds, without those of the caller: what it does with an item is no row's latency."""
        return time.perf_counter() - self.away

    def _dismiss(self, row: Row) -> None:
        at = self.rows.index(row)
        del self.rows[at]
        for slots in (self.cache, self.verifier):
            if slots is not None:
                slots.drop(at)

    def _step(self, rows: list[Row]) -> None:
        """One step of every row. A row whose quota is zero takes no part in the forward pass."""
        acting = [row for row in rows if self.schedule.quotas_of(row.block)[row.step]]
        if acting and self.algorithm.chooses_first:
            self._choose_then_predict(acting)
        elif acting:
            self._predict_then_choose(acting)
        for row in rows:
            self._advance(row)

    def _choose_then_predict(self, rows: list[Row]) -> None:
        """For an algorithm that reads no score: the model predicts the chosen positions only."""
        noise = self._noise(rows)
        view = self._view(self._fields(rows, self._in_sight(rows), noise))
        chosen = self._select(view).numpy()
        self._check_open(chosen, view.masked.numpy())
        keep = chosen.any(axis=1)
        rows, chosen = [row for row, kept in zip(rows, keep) if kept], chosen[keep]
        if rows:
            drawn = None
            if self.config.temperature > 0:
                drawn = noise[0][torch.from_numpy(keep)][torch.from_numpy(chosen)]
                drawn = to_device(drawn, self.model.device)
            proposal, _ = self._propose(rows, chosen, drawn)
            found = [proposal.tokens]
            if proposal.sound is not None:
                found.append(proposal.sound.long())
            found, *sound = torch.stack(found).cpu().numpy()
            if sound and not sound[0].all():
                found = self._settled(proposal, sound[0]).tokens.cpu().numpy()
            tokens = np.zeros(chosen.shape, dtype=np.int64)
            tokens[chosen] = found
            _check_finite(tokens[chosen])
            self._commit(rows, chosen, tokens)

    def _predict_then_choose(self, rows: list[Row]) -> None:
        """For an algorithm that reads scores: propose all open positions, then choose some."""
        noise = self._noise(rows)
        queried = self._in_sight(rows)
        fields = self._fields(rows, queried, noise)
        if noise is not None and self.config.temperature > 0:
            fields["drawn"] = noise[0][fields["masked"]]
        fields = all_to_device(fields, self.model.device)
        proposal, observed = self._propose(rows, queried, fields.pop("drawn", None))
        chosen, tokens, sound = self._chosen(fields, proposal, observed)
        if sound is not None and not sound.all():
            proposal = self._settled(proposal, sound[queried])
            chosen, tokens, _ = self._chosen(fields, proposal, observed)
        _check_finite(tokens[queried])
        self._check_open(chosen, queried)
        self._commit(rows, chosen, tokens)
        for row, was_open, now_committed in zip(rows, queried, chosen):
            if row.memory:
                still_open = np.flatnonzero(~now_committed[was_open])
                kept = to_device(torch.from_numpy(still_open), self.model.device)
                row.memory = {name: held[kept] for name, held in row.memory.items()}

    def _settled(self, proposal: Proposal, sound: np.ndarray) -> Proposal:
        rest = torch.from_numpy(np.flatnonzero(sound == 0))
        return proposal.settled(to_device(rest, self.model.device))

    def _chosen(
        self, fields: dict[str, Tensor], proposal: Proposal, observed: dict[str, Tensor]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """[B, T] each: the positions that are chosen, the tokens, and where the proposal is sound.

        One transfer for all; the step waits for the device only here.
        """
        at = fields["masked"]
        scores = {name: getattr(proposal, name) for name in self.algorithm.scores} | observed
        scores = {
            name: at.to(score.dtype).masked_scatter(at, score) for name, score in scores.items()
        }
        chosen = self._select(self._view(fields | scores))
        planes = [chosen.long(), at.long().masked_scatter(at, proposal.tokens)]
        if proposal.sound is not None:
            planes.append((~at).long().masked_scatter(at, proposal.sound.long()))
        chosen, tokens, *sound = torch.stack(planes).cpu().numpy()
        return chosen.astype(bool), tokens, sound[0].astype(bool) if sound else None

    def _select(self, view: StepView) -> Tensor:
        """The algorithm's mask [B, T]. Raises TypeError for anything else."""
        chosen = self.algorithm.select(view)
        shape = list(view.masked.shape)
        if not isinstance(chosen, Tensor):
            found = type(chosen).__name__
        elif chosen.dtype != torch.bool or list(chosen.shape) != shape:
            found = f"{str(chosen.dtype).removeprefix('torch.')} of shape {list(chosen.shape)}"
        else:
            return chosen
        raise TypeError(
            f"{self.schedule.algorithm}: select must return a bool tensor of shape {shape}, as "
            f"view.masked is; it returned {found}"
        )

    def _check_open(self, chosen: np.ndarray, asked: np.ndarray) -> None:
        """Raises ValueError where a position is chosen for which no token was asked."""
        if (chosen > asked).any():
            raise ValueError(
                f"{self.schedule.algorithm}: select chose positions that are not open; "
                "its mask must be part of view.masked"
            )

    def _block(self, row: Row) -> slice:
        return self.schedule.span(row.block)

    def _stacked(self, parts: list[np.ndarray]) -> np.ndarray:
        """[B, ..., T]: arrays of the rows' blocks; a short one is filled up with zeros."""
        longest = max(part.shape[-1] for part in parts)
        filled = [
            np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, longest - part.shape[-1])])
            if part.shape[-1] < longest
            else part
            for part in parts
        ]
        return np.stack(filled)

    def _in_sight(self, rows: list[Row]) -> np.ndarray:
        """[B, T] bool: the open positions of the rows' blocks, up to the end of the lookahead."""
        in_block = self._stacked([row.open[self._block(row)] for row in rows])
        ahead = self.config.max_lookahead
        return in_block if ahead is None else in_block & (in_block.cumsum(axis=1) <= ahead)

    def _noise(self, rows: list[Row]) -> Tensor | None:
        """[2, B, T] float64 on the CPU, or None if nothing is drawn from it."""
        if not (self.algorithm.noisy or self.config.temperature > 0) or self.verifier is not None:
            return None
        n = self.schedule.gen_length
        noise = [
            uniforms(row.seed, self._steps_done(row), n)[:, self._block(row)].numpy()
            for row in rows
        ]
        return torch.from_numpy(self._stacked(noise)).movedim(0, 1)

    def _steps_done(self, row: Row) -> int:
        """Steps of the whole canvas that the row has behind it."""
        return row.block * self.schedule.steps_per_block + row.step

    def _fields(
        self, rows: list[Row], in_sight: np.ndarray, noise: Tensor | None
    ) -> dict[str, Tensor]:
        """The fields of the algorithm's view but the scores, on the CPU."""
        quotas = [self.schedule.quotas_of(row.block)[row.step] for row in rows]
        rates = [self.schedule.rates_of(row.block)[row.step] for row in rows]
        fields = {
            "masked": torch.from_numpy(in_sight),
            "quota": torch.tensor(quotas),
            "rate": torch.tensor(rates, dtype=torch.float64),
        }
        if noise is not None and self.algorithm.noisy:
            fields["noise"] = noise[1]
        if "step" in self.algorithm.reads:
            fields["step"] = torch.tensor([row.step for row in rows])
        if "canvas" in self.algorithm.reads:
            fields["canvas"] = torch.from_numpy(np.stack([row.open for row in rows]))
            fields["start"] = torch.tensor([self._block(row).start for row in rows])
        return fields

    def _view(self, fields: dict[str, Tensor]) -> StepView:
        """The step as the algorithm sees it."""
        return StepView(**fields, alg_temp=self.config.alg_temp or 0.0, options=self.config.options)

    def _columns(self, row: Row) -> Columns:
        """The columns that the row's next forward pass computes and attends to."""
        block, refresh = self._block(row), self.config.cache_refresh
        lo, length = row.prompt_length + block.start, len(row.canvas)
        if self.config.max_lookahead is not None:
            length = min(length, row.frontier + self.config.max_lookahead)
        return CACHES[self.config.kv_cache](
            CacheView(
                lo=max(0, lo - self.shift * int(row.open[block.start])),
                hi=row.prompt_length + block.stop,
                length=length,
                fresh=row.passes % refresh == 0 if refresh else row.passes == 0,
                since=row.since,
                window=self.config.kv_window or 1,
            )
        )

    def _predict(self, rows: list[Row], queried: np.ndarray) -> Tensor:
        """One forward pass: logits [R, V] of the queried positions [B, T], row by row."""
        # a cache has a slot for every row in flight; a row that sits out gets no columns
        in_flight = rows if self.cache is None else self.rows
        acting = {row.index: self._columns(row) for row in rows}
        spans = [acting.get(row.index, (0, 0, 0)) for row in in_flight]
        ends = np.cumsum([hi - lo for lo, hi, _ in spans])
        # where column 0 of each row's canvas lies, or would lie, among the packed columns
        origins = {row.index: end - hi for row, end, (_, hi, _) in zip(in_flight, ends, spans)}
        starts = np.array(
            [origins[row.index] + row.prompt_length + self._block(row).start for row in rows]
        )
        at_row, at_column = queried.nonzero()
        packed = np.concatenate([row.canvas[lo:hi] for row, (lo, hi, _) in zip(in_flight, spans)])
        asked = torch.from_numpy(starts[at_row] + at_column)
        logits = self.model.predict(torch.from_numpy(packed), spans, asked, self.cache)
        for row in rows:
            lo, hi, kv_end = acting[row.index]
            row.nfe += 1
            row.passes += 1
            row.since = row.frontier
            row.nfe_partial += hi - lo < kv_end
            row.positions += hi - lo
        return logits

    def _propose(
        self, rows: list[Row], queried: np.ndarray, drawn: Tensor | None
    ) -> tuple[Proposal, dict[str, Tensor]]:
        """Tokens and scores of the queried positions after one forward pass, and further scores.

        drawn: noise of the queried positions, on the device; None if no token is drawn.
        """
        logits = self._predict(rows, queried)
        if self.verifier is not None:
            return self._verified(rows, queried, logits)
        if self.algorithm.observe is not None:
            return self._observed(rows, logits, queried.sum(axis=1).tolist(), drawn)
        return quick_proposal(logits, self.rules, self.algorithm.scores, drawn), {}

    def _observed(
        self, rows: list[Row], logits: Tensor, counts: list[int], noise: Tensor | None
    ) -> tuple[Proposal, dict[str, Tensor]]:
        """A proposal from the logits of `Algorithm.observe`, and the score "observed", if any.

        Row by row: in the precision of the scores the logits of a canvas take gigabytes.
        """
        proposals, scores, reads = [], [], self.algorithm.scores
        noises = [None] * len(rows) if noise is None else noise.split(counts)
        for row, part, drawn in zip(rows, logits.split(counts), noises):
            part = mask_tokens(part.to(self.rules.dtype or part.dtype), self.rules.never)
            seen = self.algorithm.observe(part, row.memory, self.config.options)
            row.memory = seen.memory
            scores.append(seen.score)
            proposals.append(propose(seen.logits, self.rules, reads, drawn))
        observed = {} if scores[0] is None else {"observed": torch.cat(scores)}
        return joined(proposals, reads), observed

    def _verified(
        self, rows: list[Row], queried: np.ndarray, logits: Tensor
    ) -> tuple[Proposal, dict[str, Tensor]]:
        """Tokens drafted at the queried positions, and the score "agreed" of the verifier."""
        counts = queried.sum(axis=1)
        drafts = {
            row.index: Draft(row.canvas, row.frontier, row.seed, self._steps_done(row))
            for row in rows
        }
        tokens, keys = self.verifier.draft(logits, list(drafts.values()), counts)
        flight = [drafts.get(row.index) for row in self.rows]
        agreed = self.verifier.agreed(flight, counts, logits, tokens, keys)
        for row, n in zip(rows, counts):
            row.nfe_verifier += int(n > 1)
        return Proposal(marked(tokens, logits.amax(dim=-1))), {"agreed": agreed}

    def _commit(self, rows: list[Row], chosen: np.ndarray, tokens: np.ndarray) -> None:
        for row, mask, ids in zip(rows, chosen, tokens):
            block = self._block(row)
            n = block.stop - block.start
            mask, ids = mask[:n], ids[:n]
            row.answer[block][mask] = ids[mask]
            row.committed_at[block][mask] = row.nfe - 1
            row.open[block][mask] = False

    def _advance(self, row: Row) -> None:
        row.step += 1
        if not row.open[self._block(row)].any():
            row.block, row.step, row.passes, row.memory = row.block + 1, 0, 0, None
        left = row.block < self.schedule.n_blocks
        assert not left or row.step < len(self.schedule.quotas_of(row.block)), (
            f"{self.schedule.algorithm} left positions open at its last step"
        )

    def _remaining(self, row: Row) -> int:
        """Forward passes that a row's schedule has left; an upper bound for `origin`."""
        if not row.open.any() or not self.config.early_exit or self.schedule.adaptive:
            return 0
        left = self.schedule.passes_after(row.block, row.step)
        return int(min(left, row.open.sum()))

    def _ended(self, ids: np.ndarray) -> bool:
        # np.isin takes four times as long
        return any((ids == end).any() for end in self.model.config.end_ids)

    def _final(self, row: Row) -> bool:
        if not row.open.any():
            return True
        if self.algorithm.ends_at_eos and (row.answer == self.model.config.eos_id).any():
            return True
        if not self.config.early_exit:
            return False
        prefix = row.prefix
        if len(prefix) == row.checked:
            return False
        row.checked = len(prefix)
        return self._ended(prefix) or bool(
            len(prefix) and self.stop is not None and self.stop(prefix.tolist())
        )

    def _completion(self, row: Row) -> Completion:
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
            seconds=self._now() - row.started,
            finish_reason=reason,
            nfe_partial=row.nfe_partial,
            nfe_verifier=row.nfe_verifier,
        )
