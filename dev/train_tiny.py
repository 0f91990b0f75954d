#!/usr/bin/env python3
"""Train a tiny masked-diffusion or causal model on the mini benchmarks.

    python dev/train_tiny.py --family llada --out assets/tiny-llada
    python dev/train_tiny.py --family dream --out assets/tiny-dream
    python dev/train_tiny.py --family qwen2 --out assets/tiny-qwen

The checkpoint is written in the hub's layout. Training problems come from
make_benchmarks.problems(task, "train", seed), which never yields a key of the test set. The prompt
is the one that eval.py gives: the task's chat form in the checkpoint's chat template. The answer
follows, then the family's end tokens up to the end of the canvas. Questions of multiple choice
have no chat template, and nothing follows their answer.

The objective is LLaDA's (arXiv:2502.09992, algorithm 2): a share t of the canvas, uniform in
(0, 1], is masked, and the cross entropy of the masked tokens is weighted by 1/t. Dream's logits are
shifted by one column. The causal model (qwen2) is the verifier of tiny-dream: it has tiny-dream's
tokenizer, learns the next token of the whole canvas, is smaller and takes a sixth of the steps.

The state is kept in results/train/; the same command resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from dev import tiny_checkpoint  # noqa: E402
from dev.make_benchmarks import KEYS, Problem, problems, word_problem  # noqa: E402
from models import ModelConfig, Transformer, load_tokenizer, read_config  # noqa: E402

LARGER = {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_kv_heads": 4, "d_ff": 352}
SHAPES = {
    "llada": LARGER,
    "dream": LARGER,
    "qwen2": {"n_layers": 3, "d_model": 96, "n_heads": 4, "n_kv_heads": 2, "d_ff": 144},
}
CANVAS = 24
STEPS = 40_000  # of the schedule
PACE = {"llada": 1, "dream": 1, "qwen2": 6}  # steps of the schedule per training step
HARDER = 11_000  # word problems are SMALL before this step of the schedule, then LARGE
SMALL = partial(word_problem, most=30, start=20, change=9, factor=5)
LARGE = partial(word_problem, most=99, start=60, change=12, factor=9)
COMMAS = 4000  # before this step of the schedule waiting lines have no commas: places come first
AGAIN = 22_000  # a second round begins: a new optimizer, a high learning rate, more waiting lines
# Weights of the tasks before steps TURN, HARDER and AGAIN of the schedule, and then. Arithmetic and
# waiting lines take longest.
SHARES = dict(gsm8k=6, humaneval=3, mbpp=3, truthfulqa=2, lines=8, arc_easy=1, arc_challenge=1)
LATER = dict(gsm8k=12, humaneval=2, mbpp=2, truthfulqa=2, lines=4, arc_easy=1, arc_challenge=1)
LAST = dict(gsm8k=12, humaneval=2, mbpp=2, truthfulqa=3, lines=8, arc_easy=1, arc_challenge=1)
ROUND = dict(gsm8k=10, humaneval=1, mbpp=1, truthfulqa=2, lines=18, arc_easy=0.4, arc_challenge=0.4)
TURN = 5000
RATE = 3e-3
MICRO = 16  # sequences of similar length that go through the model together
# The token after an answer; <|endoftext|> fills the rest of the canvas.
END = {"llada": "<|eot_id|>", "dream": "<|im_end|>", "qwen2": "<|im_end|>"}


# ---------------------------------------------------------------- training examples


class Prompts:
    """The user's message for a row of a benchmark, made by the evaluation's own templates."""

    def __init__(self) -> None:
        from eval import TASKS, get_prompt_template
        from tasks import build_task

        self.tasks = {}
        for task in SHARES.keys() - KEYS:
            template, forms = get_prompt_template("llada", task), TASKS[task].forms
            form = next(name for name, form in forms.items() if form is template)
            self.tasks[task] = build_task(TASKS[task], ROOT / "assets" / "benchmarks", form)
        self._compiled: dict[str, object] = {}

    def message(self, task: str, row: dict) -> str:
        """lm-eval's doc_to_text of a row of the benchmark's file."""
        if task in KEYS:
            return f"Question: {row['question']}\nAnswer:"
        if task not in self._compiled:
            from lm_eval.utils import env

            self._compiled[task] = env.from_string(self.tasks[task].config.doc_to_text)
        fields = {k.lower().replace(" ", "_"): v for k, v in row.items()}
        return self._compiled[task].render(**fields)

    def phrases(self) -> list[str]:
        """The fixed wording of the prompts: the common beginning and end of a task's messages."""
        found = ["You are a helpful assistant.", " Your code should pass these tests:\n\n"]
        for task in SHARES:
            texts = [self.message(task, p.row) for p in islice(problems(task, "train", 0), 300)]
            found.append(os.path.commonprefix(texts))
            found.append(os.path.commonprefix([t[::-1] for t in texts])[::-1])
        # The tokenizer gives a space to the word after it.
        return [phrase.rstrip(" ") for phrase in found if len(phrase) > 12]


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    canvas: list[int]  # at most CANVAS tokens


class Lessons:
    """The training examples of each step. They depend on the seed and the step alone."""

    def __init__(self, family: str, tokenizer, prompts: Prompts, args: argparse.Namespace) -> None:
        self.tokenizer, self.prompts, self.args = tokenizer, prompts, args
        self.pace = PACE[family]
        self.end, self.pad = tokenizer.convert_tokens_to_ids([END[family], "<|endoftext|>"])

    def __call__(self, step: int) -> list[list[Example]]:
        """The args.batch examples of a step, in groups of MICRO examples of similar length."""
        seed = f"{self.args.seed} {step}"
        at = step * self.pace
        draw = {"gsm8k": SMALL if at < HARDER else LARGE}
        streams = {task: problems(task, "train", seed, draw.get(task)) for task in SHARES}
        ends = {TURN: SHARES, HARDER: LATER, AGAIN: LAST, STEPS: ROUND}
        shares = next(shares for end, shares in ends.items() if at < end)
        tasks = random.Random(seed).choices(list(shares), list(shares.values()), k=self.args.batch)
        found = [self.example(task, next(streams[task]), at >= COMMAS) for task in tasks]
        found.sort(key=lambda example: len(example.prompt))
        return [found[i : i + MICRO] for i in range(0, len(found), MICRO)]

    def example(self, task: str, problem: Problem, commas: bool = True) -> Example:
        text, answer = self.prompts.message(task, problem.row), problem.answer
        if task not in KEYS:
            chat = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        if task == "lines" and not commas:
            answer = answer.replace(",", "")
        prompt, ids = self.tokenizer([text, answer], add_special_tokens=False)["input_ids"]
        if task in KEYS:
            return Example(prompt, ids)
        assert len(ids) < CANVAS, f"no room for an end token: {answer}"
        return Example(prompt, ids + [self.end] + [self.pad] * (CANVAS - len(ids) - 1))


# ---------------------------------------------------------------- the model, with gradients


def hidden(model: Transformer, ids: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hidden states [B, L, D] before the last norm: the transformer on padded rows, with gradients.

    ids:      [B, L]
    bias:     [B or 1, 1, L or 1, L], added to the attention scores: -inf hides a column
    cos, sin: [L, E]
    """
    c = model.config
    heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

    x = model.embed(ids)
    for layer in model.layers:
        h = F.rms_norm(x, (c.d_model,), layer.attn_norm.weight, c.norm_eps)
        q, k, v = layer.qkv(h).unflatten(-1, (-1, c.head_dim)).transpose(1, 2).split(heads, 1)
        if c.n_kv_heads < c.n_heads:
            k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (k, v))
        # not the fused kernel: on a CPU its backward pass takes six times as long
        score = (rotate(q) @ rotate(k).mT) * c.head_dim**-0.5 + bias
        mixed = score.softmax(-1).to(v.dtype) @ v
        x = x + layer.o(mixed.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, (c.d_model,), layer.mlp_norm.weight, c.norm_eps)
        gate, up = layer.gate_up(h).chunk(2, -1)
        x = x + layer.down(F.silu(gate) * up)
    return x


def angles(config: ModelConfig, length: int, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, E] of the rotary embedding."""
    steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angle = torch.outer(torch.arange(length).float(), config.rope_theta**-steps).repeat(1, 2)
    return angle.cos().to(device), angle.sin().to(device)


def logits_at(
    model: Transformer, trunk, ids: Tensor, bias: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Logits [R, V] that predict the tokens at (row, column), both [R], of ids [B, L]."""
    c = model.config
    x = trunk(model, ids, bias, *angles(c, ids.shape[1], ids.device))
    x = x[row, column - 1 if c.shift else column]
    head = model.embed if c.tie_embeddings else model.head
    return F.linear(F.rms_norm(x, (c.d_model,), model.norm.weight, c.norm_eps), head.weight).float()


def canvas_loss(
    model: Transformer, trunk, group: list[Example], share: Tensor, rng: torch.Generator, device
) -> Tensor:
    """Cross entropy per canvas token, a scalar.

    share: [B], the masked share t of each row. A causal model ignores it: its loss covers every
    token, given the tokens before it.
    """
    c, B = model.config, len(group)
    sequences = [torch.tensor(e.prompt + e.canvas) for e in group]
    length = -(-max(map(len, sequences)) // 8) * 8
    ids = torch.full((B, length), c.eos_id)
    bias = torch.full((B, 1, 1, length), -torch.inf)
    start, size = torch.tensor([[len(e.prompt), len(e.canvas)] for e in group]).T
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        bias[i, ..., : len(sequence)] = 0
    if c.causal:
        bias = torch.full((1, 1, length, length), -torch.inf).triu(1)
        share = torch.ones(B)
    hide = torch.rand(B, CANVAS, generator=rng) < share[:, None]
    hide &= torch.arange(CANVAS) < size[:, None]
    row, offset = hide.nonzero(as_tuple=True)
    column = start[row] + offset
    target = ids[row, column]
    if not c.causal:
        ids[row, column] = c.mask_id
    weight = 1 / share[row]
    ids, bias, row, column, target, weight = (
        t.to(device) for t in (ids, bias, row, column, target, weight)
    )
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        logits = logits_at(model, trunk, ids, bias, row, column)
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / (B * CANVAS)


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with mimetic initialisation (arXiv:2305.09828).

    From these weights the model soon learns to copy from the prompt; from random ones it takes
    hours. Keys begin as queries, so that a head attends to tokens like its own, and the output
    projection as the transpose of the value projection, so that the head passes them on. The output
    head begins as the embedding, scaled; where the two are tied, the last norm is scaled instead.
    Coordinate 0 of every embedding is a constant. With it the first two heads attend to the next
    position on the left and on the right. In a causal model the query heads of the first key head
    attend to the first, second, ... position on the left.
    """
    torch.manual_seed(seed)
    model, d, e = Transformer(config), config.d_model, config.head_dim
    shared = config.n_heads // config.n_kv_heads  # query heads of one key head
    frequency = config.rope_theta ** -(torch.arange(0, e, 2).float() / e)
    neighbour = 1.3 * (frequency > 0.05)  # only high frequencies differ between neighbours
    with torch.no_grad():
        tensors = model.weights()
        for name, p in tensors.items():
            if name.endswith((".down.weight", ".bias")):
                p.zero_()
            elif p.ndim == 2:
                p.normal_(std=d**-0.5)
        words = F.pad(F.normalize(torch.randn(config.vocab_size, d - 1), dim=1) * d**0.5, (1, 0))
        if config.tie_embeddings:
            model.norm.weight.fill_(0.05)
        else:
            model.head.weight.copy_(0.05 * words)
        words[:, 0] = 5
        model.embed.weight.copy_(words)
        for n in range(config.n_layers):
            q, k, v, o = (tensors[f"layers.{n}.{name}.weight"] for name in "qkvo")
            turned = torch.linalg.qr(torch.randn(d, d))[0]
            k.copy_(q.unflatten(0, (-1, shared, e)).sum(1).flatten(0, 1) / shared**0.5)
            v.copy_(turned[: len(v)])
            o.copy_(0.5 * v.unflatten(0, (-1, e)).repeat_interleave(shared, 0).flatten(0, 1).T)
        q, k, o = (tensors[f"layers.0.{name}.weight"] for name in "qko")
        elsewhere = torch.linalg.qr(torch.randn(d, d))[0]
        # (query head, key head, query's rotation, key's rotation): the head attends to the column
        # that lies (key's rotation - query's rotation) columns to the left.
        turned_heads = [(0, 0, 0, 1), (1, 1, 0, -1)]
        if config.causal:
            turned_heads = [(h, 0, -h, 1) for h in range(shared)]
        for head, key_head, turn_q, turn_k in turned_heads:
            for weight, h, turn in ((q, head, turn_q), (k, key_head, turn_k)):
                rows = slice(h * e, h * e + e)
                weight[rows] = 0
                angle = turn * frequency
                weight[rows, 0] = torch.cat([neighbour * angle.cos(), neighbour * angle.sin()])
            rows = slice(head * e, head * e + e)
            o[:, rows] = elsewhere[:, rows]
    return model


# ---------------------------------------------------------------- training


def rate(at: int) -> float:
    """Share of the full learning rate at a step of the schedule.

    A short warm-up, a plateau, a fall until HARDER, and one for the harder problems. From AGAIN a
    warm-up, a plateau and a fall.
    """
    if at >= AGAIN:
        return min((at - AGAIN + 1) / 200, 0.6, 1.2 * (STEPS - at) / (STEPS - AGAIN))
    if at >= HARDER:
        return 0.4 * (AGAIN - at) / (AGAIN - HARDER)
    return min((at + 1) / 100, float(np.interp(at, [TURN, HARDER], [1, 0.1])))


def prepare(family: str, folder: Path, prompts: Prompts) -> None:
    """Write the tokenizer's files and config.json."""
    if family == "qwen2":
        n_tokens = tiny_checkpoint.copy_tokenizer(ROOT / "assets" / "tiny-dream", folder)
        tiny_checkpoint.write_config(folder, family, n_tokens, SHAPES[family])
        return
    texts = []
    for task in SHARES:
        for p in islice(problems(task, "train", 0), 4000):
            texts += [prompts.message(task, p.row), p.answer]
    phrases = prompts.phrases()
    # Words that occur only inside a phrase need no token.
    for phrase in sorted(phrases, key=len, reverse=True):
        texts = [text.replace(phrase, "\n") for text in texts]
    texts += ["user", "assistant", "system", "\n\n"]
    n_tokens = tiny_checkpoint.write_tokenizer(folder, family, texts, phrases)
    tiny_checkpoint.write_config(folder, family, n_tokens, SHAPES[family])


def save(path: Path, state: dict) -> None:
    """Write the state atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(args: argparse.Namespace) -> None:
    """Train for args.steps steps, from the saved state if there is one; write the checkpoint."""
    prompts = Prompts()
    if not (args.out / "config.json").exists():
        prepare(args.family, args.out, prompts)
    config, tokenizer = read_config(args.out), load_tokenizer(args.out)
    lessons = Lessons(args.family, tokenizer, prompts, args)
    model = new_model(config, args.seed).to(args.device)
    new_optimizer = partial(
        torch.optim.AdamW, [*model.parameters()], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    optimizer = new_optimizer()
    done, of = 0, [args.batch, args.seed, sha256(repr(lessons(0)).encode()).hexdigest()]
    state_file = args.state or ROOT / "results" / "train" / f"{args.family}-{args.out.name}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["of"] != of:
            sys.exit(
                f"error: {state_file} was written with --batch {state['of'][0]}, --seed "
                f"{state['of'][1]}, or with other problems; give the same, or delete the file"
            )
        done = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["stepper"])
        print(f"resuming at step {done}", flush=True)
    trunk = torch.compile(hidden, dynamic=True) if args.compile else hidden
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, vocabulary {config.vocab_size}", flush=True)
    begin, mean = time.perf_counter(), None
    pace = PACE[args.family]
    args.steps = min(args.steps, STEPS // pace)
    for step in range(done, args.steps):
        if step == AGAIN // pace:
            optimizer = new_optimizer()
        rng = torch.Generator().manual_seed(args.seed * STEPS + step)
        # A step's t are spread evenly over (0, 1], which lowers the variance of the loss.
        order, offset = torch.randperm(args.batch, generator=rng), torch.rand(1, generator=rng)
        share = ((order + offset) / args.batch).clamp(1e-3)
        loss = 0.0
        for group, t in zip(lessons(step), share.split(MICRO), strict=True):
            part = canvas_loss(model, trunk, group, t, rng, args.device) * len(group) / args.batch
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * rate(step * pace)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        n = step + 1
        if n % args.log_every == 0 or n == args.steps:
            left = (time.perf_counter() - begin) / (n - done) * (args.steps - n)
            print(f"step {n}/{args.steps}  loss {mean:.4f}  {left / 60:.1f} min left", flush=True)
        if n % args.save_every == 0 or n == args.steps:
            weights, moments = model.state_dict(), optimizer.state_dict()
            save(state_file, {"of": of, "step": n, "model": weights, "stepper": moments})
            if args.export:
                export(args.export, args.out, config, model)
    tiny_checkpoint.write_weights(args.out, config, model.weights())


def export(folder: Path, source: Path, config: ModelConfig, model: Transformer) -> None:
    """Write the checkpoint as it is now to another directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.*"):
        if path.suffix in (".json", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    tiny_checkpoint.write_weights(folder, config, model.weights())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", required=True, choices=tuple(END))
    add("--out", required=True, type=Path, help="checkpoint directory to write")
    add(
        "--steps",
        type=int,
        default=STEPS,
        help=f"stop after this many steps (default: all, {STEPS}; qwen2 a sixth of them)",
    )
    add("--batch", type=int, default=32, help=f"sequences per step, a multiple of {MICRO}")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile; on a CPU it needs a C++ compiler")
    add("--state", type=Path, help="file of the state (default: one in results/train/)")
    add("--export", type=Path, help="directory that gets the weights whenever the state is saved")
    add("--log_every", type=int, default=250, help="steps between two lines (default: %(default)s)")
    add(
        "--save_every",
        type=int,
        default=1000,
        help="steps between two saves (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
