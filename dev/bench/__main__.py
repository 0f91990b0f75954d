#!/usr/bin/env python3
"""Measure how much faster the engine decodes the same tokens than the official loop.

    python -m dev.bench --preset cpu-small
    python -m dev.bench --preset llada-8b --device cuda
    python -m dev.bench --preset likelihood --rounds 1      see dev/bench/likelihood.py

Weights are random. Each round runs the reference (the official algorithm: all logits, float64
confidence, no early exit, batch 1), then the engine in every regime, then the reference again,
which shows the noise. Ratios are of processor time on a CPU and of wall time on a GPU.

Different tokens end the script with exit code 1. Two cases only count them: --compile, and dtypes
below float32 on a GPU, where another batch shape may take another kernel and random weights turn a
different last bit into a different answer.

"of matmul" is the arithmetic done, over the time taken, relative to the rate of a large matrix
product. "of floor" is the time that arithmetic and memory need at the rates measured in the same
round, over the time taken.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import atomic_write_json, environment, output_problem  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = "cpu-small, cpu-vocab, cpu-dream, llada-8b, dream-7b, tiny, tiny-dream, likelihood"
    add("--preset", required=True, help=names)
    add("--device", help="cpu or cuda (default: the preset's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the preset's")
    add("--rounds", type=int, default=3, help="number of rounds (default 3)")
    add("--only", help="run only regimes whose names contain this text")
    add(
        "--answer_fraction",
        type=float,
        help="place the end token at this fraction of the canvas, in regimes with early exit",
    )
    add("--prompts", type=int, help="prompts per round (default: the preset's)")
    add("--batch_size", type=int, help="rows in flight (default: all prompts of a round)")
    add("--gen_length", type=int, help="default: the preset's")
    add("--tokens_per_step", type=int, help="default: the preset's")
    add("--compile", action="store_true", help="compile the layers; different tokens are no error")
    add("--cuda_graphs", action="store_true", help="replay CUDA graphs in the engine")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file (default: results/bench/<preset>.json)")
    return parser.parse_args(argv)


def problems_of(args: argparse.Namespace, presets: dict) -> list[str]:
    """One line for each argument that cannot be used. Fills in the default of --out."""
    found = [
        f"--{name} {value} must be at least 1"
        for name in ("rounds", "prompts", "batch_size", "gen_length", "tokens_per_step", "threads")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if args.preset not in presets:
        return [*found, f"--preset {args.preset!r}; there are: {', '.join(presets)}"]
    if args.answer_fraction is not None and not 0 < args.answer_fraction <= 1:
        found.append(f"--answer_fraction {args.answer_fraction:g} must be above 0 and at most 1")
    if args.device is not None and args.device.partition(":")[0] not in ("cpu", "cuda"):
        found.append(f"--device {args.device!r}; there are: cpu, cuda")
    names = [r.name for r in presets[args.preset].regimes] + ["sampler"]
    if args.only and not any(args.only in name for name in names):
        found.append(f"--only {args.only!r}; regimes: {', '.join(names)}")
    blocks = [r.block for r in presets[args.preset].regimes if r.block]
    if args.gen_length and any(args.gen_length % b for b in blocks):
        found.append(
            f"--gen_length {args.gen_length} is not a multiple of block_length {blocks[0]}"
        )
    if args.out is None:
        args.out = Path("results") / "bench" / f"{args.preset}.json"
    if problem := output_problem(args.out.parent):
        found.append(problem.replace("--output_dir", "--out"))
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch
    from tqdm import tqdm

    from dev.bench.presets import PRESETS, Regime, random_model, random_prompts
    from dev.bench.reference import Plain
    from dev.bench.rounds import Line, run_round, sampler_round

    if args.preset == "likelihood":
        return likelihood(args)
    if problems := problems_of(args, PRESETS):
        print("\n".join(f"error: {p}" for p in problems), file=sys.stderr)
        return 2
    preset = PRESETS[args.preset]
    device = torch.device(args.device or ("cuda" if preset.gpu else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"error: --device {device}: no CUDA device is visible; "
            "the presets for a CPU are cpu-small, cpu-vocab and cpu-dream",
            file=sys.stderr,
        )
        return 3
    torch.set_num_threads(args.threads)
    changes = {k: v for k in ("gen_length", "tokens_per_step", "dtype") if (v := getattr(args, k))}
    preset = replace(preset, **changes, batch=args.prompts or preset.batch)
    regimes = [
        replace(r, batch=None if args.prompts else r.batch)
        for r in preset.regimes
        if not args.only or args.only in r.name
    ]
    if at := args.answer_fraction:
        regimes = [
            replace(r, name=f"{r.algorithm}, exit at {at:g}", answer=at, needed=None)
            if r.answer
            else r
            for r in regimes
        ]
    lines, sampler = [Line(r) for r in regimes], []
    if preset.sampler is not None and (args.only or "sampler") in "sampler":
        sampler = [Line(Regime("sampler, top_p 0.95", "", needed=preset.sampler or None))]
    model = random_model(preset.config, str(device), preset.dtype, args.seed)
    if args.compile or args.cuda_graphs:
        model.accelerate(
            compile=args.compile,
            cuda_graphs=args.cuda_graphs,
            tell=lambda text: print(text, file=sys.stderr),
        )
    plain = Plain(model)
    n_references = len({(r.algorithm, r.block) for r in regimes}) + bool(regimes)
    n_runs = args.rounds * (n_references + len(regimes) + len(sampler))
    with tqdm(total=n_runs, desc=args.preset, unit="run", dynamic_ncols=True) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        _warm_up(preset, model, plain, random_prompts)
        distinct = min(preset.distinct or preset.batch, preset.batch)
        for i in range(args.rounds):
            prompts = random_prompts(preset.config, distinct, preset.prompt, args.seed + 100 * i)
            if lines:
                run_round(
                    preset, model, plain, prompts, lines, args.batch_size, args.seed + i, step
                )
            for line in sampler:
                step(line.regime.name)
                sampler_round(line, preset.config.vocab_size, device, model.dtype, args.seed + i)
    found = [line.summary() for line in [*lines, *sampler]]
    print(report(args.preset, found))
    atomic_write_json(
        args.out,
        {
            "preset": args.preset,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": preset.dtype,
            "prompt": preset.prompt,
            "gen_length": preset.gen_length,
            "tokens_per_step": preset.tokens_per_step,
            "prompts_a_round": preset.batch,
            "distinct_prompts": distinct,
            "regimes": found,
            "environment": environment(),
        },
    )
    print(f"-> {args.out}")
    exact = device.type == "cpu" or preset.dtype == "float32"
    return int(not args.compile and any(line.differ for line in (lines if exact else []) + sampler))


def likelihood(args: argparse.Namespace) -> int:
    """100 questions (--prompts) of four options; exit code 1 where log-likelihoods differ."""
    import torch

    from dev.bench.likelihood import BATCH, QUESTIONS, compare, report

    unused = ("only", "answer_fraction", "gen_length", "tokens_per_step", "compile", "cuda_graphs")
    problems = [f"--{n} has no meaning for likelihood" for n in unused if getattr(args, n)]
    counts = {n: getattr(args, n) for n in ("rounds", "prompts", "batch_size", "threads")}
    problems += [
        f"--{n} {v} must be at least 1" for n, v in counts.items() if v is not None and v < 1
    ]
    out = args.out or Path("results") / "bench" / "likelihood.json"
    if problem := output_problem(out.parent):
        problems.append(problem.replace("--output_dir", "--out"))
    if problems:
        print("\n".join(f"error: {p}" for p in problems), file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    n, rows = args.prompts or QUESTIONS, args.batch_size or BATCH
    dtype = args.dtype or "float32"
    found = compare(n, args.rounds, args.device or "cpu", dtype, rows, args.seed)
    print(report(found))
    atomic_write_json(out, found | {"environment": environment()})
    print(f"-> {out}")
    return int(not found["equal"])


def _warm_up(preset, model, plain, random_prompts) -> None:
    """One forward pass of each, so that no measurement contains a first call."""
    import torch

    [prompt] = random_prompts(preset.config, 1, preset.prompt + preset.gen_length, 1)
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        plain(ids)
        model.predict(ids[0], [(0, len(prompt), len(prompt))], torch.arange(32))


COLUMNS = (
    "regime,ratio,lowest,highest,needed,tok/s,reference,TPF,of matmul,of floor,"
    "peak MiB,reference,tokens"
).split(",")


def report(name: str, found: list[dict[str, Any]]) -> str:
    """The table of the regimes, as text."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    def mib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.0f}"

    def tokens(f: dict[str, Any]) -> str:
        if f["samples_that_differ"]:
            return f"{f['samples_that_differ']} of {f['samples']} DIFFER"
        return "equal" if f["samples"] else "-"

    rows = [COLUMNS]
    for f in found:
        rows.append(
            [
                f["regime"] + (f", {f['batch']} prompts" if f["batch"] else ""),
                number(f["ratio"]),
                number(min(f["ratios"])),
                number(max(f["ratios"])),
                number(f["needed"]),
                number(f["tokens_per_second"], ".1f"),
                number(f["reference_tokens_per_second"], ".1f"),
                number(f["tpf"]),
                number(f["share_of_matmul"]),
                number(f["share_of_floor"]),
                mib(f["peak_bytes"]),
                mib(f["reference_peak_bytes"]),
                tokens(f),
            ]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = [name]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    noise = [n for f in found for n in f["noise"]]
    lines.append(f"reference over itself: {min(noise):.3f} to {max(noise):.3f}" if noise else "")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
