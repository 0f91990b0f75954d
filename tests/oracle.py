"""Slow, plain loops to compare the engine with: one prompt, all logits, no early exit, no batch.

Each follows the description of the official algorithm. It shares with the engine only the random
numbers (`uniforms`) and the float32 linspace of the schedule, from torch itself.
"""

from __future__ import annotations

import numpy as np
import torch

from decoding.sampling import uniforms


def aligned(model, canvas: list[int]) -> np.ndarray:
    """[L, V] float64 logits of each position of a canvas, shifted for Dream; mask token -inf."""
    with torch.inference_mode():
        logits = model.logits(torch.tensor([canvas], device=model.device))[0].double().cpu().numpy()
    if model.config.family == "dream":
        logits = np.concatenate([logits[:1], logits[:-1]])
    logits[:, model.config.mask_id] = -np.inf
    return logits


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def nucleus(logits: np.ndarray, top_p: float | None, top_k: int | None) -> np.ndarray:
    """Logits [V] with -inf outside the nucleus, then outside the top k."""
    logits = logits.copy()
    if top_p is not None and top_p < 1:
        order = np.argsort(-logits, kind="stable")
        mass = 0.0
        for token, p in zip(order, softmax(logits)[order]):
            if mass > top_p:
                logits[token] = -np.inf
            mass += p
    if top_k is not None:
        logits[logits < np.sort(logits)[-top_k]] = -np.inf
    return logits


def sample(
    logits: np.ndarray, temperature: float, top_p, top_k, u: float
) -> tuple[int, np.ndarray]:
    """A token and the distribution [V] that it is drawn from."""
    if temperature == 0:
        return int(logits.argmax()), softmax(logits)
    probs = softmax(nucleus(logits / temperature, top_p, top_k))
    cumulative = probs.cumsum()
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), probs


def best(scores: dict[int, float], k: int) -> list[int]:
    """The k positions with the highest score, leftmost first among equals."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:k]


def llada(
    model,
    prompt: list[int],
    algorithm: str,
    gen_length: int,
    block_length: int,
    num_steps: int,
    seed: int = 0,
    temperature: float = 0.0,
    top_p=None,
    top_k=None,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
) -> list[int]:
    """low_confidence and random, as in ML-GSAI/LLaDA generate.py."""
    mask, eos, ends = model.config.mask_id, model.config.eos_id, list(model.config.end_ids)
    x = list(prompt) + [mask] * gen_length
    for first, length, before, steps in blocks_of(gen_length, block_length, num_steps):
        for step in range(steps):
            u = uniforms(seed, before + step, gen_length).numpy()
            logits = aligned(model, x)
            lo = len(prompt) + first
            tokens, scores = {}, {}
            for i in range(lo, lo + length):
                if x[i] != mask:
                    continue
                row = logits[i].copy()
                if logits_eos_inf:
                    row[eos] = -np.inf
                tokens[i], _ = sample(row, temperature, top_p, top_k, u[0, i - len(prompt)])
                if confidence_eos_eot_inf:
                    row[ends] = -np.inf
                scores[i] = (
                    softmax(row)[tokens[i]]
                    if algorithm == "low_confidence"
                    else u[1, i - len(prompt)]
                )
            for i in best(scores, length // steps + (step < length % steps)):
                x[i] = tokens[i]
    return x[len(prompt) :]


def blocks_of(gen_length: int, block_length: int, num_steps: int) -> list[tuple[int, ...]]:
    """(first position, length, steps before it, steps) of each block; the last may be short."""
    blocks, before = [], 0
    for first in range(0, gen_length, block_length):
        length = min(block_length, gen_length - first)
        # the last block takes what whole blocks of equal steps leave
        last = first + length == gen_length
        steps = num_steps - before if last else int(num_steps * block_length / gen_length)
        blocks.append((first, length, before, steps))
        before += steps
    return blocks


def dream(
    model,
    prompt: list[int],
    algorithm: str,
    gen_length: int,
    num_steps: int,
    seed: int = 0,
    temperature: float = 0.0,
    top_p=None,
    top_k=None,
    alg_temp: float | None = None,
    block_length: int | None = None,
) -> list[int]:
    """maskgit_plus, topk_margin, entropy and origin, as in DreamLM/Dream generation_utils.py."""
    mask = model.config.mask_id
    x = list(prompt) + [mask] * gen_length
    plan = blocks_of(gen_length, block_length or gen_length, num_steps)
    every = [(*block, step) for block in plan for step in range(block[-1])]
    for first, length, before, steps, step in every:
        t = torch.linspace(1, 1e-3, steps + 1)
        u = uniforms(seed, before + step, gen_length).numpy()
        logits = aligned(model, x)
        share = 1.0 if step == steps - 1 else float(1 - t[step + 1] / t[step])
        lo = len(prompt) + first
        open_now = [i for i in range(lo, lo + length) if x[i] == mask]
        tokens, scores = {}, {}
        for i in open_now:
            at = i - len(prompt)
            tokens[i], probs = sample(logits[i], temperature, top_p, top_k, u[0, at])
            top = np.sort(probs)[::-1]
            scores[i] = {
                "maskgit_plus": probs[tokens[i]],
                "topk_margin": top[0] - top[1],
                "entropy": (probs * np.log(probs + 1e-10)).sum(),
                "origin": 0.0,
            }[algorithm]
            if alg_temp:
                scores[i] = scores[i] / alg_temp - np.log(-np.log(u[1, at]))
        if algorithm == "origin":
            chosen = [i for i in open_now if u[1, i - len(prompt)] < share]
        else:
            chosen = best(scores, int(np.float32(len(open_now)) * np.float32(share)))
        for i in chosen:
            x[i] = tokens[i]
    return x[len(prompt) :]


def leftright(
    model,
    prompt: list[int],
    gen_length: int,
    tokens_per_step: int,
    seed: int = 0,
    temperature: float = 0.0,
    top_p=None,
    top_k=None,
) -> list[int]:
    """The first K open positions each step, until the end token is on the canvas."""
    mask = model.config.mask_id
    x = list(prompt) + [mask] * gen_length
    for step in range(gen_length):
        u = uniforms(seed, step, gen_length).numpy()
        logits = aligned(model, x)
        for i in [i for i in range(len(prompt), len(x)) if x[i] == mask][:tokens_per_step]:
            x[i], _ = sample(logits[i], temperature, top_p, top_k, u[0, i - len(prompt)])
        answer = x[len(prompt) :]
        if model.config.eos_id in answer or mask not in answer:
            break
    return x[len(prompt) :]


# ---- blocks, caches and adaptive algorithms


def blockwise(
    model,
    prompt: list[int],
    rule,
    gen_length: int,
    block_length: int,
    seed: int = 0,
    temperature: float = 0.0,
    kv_cache: str = "none",
    cache_refresh: int | None = None,
    top_p: float | None = None,
    scores_the_draw: bool = False,
) -> tuple[list[int], int, int]:
    """(ids, forward passes, computed columns) of a canvas in blocks; `rule` commits in a Step.

    scores_the_draw: the rule reads the distribution of the draw, not the model's own.
    """
    mask, first = model.config.mask_id, len(prompt)
    x = list(prompt) + [mask] * gen_length
    cache = model.new_cache()
    cache.add(len(x))
    passes = columns = 0
    for lo in range(first, len(x), block_length):
        step, memory = 0, {}
        hi = min(lo + block_length, len(x))
        while mask in x[lo:hi]:
            open_now = [i for i in range(lo, hi) if x[i] == mask]
            if kv_cache == "none" or (step % cache_refresh == 0 if cache_refresh else step == 0):
                a, b = 0, len(x)
            else:
                a = lo - 1 if model.config.family == "dream" and lo in open_now and lo else lo
                b = len(x) if kv_cache == "prefix" else hi
            rows = torch.tensor([i - a for i in open_now])
            logits = (
                model.predict(torch.tensor(x[a:b]), [(a, b, len(x))], rows, cache).double().numpy()
            )
            u = uniforms(
                seed, (lo - first) // block_length * block_length + step, gen_length
            ).numpy()
            now = Step(
                model.config,
                x,
                first,
                lo,
                step,
                dict(zip(open_now, logits)),
                memory,
                temperature,
                u,
                top_p,
                scores_the_draw,
            )
            for i, token in rule(now).items():
                x[i] = token
            passes, columns, step = passes + 1, columns + b - a, step + 1
    return x[first:], passes, columns


class Step:
    """One step: logits [V], proposed token and distribution [V] of each open position."""

    def __init__(
        self,
        config,
        x,
        first,
        lo,
        step,
        logits,
        memory,
        temperature,
        u,
        top_p=None,
        scores_the_draw=False,
    ):
        self.config, self.x, self.first, self.lo = config, x, first, lo
        self.step, self.memory = step, memory
        self.temperature, self.u = temperature, u
        self.top_p, self.scores_the_draw = top_p, scores_the_draw
        self.take(logits)

    def take(self, logits: dict[int, np.ndarray]) -> None:
        self.logits, self.tokens, self.probs = logits, {}, {}
        for i, row in logits.items():
            self.tokens[i], drawn_from = sample(
                row, self.temperature, self.top_p, None, self.u[0, i - self.first]
            )
            self.probs[i] = drawn_from if self.scores_the_draw else softmax(row)
        self.confidence = {i: p[self.tokens[i]] for i, p in self.probs.items()}
        self.entropy = {i: -(p * np.log(p + 1e-10)).sum() for i, p in self.probs.items()}

    def only(self, positions) -> dict[int, int]:
        return {i: self.tokens[i] for i in positions}


def threshold(value: float, k: int = 1):
    def rule(now: Step) -> dict[int, int]:
        sure = [i for i, c in now.confidence.items() if c >= value]
        return now.only({*sure, *best(now.confidence, k)})

    return rule


def confidence_threshold(value: float):
    return lambda now: now.only([now.lo]) if now.step == 0 else threshold(value)(now)


def factor(value: float):
    def rule(now: Step) -> dict[int, int]:
        order = best(now.confidence, len(now.confidence))
        n = 0
        while n < len(order) and (n + 2) * (1 - now.confidence[order[n]]) < value:
            n += 1
        return now.only(order[: max(n, 1)])

    return rule


def entropy_threshold(value: float):
    def rule(now: Step) -> dict[int, int]:
        return now.only(
            {
                min(now.entropy, key=now.entropy.get),
                *(i for i, h in now.entropy.items() if h <= value),
            }
        )

    return rule


def eb_sampler(gamma: float):
    def rule(now: Step) -> dict[int, int]:
        order = sorted(now.entropy, key=lambda i: (now.entropy[i], i))
        fits = [
            n
            for n in range(1, len(order) + 1)
            if bound([now.entropy[i] for i in order[:n]]) <= gamma
        ]
        return now.only(order[: max(fits)])

    return rule


def bound(entropies: list[float]) -> float:
    """Sum minus maximum: the paper's bound on the error of a joint commit."""
    return sum(entropies) - max(entropies) if len(entropies) > 1 else 0.0


def klass(value: float, kl_value: float, kl_history: int):
    def rule(now: Step) -> dict[int, int]:
        before, seen = now.memory.setdefault("probs", {}), now.memory.setdefault("divergences", {})
        ready = []
        for i in now.logits:
            p = softmax(now.logits[i])
            if i in before:
                kl = (p * (np.log(p + 1e-12) - np.log(before[i] + 1e-12))).sum()
                seen.setdefault(i, []).append(kl)
            before[i] = p
            history = seen.get(i, [])[-kl_history:]
            if len(history) == kl_history and max(history) < kl_value and now.confidence[i] > value:
                ready.append(i)
        return now.only(ready or best(now.confidence, 1))

    return rule


def credit(value: float, credit_weight: float, credit_decay: float, credit_power: float):
    def rule(now: Step) -> dict[int, int]:
        raised = {}
        for i, row in now.logits.items():
            p = softmax(row)
            account = now.memory.setdefault(i, {})
            for token in account:
                account[token] *= credit_decay
            top = int(p.argmax())
            account[top] = account.get(top, 0.0) + p[top] ** credit_power
            raised[i] = row.copy()
            for token, c in account.items():
                raised[i][token] += credit_weight * np.log(1 + c)
        now.take(raised)
        return threshold(value)(now)

    return rule


def certainty(sigma: float, k: int = 1):
    """With d2Cache's density: the left is known, the right is like the last position."""

    def rule(now: Step) -> dict[int, int]:
        canvas = [token != now.config.mask_id for token in now.x[now.first :]]
        n = len(canvas)
        scores = {}
        for i, c in now.confidence.items():
            near = np.exp(-((i - now.first - np.arange(-n, 2 * n)) ** 2) / (2 * sigma**2))
            known = [True] * n + canvas + [canvas[-1]] * n
            scores[i] = c * near[known].sum() / near.sum()
        return now.only(best(scores, k))

    return rule


# ---- left to right, with a window and a verifier


def onward(
    model,
    prompt: list[int],
    gen_length: int,
    kv_window: int | None = None,
    max_lookahead: int | None = None,
    block_length: int | None = None,
):
    """(canvas, first open column, step, logits [n, V] within the lookahead) of each forward pass.

    The consumer commits.
    """
    mask, x = model.config.mask_id, list(prompt) + [model.config.mask_id] * gen_length
    cache, size = model.new_cache(), block_length or gen_length
    cache.add(len(x))
    step = before = block = 0
    while mask in x:
        first = x.index(mask)
        if (first - len(prompt)) // size > block:
            block, step = (first - len(prompt)) // size, 0
        end = len(x) if max_lookahead is None else min(len(x), first + max_lookahead)
        a = (
            0
            if kv_window is None or step == 0
            else max(0, first - kv_window - (first - before) + 1)
        )
        rows = torch.arange(first - a, min(end, len(prompt) + (block + 1) * size) - a)
        logits = model.predict(torch.tensor(x[a:end]), [(a, end, end)], rows, cache)
        before = first
        yield x, first, block * size + step, logits.double().numpy()
        step += 1


def apd(
    model,
    verifier,
    prompt: list[int],
    gen_length: int,
    weight: float,
    seed: int = 0,
    temperature: float = 0.0,
    top_p=None,
    top_k=None,
    released: bool = False,
    k: int = 1,
    **sight,
) -> tuple[list[int], list[int]]:
    """Ids and accepted counts, by algorithm 1 of the paper or by the released code.

    The verifier has no cache.
    """
    from decoding.verifier import gumbels

    accepted = []
    for x, first, step, logits in onward(model, prompt, gen_length, **sight):
        n, noise = len(logits), np.zeros_like(logits)
        if temperature:
            noise = gumbels(
                [noise_key(seed, step, first + j) for j in range(n)],
                logits.shape[1],
                torch.device("cpu"),
            ).numpy()
        drafts = []
        for j in range(n):
            scaled = nucleus(logits[j] / temperature, top_p, top_k) if temperature else logits[j]
            drafts.append(
                int((scaled / (temperature if released and temperature else 1) + noise[j]).argmax())
            )
        read = [t if t < verifier.config.vocab_size else 0 for t in x[:first] + drafts]
        with torch.inference_mode():
            expected = verifier.logits(torch.tensor([read]))[0].double().numpy()
        taken = 0
        for j, token in enumerate(drafts):
            both = min(logits.shape[1], expected.shape[1])
            mine, theirs = (
                np.log(softmax(row), where=row > -np.inf, out=np.full_like(row, -np.inf))
                for row in (logits[j], expected[first + j - 1])
            )
            with np.errstate(invalid="ignore"):
                mixed = weight * mine[:both] + (1 - weight) * theirs[:both]
            mixed[np.isneginf(mine[:both])] = -np.inf
            if temperature and not released:
                mixed = mixed / temperature + noise[j][:both]
            if j >= k and mixed.argmax() != token:
                break
            taken += 1
        x[first : first + taken] = drafts[:taken]
        accepted.append(taken)
        if model.config.eos_id in x[len(prompt) :]:
            break
    return x[len(prompt) :], accepted


def noise_key(seed: int, step: int, column: int) -> int:
    """The noise key of a drafted position. The oracle shares it, and the noise, with the engine."""
    from decoding.sampling import scrambled

    return scrambled(scrambled(seed, step), column)


def leftright_within(
    model, prompt: list[int], gen_length: int, tokens_per_step: int, **sight
) -> list[int]:
    """`leftright` at temperature 0 with a window and a lookahead."""
    for x, first, _, logits in onward(model, prompt, gen_length, **sight):
        x[first : first + tokens_per_step] = logits[:tokens_per_step].argmax(-1).tolist()
        if model.config.eos_id in x[len(prompt) :]:
            break
    return x[len(prompt) :]
