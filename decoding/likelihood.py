"""The likelihood that a masked-diffusion model gives a text after a prefix: estimators and engine.

An estimator is a pure function: target length and random numbers -> masks with weights. The
log-likelihood of a target is then

    - sum over masks of weight * sum of the cross-entropies at the mask's positions,

each computed with the mask's positions hidden and all others visible. Its expectation over the
draws is the evidence lower bound (ELBO). `confidence` draws nothing and reveals the target step by
step. No torch at the top: the command line reads the table.

Sources: ML-GSAI/LLaDA `eval_llada.py` and `get_log_likelihood.py`; DreamLM/Dream `eval/eval.py`;
LLaDA pull request 134 (iLLaDA) for `confidence`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import combinations, groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from decoding.option import option

if TYPE_CHECKING:
    from models.transformer import Transformer

MC_NUM = 128  # of both families' authors
DREAM_EPS = 1e-3  # Dream hides a position with a chance from here to 1
GROUP = "likelihood"  # in --help
TOGETHER = 1024  # targets of one prefix whose equal rows run once
EXACT_LENGTH = 14  # `exact` enumerates 2^n - 1 masks
Numbers = Callable[..., np.ndarray]  # shape -> uniform numbers in [0, 1), float64


class Mask(NamedTuple):
    """Positions of the target that are hidden together.

    hidden: ascending, counted from the target's start.
    weight: of the sum of the cross-entropies.
    scored: the positions of that sum; () means the hidden ones.
    """

    hidden: tuple[int, ...]
    weight: float
    scored: tuple[int, ...] = ()

    @property
    def asked(self) -> tuple[int, ...]:
        return self.scored or self.hidden


# ---------------------------------------------------------------- estimators


def stratified_counts(n: int, rows: int, u: float) -> list[int]:
    """Numbers of hidden positions, 1 to n, for all rows; any of them is uniform over the rows.

    u: uniform in [0, 1).
    """
    return [min(n, int((i + u) * n / rows) + 1) for i in range(rows)]


def official_counts(n: int, rows: int, first: int) -> list[int]:
    """LLaDA's numbers of hidden positions for a batch of `rows`; `first` is drawn from 1 to n.

    Half-way cases are rounded to even numbers, so they are not uniform where first + j n / rows
    hits one, and the estimate is biased.
    """
    return [(round(first + Fraction(j * n, rows)) - 1) % n + 1 for j in range(rows)]


def llada_mc(n: int, mc_num: int, uniforms: Numbers, batch: int | None = None) -> list[Mask]:
    """LLaDA's estimator: x of n positions are hidden, x uniform in 1..n; weight n / x.

    batch: rows of the official schedule, which draws x anew for each batch; None: one unbiased
    stratification over all rows.
    """
    if batch is None:
        counts = stratified_counts(n, mc_num, float(uniforms()))
    else:
        firsts = 1 + (uniforms(max(mc_num // batch, 1)) * n).astype(int)
        counts = [x for first in firsts for x in official_counts(n, batch, int(first))]
    order = uniforms((len(counts), n)).argsort(1, kind="stable")
    return [
        Mask(tuple(sorted(places[:x].tolist())), n / x / len(counts))
        for places, x in zip(order, counts)
    ]


def dream_mc(n: int, mc_num: int, uniforms: Numbers, batch: int | None = None) -> list[Mask]:
    """Dream's estimator: each position is hidden with chance p, p from 0.001 to 1; weight 1 / p.

    A row may hide nothing. batch: rows over which p is stratified; None: all rows.
    """
    batch = batch or mc_num
    starts = uniforms(max(mc_num // batch, 1))
    times = [(start + j / batch) % 1 for start in starts for j in range(batch)]
    chances = [(1 - DREAM_EPS) * t + DREAM_EPS for t in times]
    hidden = uniforms((len(chances), n)) < np.array(chances)[:, None]
    return [
        Mask(tuple(row.nonzero()[0].tolist()), 1 / p / len(chances))
        for row, p in zip(hidden, chances)
    ]


def exact(n: int, eps: float = 0.0) -> list[Mask]:
    """All masks of n positions, with weights that give the ELBO itself.

    A mask of k positions has the weight 1 / (k C(n, k)); with Dream's smallest chance `eps` the
    integral of p^(k-1) (1-p)^(n-k) over p from eps to 1, over 1 - eps.
    """
    masks = []
    for k in range(1, n + 1):
        # the regularised incomplete beta function of integers is a binomial tail
        tail = sum(math.comb(n, j) * eps**j * (1 - eps) ** (n - j) for j in range(k))
        weight = tail / (1 - eps) / (k * math.comb(n, k))
        masks += [Mask(hidden, weight) for hidden in combinations(range(n), k)]
    return masks


def left_to_right(n: int) -> list[Mask]:
    """Dream's `ar_ftb`: row i hides the positions from i on and scores i."""
    return [Mask(tuple(range(i, n)), 1.0, (i,)) for i in range(n)]


def right_to_left(n: int) -> list[Mask]:
    """Dream's `ar_btf`: row i hides the positions up to i and scores i."""
    return [Mask(tuple(range(i + 1)), 1.0, (i,)) for i in range(n)]


@dataclass(frozen=True)
class Estimator:
    """One way to estimate a log-likelihood.

    help:    what it does, for --help.
    draw:    (n, mc_num, uniforms, batch) -> masks that are drawn at random.
    listed:  n -> masks that are not drawn. With `draw` the masks whose weighted sum is the
             expectation of the draws; alone it is the estimator.
    batch:   rows of a batch of the official schedule.
    scores_end: the end token behind a target (Dream) is hidden and scored like the others.
    An estimator with neither reveals the target in the order of the model's confidence.
    """

    help: str
    draw: Callable[[int, int, Numbers, int | None], list[Mask]] | None = None
    listed: Callable[[int], list[Mask]] | None = None
    batch: int = 1
    scores_end: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "llada_mc": Estimator("masks a random number of positions (LLaDA)", llada_mc, exact, batch=8),
    "dream_mc": Estimator(
        "masks each position with a random probability (Dream)",
        dream_mc,
        partial(exact, eps=DREAM_EPS),
        batch=32,
    ),
    "confidence": Estimator("reveals the answer in order of confidence, not a bound (iLLaDA)"),
    "exact": Estimator(f"all masks, up to {EXACT_LENGTH} tokens", listed=exact),
    "dream_ar_ftb": Estimator("left to right (Dream)", listed=left_to_right, scores_end=True),
    "dream_ar_btf": Estimator("right to left (Dream)", listed=right_to_left, scores_end=True),
}


@dataclass(frozen=True)
class LikelihoodConfig:
    """How log-likelihoods are computed: everything that can change one, except model and text.

    official: draws follow the authors' schedule, with its bias; otherwise an unbiased one, and
              masks that can be enumerated in no more rows are.
    """

    estimator: str = option(
        None,
        "How the log-likelihood of an answer is estimated: "
        + "; ".join(f"{name}: {e.help}" for name, e in ESTIMATORS.items())
        + ". Default: the protocol's, else the family's own.",
        choices=ESTIMATORS,
        flags=("likelihood",),
        group=GROUP,
    )
    mc_num: int | None = option(
        None,
        "Masks that are drawn for each answer; equal ones run once. If an answer has at most N "
        f"masks, all of them are used instead. Default: the protocol's, else {MC_NUM}.",
        low=1,
        high=2**20,
        whole=True,
        group=GROUP,
    )
    cfg_scale: float | None = option(
        None,
        "Classifier-free guidance: logits are un + (W + 1) (cond - un), where `un` are those with "
        "the whole prefix masked. In Dream's own code classifier_free_guidance is W + 1. Default: "
        "the protocol's, else 0, which is no guidance.",
        metavar="W",
        group=GROUP,
    )
    official: bool = False

    def problems(self) -> list[str]:
        """One sentence for each reason why the configuration is not valid."""
        kind = ESTIMATORS[self.estimator]
        drawn = ", ".join(name for name, e in ESTIMATORS.items() if e.draw)
        problems = []
        if self.mc_num is not None and kind.draw is None:
            problems.append(
                f"mc_num {self.mc_num}: {self.estimator} draws nothing; these do: {drawn}"
            )
        if self.official and kind.draw and self.mc_num % min(kind.batch, self.mc_num):
            problems.append(
                f"mc_num {self.mc_num} must be a multiple of {kind.batch}, the rows of a batch of "
                "the official schedule"
            )
        return problems

    def masks(self, n: int, seed: int) -> list[Mask] | None:
        """The masks of a target of n positions, each once; None for `confidence`.

        Raises ValueError where there are too many to enumerate.
        """
        kind = ESTIMATORS[self.estimator]
        if kind.draw is None:
            if kind.listed is exact and n > EXACT_LENGTH:
                raise ValueError(
                    f"{n} tokens have 2^{n} - 1 masks, more than --likelihood exact enumerates "
                    f"(up to {EXACT_LENGTH} tokens); --likelihood llada_mc draws some of them"
                )
            return kind.listed and kind.listed(n)
        if not self.official and 2**n - 1 <= self.mc_num:
            return kind.listed(n)
        uniforms = np.random.Generator(np.random.Philox(seed)).random
        batch = min(kind.batch, self.mc_num) if self.official else None
        return merged(kind.draw(n, self.mc_num, uniforms, batch))


def merged(masks: Iterable[Mask]) -> list[Mask]:
    """Equal masks as one, their weights added; masks that hide nothing are left out."""
    found: dict[tuple, list[float]] = {}
    for mask in masks:
        if mask.hidden:
            found.setdefault((mask.hidden, mask.scored), []).append(mask.weight)
    return [Mask(hidden, math.fsum(w), scored) for (hidden, scored), w in found.items()]


# ---------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Target:
    """A text whose likelihood is asked for, as token ids.

    prefix: before it. tail: after it, visible and never scored.
    n:      its first n positions may be hidden; None: all.
    masks:  see LikelihoodConfig.masks.
    greedy: compute is_greedy, too: n more rows.
    cfg_scale: see LikelihoodConfig.
    """

    prefix: tuple[int, ...]
    ids: tuple[int, ...]
    masks: Sequence[Mask] | None
    n: int | None = None
    tail: tuple[int, ...] = ()
    greedy: bool = False
    cfg_scale: float = 0.0

    @property
    def hideable(self) -> int:
        return len(self.ids) if self.n is None else self.n


@dataclass(frozen=True)
class Likelihood:
    """A log-likelihood, and what it cost.

    loglikelihood: natural logarithm.
    is_greedy: whether decoding at temperature 0, one token a step and the most confident first,
             gives the target; None where it was not asked for.
    order:   the positions as `confidence` revealed them, else ().
    rows:    different sequences that it needs; guidance doubles them.
    positions_computed: columns of these.
    rows_run: rows that ran for it: one that several targets need counts for the first.
    seconds: wall time in flight. The targets of a batch share it.
    """

    loglikelihood: float
    rows: int
    positions_computed: int
    is_greedy: bool | None = None
    order: tuple[int, ...] = ()
    rows_run: int = 0
    seconds: float = 0.0


class _Row(NamedTuple):
    """A sequence that the model computes, and the positions of the target asked of it."""

    prefix: tuple[int, ...]
    canvas: tuple[int, ...]
    asked: tuple[int, ...]
    tail: tuple[int, ...]
    cfg_scale: float


class _Answer(NamedTuple):
    """Of a row's asked positions: cross-entropies of the target, likeliest ids, their chances."""

    losses: list[float]
    best: list[int]
    confidence: list[float]


Asking = Generator[list[tuple[tuple[int, ...], tuple[int, ...]]], list[_Answer], None]


class _Job:
    """A target in work: its generator asks for (canvas, positions) and gets answers."""

    def __init__(self, index: int, target: Target, mask_id: int):
        self.index, self.target, self.mask_id = index, target, mask_id
        self.value, self.greedy, self.order = 0.0, None, ()
        self.rows = self.rows_run = self.open = 0
        self.answers: list[_Answer | None] = []
        self.started = time.perf_counter()
        self.asking = self._ask()

    def hide(self, hidden: Iterable[int]) -> tuple[int, ...]:
        canvas = list(self.target.ids)
        for position in hidden:
            canvas[position] = self.mask_id
        return tuple(canvas)

    def _ask(self) -> Asking:
        target = self.target
        if target.masks is None:
            yield from self._reveal()
        elif target.masks:
            answers = yield [(self.hide(m.hidden), m.asked) for m in target.masks]
            self.value = -math.fsum(
                mask.weight * math.fsum(answer.losses)
                for mask, answer in zip(target.masks, answers)
            )
        if target.greedy:
            yield from self._decode()

    def _reveal(self) -> Asking:
        """Reveal the position whose true token has the least cross-entropy, which is added."""
        hidden, losses, order = list(range(self.target.hideable)), [], []
        while hidden:
            [answer] = yield [(self.hide(hidden), tuple(hidden))]
            at = answer.losses.index(min(answer.losses))
            losses.append(answer.losses[at])
            order.append(hidden.pop(at))
        self.value, self.order = -math.fsum(losses), tuple(order)

    def _decode(self) -> Asking:
        """Decode greedily until a token is not the target's: the rest cannot change the verdict."""
        hidden = list(range(self.target.hideable))
        self.greedy = True
        while hidden:
            [answer] = yield [(self.hide(hidden), tuple(hidden))]
            at = answer.confidence.index(max(answer.confidence))
            if answer.best[at] != self.target.ids[hidden[at]] or answer.best[at] == self.mask_id:
                self.greedy = False
                return
            del hidden[at]

    def result(self) -> Likelihood:
        target = self.target
        columns = len(target.prefix) + len(target.ids) + len(target.tail)
        twice = 2 if target.cfg_scale else 1
        return Likelihood(
            self.value,
            self.rows * twice,
            self.rows * twice * columns,
            self.greedy,
            self.order,
            self.rows_run * twice,
            time.perf_counter() - self.started,
        )


@dataclass
class _Queue:
    """Rows that wait, each with the jobs that need it: (job, index of the answer)."""

    rows: dict[_Row, list[tuple[_Job, int]]] = field(default_factory=dict)

    def ask(self, job: _Job, answers: list[_Answer] | None) -> bool:
        """Let a job go on with its answers; whether it asks for more."""
        try:
            asked = job.asking.send(answers)
        except StopIteration:
            return False
        job.answers, job.open = [None] * len(asked), len(asked)
        job.rows += len(asked)
        target = job.target
        for i, (canvas, at) in enumerate(asked):
            row = _Row(target.prefix, canvas, at, target.tail, target.cfg_scale)
            self.rows.setdefault(row, []).append((job, i))
        return True

    def take(self, n: int) -> dict[_Row, list[tuple[_Job, int]]]:
        taken = [row for row, _ in zip(self.rows, range(n))]
        return {row: self.rows.pop(row) for row in taken}


def likelihoods_each(
    model: Transformer, targets: Iterable[Target], batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    """(index, Likelihood) of each target as it is finished.

    targets:    drawn from as they are needed. Those with the same prefix should follow each other:
                equal rows of theirs run once.
    batch_size: rows of one forward pass, of any targets. At float32 it changes rounding alone.
    Raises NoFiniteLogits.
    """
    queue = _Queue()
    # a task without contexts has one prefix: not all of its rows at once
    groups = groupby(enumerate(targets), key=lambda pair: (pair[1].prefix, pair[0] // TOGETHER))
    while True:
        while len(queue.rows) < batch_size and (group := next(groups, None)) is not None:
            for index, target in group[1]:
                job = _Job(index, target, model.config.mask_id)
                if not queue.ask(job, None):  # nothing can be hidden
                    yield index, job.result()
        if not queue.rows:
            return
        # a sequential job's next row goes on in the same pass as the rows that wait
        taken = queue.take(batch_size)
        for (job, i), answer in _answers(model, taken):
            job.answers[i] = answer
            job.open -= 1
            if not job.open and not queue.ask(job, job.answers):
                yield job.index, job.result()


def _answers(
    model: Transformer, rows: dict[_Row, list[tuple[_Job, int]]]
) -> list[tuple[tuple[_Job, int], _Answer]]:
    """One forward pass over the rows: the answer for each job that needs one of them."""
    import torch

    from decoding.sampling import NoFiniteLogits

    tokens: list[int] = []
    spans, asked = [], []
    for guided in (False, True):
        for row in rows:
            if guided and not row.cfg_scale:
                continue
            prefix = [model.config.mask_id] * len(row.prefix) if guided else row.prefix
            start = len(tokens) + len(prefix)
            asked += [start + position for position in row.asked]
            tokens += (*prefix, *row.canvas, *row.tail)
            length = len(prefix) + len(row.canvas) + len(row.tail)
            spans.append((0, length, length))
    logits = model.predict(torch.tensor(tokens), spans, torch.tensor(asked), raw=True).float()
    counts = [len(row.asked) for row in rows]
    logits, bare = logits[: sum(counts)], logits[sum(counts) :]
    if len(bare):
        scales = [row.cfg_scale for row in rows for _ in row.asked]
        scale = torch.tensor(scales, device=logits.device)[:, None]
        where = scale[:, 0] != 0
        logits = logits.clone()
        logits[where] = bare + (scale[where] + 1) * (logits[where] - bare)
    total = logits.logsumexp(-1)
    top, best = logits.max(-1)
    starts = np.cumsum([0, *counts])
    takers = [(pair, row, a) for (row, pairs), a in zip(rows.items(), starts) for pair in pairs]
    at = [a + i for _, row, a in takers for i in range(len(row.asked))]
    true = [pair[0].target.ids[position] for pair, row, _ in takers for position in row.asked]
    at, true = (torch.tensor(x, device=logits.device) for x in (at, true))
    losses = (total[at] - logits[at, true]).tolist()
    if unfit := sum(not math.isfinite(loss) for loss in losses):
        raise NoFiniteLogits(unfit, len(losses))
    best, confidence = best.tolist(), (top - total).exp().tolist()
    found, done = [], 0
    for pair, row, a in takers:
        n = len(row.asked)
        found.append(
            (pair, _Answer(losses[done : done + n], best[a : a + n], confidence[a : a + n]))
        )
        done += n
    for pairs in rows.values():
        pairs[0][0].rows_run += 1
    return found
