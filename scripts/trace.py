#!/usr/bin/env python3
"""Replay cases on a checkpoint: which token was committed when, or the likelihood of a text.

    python scripts/trace.py --checkpoint DIR --cases cases.jsonl --out trace.jsonl

Each line is one case, a JSON object with

    {"id": "any name", "algorithm": "low_confidence", "prompt_ids": [1, 2, 3],
     "params": {"gen_length": 32, "block_length": 16, "tokens_per_step": 2, "temperature": 0.0}}

params may also hold the decoding flags of eval.py, such as "kv_cache" (or "cache"),
"cache_refresh", "kv_window" and "max_lookahead", the algorithm's own options, and "seed".
Algorithms that draft (`apd`) need --verifier_ckpt. Fast-dLLM's names are known: `low_confidence` or
`maskgit_plus` with a "threshold" or a "factor" means the algorithm `threshold` or `factor`.

For each case, in the order of the file, one line is written:

    {"id": "any name", "ids": [...], "forward_passes": 16, "commits": [[[positions], [ids]], ...]}

`commits` has one entry for each forward pass; positions count from the end of the prompt. Positions
that early exit left open hold the mask id. Two machines agree if their files are equal.

A likelihood case has recorded draws (batches of rows; none where nothing is drawn):

    {"id": "any name", "estimator": "llada_mc", "prefix_ids": [1, 2], "target_ids": [3, 4],
     "params": {"cfg_scale": 0.5}, "batches": [[{"masked": [0], "p_mask": 0.5}, ...], ...]}

Its estimator is one of eval.py's --likelihood, illada_mc or illada_confidence; its params may also
be those of the official code. Its line is

    {"id": "any name", "loglikelihood": -4.2, "rows": 3, "is_greedy": false, "order": null}

with the order in which `confidence` revealed the target. As in Dream's code, is_greedy is false
for the estimators of Dream.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # without lm_eval.py

from decoding.algorithms import ALGORITHMS, algorithm_options  # noqa: E402
from decoding.config import DecodeConfig  # noqa: E402
from decoding.likelihood import (  # noqa: E402
    ESTIMATORS,
    LikelihoodConfig,
    Mask,
    Target,
    likelihoods_each,
    merged,
)
from decoding.option import options_in  # noqa: E402
from decoding.schedule import Schedule, ScheduleError, make_schedule  # noqa: E402
from models import FAMILIES  # noqa: E402
from utils import file_bytes  # noqa: E402

SCHEDULE_PARAMS = tuple(name for name in options_in(Schedule) if name != "algorithm")
DECODE_PARAMS = tuple(name for name in options_in(DecodeConfig) if name != "early_exit")
# of likelihood cases; all but four describe what the recorded ids and draws already hold
LIKELIHOOD_PARAMS = (
    "cfg_scale classifier_free_guidance mask_id padd_eos "
    "mc_num batch_size eos_id add_bos_token sampling_eps log_type nll_type max_length "
    "tokenised_apart"
).split()
AS_HERE = {"illada_mc": "llada_mc", "illada_confidence": "confidence"}


def known_params() -> tuple[str, ...]:
    """Names that the params of a case may hold. `seed` is an integer, 0 if it is left out."""
    return (*SCHEDULE_PARAMS, *DECODE_PARAMS, *algorithm_options(), "cache", "seed")


def named_as_here(algorithm: str, params: dict) -> tuple[str, dict]:
    """Algorithm and params of a case, under this project's names."""
    if "cache" in params and "kv_cache" in params:
        raise ValueError("params cache and kv_cache are two names for one thing; give one")
    params = {"kv_cache" if name == "cache" else name: value for name, value in params.items()}
    rules = [rule for rule in ("threshold", "factor") if rule in params]
    return (
        rules[0]
        if algorithm in ("low_confidence", "maskgit_plus") and len(rules) == 1
        else algorithm
    ), params


def case_config(case: dict, family: str, early_exit: bool) -> DecodeConfig:
    """The decoding configuration of a case. Raises ValueError or ScheduleError if it is invalid."""
    if not isinstance(case, dict) or not {"algorithm", "prompt_ids", "params"} <= case.keys():
        raise ValueError('must be an object with "algorithm", "prompt_ids" and "params"')
    algorithm, params = named_as_here(case["algorithm"], case["params"])
    known = known_params()
    unknown = sorted(case["params"].keys() - set(known))
    if unknown:
        raise ValueError(f"unknown params {', '.join(unknown)}; known: {', '.join(known)}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; there are: {', '.join(ALGORITHMS)}")
    if "gen_length" not in params:
        raise ValueError("params need a gen_length")
    if not case["prompt_ids"] or not all(isinstance(i, int) for i in case["prompt_ids"]):
        raise ValueError("prompt_ids must be a list of token ids, not empty")
    schedule = make_schedule(algorithm, **{k: params[k] for k in SCHEDULE_PARAMS if k in params})
    given = tuple((name, params[name]) for name in algorithm_options() if name in params)
    options = {k: params[k] for k in DECODE_PARAMS if k in params}
    config = DecodeConfig(schedule, early_exit=early_exit, given=given, **options)
    problems = config.problems(family, FAMILIES[family].end_token_flags)
    if problems:
        raise ValueError("; ".join(problems))
    return config


def likelihood_target(case: dict, model) -> Target:
    """The target of a likelihood case, with the masks of its recorded draws.

    model: the checkpoint's ModelConfig. Raises ValueError where the case is invalid.
    """
    if not {"prefix_ids", "target_ids", "params"} <= case.keys():
        raise ValueError('a likelihood case needs "prefix_ids", "target_ids" and "params"')
    name, params = AS_HERE.get(case["estimator"], case["estimator"]), case["params"]
    if name not in ESTIMATORS:
        known = ", ".join([*ESTIMATORS, *AS_HERE])
        raise ValueError(f"unknown estimator {name!r}; there are: {known}")
    if unknown := sorted(params.keys() - set(LIKELIHOOD_PARAMS)):
        known = ", ".join(LIKELIHOOD_PARAMS)
        raise ValueError(f"unknown params {', '.join(unknown)}; known: {known}")
    if params.get("mask_id", model.mask_id) != model.mask_id:
        raise ValueError(f"mask_id {params['mask_id']} is not the checkpoint's {model.mask_id}")
    if params.get("log_type", "ftb") != "ftb":
        raise ValueError(f"log_type {params['log_type']!r} is not replayed; only ftb is")
    prefix, target, kind = case["prefix_ids"], case["target_ids"], ESTIMATORS[name]
    if not target or not all(isinstance(i, int) for i in (*prefix, *target)):
        raise ValueError("prefix_ids and target_ids must be lists of token ids, targets not empty")
    if kind.draw is None:
        masks = LikelihoodConfig(name).masks(len(target), seed=0)
    else:
        rows = [row for batch in case.get("batches") or [] for row in batch]
        if not rows or not all(
            {"masked", "p_mask"} <= row.keys() and row["p_mask"] for row in rows
        ):
            raise ValueError(f"{name} needs the recorded draws: batches of masked and p_mask")
        masks = merged(
            Mask(tuple(sorted(row["masked"])), 1 / row["p_mask"] / len(rows)) for row in rows
        )
        if any(not 0 <= i < len(target) for mask in masks for i in mask.hidden):
            raise ValueError(f"masked positions must be within the target of {len(target)} tokens")
    return Target(
        tuple(prefix),
        tuple(target),
        masks,
        tail=(model.eos_id,) if params.get("padd_eos") else (),
        greedy=not name.startswith("dream"),
        # in Dream's code guidance up to 1 is none
        cfg_scale=params.get("cfg_scale")
        or max(0.0, params.get("classifier_free_guidance", 1.0) - 1),
    )


def read_cases(path: Path) -> list[dict]:
    """The cases of a JSON-lines file. Raises ValueError if a line is not JSON or there is none."""
    cases = []
    for number, line in enumerate(file_bytes(path).decode().splitlines(), 1):
        if line.strip():
            try:
                cases.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from None
    if not cases:
        raise ValueError(f"{path} holds no cases")
    return cases


def drafts(config: DecodeConfig | Target) -> bool:
    """Whether the algorithm of a configuration needs a verifier."""
    return (
        isinstance(config, DecodeConfig)
        and ALGORITHMS[config.schedule.algorithm].verification is not None
    )


def replay(
    model,
    cases: list[dict],
    configs: list[DecodeConfig | Target],
    batch_size: int = 1,
    verifier=None,
) -> list[dict]:
    """Trace rows of the cases, in their order.

    configs: of a decoding case its configuration, of a likelihood case its target. Cases with equal
    configurations share batches of `batch_size` rows.
    """
    from decoding.engine import decode

    groups: dict[DecodeConfig, list[int]] = {}
    rows: list[dict | None] = [None] * len(cases)
    targets = {i: config for i, config in enumerate(configs) if isinstance(config, Target)}
    members = list(targets)
    for n, found in likelihoods_each(model, targets.values(), batch_size):
        i = members[n]
        rows[i] = {
            "id": cases[i].get("id", i),
            "loglikelihood": found.loglikelihood,
            "rows": found.rows,
            "is_greedy": bool(found.is_greedy),
            "order": list(found.order) or None,
        }
    for i, config in enumerate(configs):
        if i not in targets:
            groups.setdefault(config, []).append(i)
    for config, members in groups.items():
        prompts = [cases[i]["prompt_ids"] for i in members]
        seeds = [cases[i]["params"].get("seed", 0) for i in members]
        checker = verifier if drafts(config) else None
        done = decode(model, prompts, config, seeds, batch_size=batch_size, verifier=checker)
        for i, completion in zip(members, done):
            rows[i] = {
                "id": cases[i].get("id", i),
                "ids": list(completion.token_ids),
                "forward_passes": completion.nfe,
                "commits": commits(completion),
            }
    return rows


def commits(completion) -> list[list[list[int]]]:
    """[positions, token ids] that each forward pass committed."""
    steps: list[list[list[int]]] = [[[], []] for _ in range(completion.nfe)]
    for position, at in enumerate(completion.committed_at):
        if at >= 0:
            steps[at][0].append(position)
            steps[at][1].append(completion.token_ids[position])
    return steps


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="directory or hub id")
    parser.add_argument("--cases", required=True, type=Path, help="cases, one JSON object per line")
    parser.add_argument("--out", required=True, type=Path, help="where the traces go")
    parser.add_argument(
        "--verifier_ckpt", help="directory or hub id of the verifier of cases that draft (apd)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=1, help="rows in flight at a time (default 1)"
    )
    parser.add_argument(
        "--no_early_exit", action="store_true", help="decode every canvas to its end"
    )
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="default float32",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from experiment.checks import flagged, verifier_problems
    from models import check_checkpoint, read_config

    problems = flagged("checkpoint", args.checkpoint, check_checkpoint(args.checkpoint))
    if args.verifier_ckpt is not None:
        drafting = None if problems else args.checkpoint
        found = verifier_problems(args.verifier_ckpt, drafting)
        problems += flagged("verifier_ckpt", args.verifier_ckpt, found)
    configs: list[DecodeConfig | Target] = []
    if args.batch_size < 1:
        problems.append(f"--batch_size {args.batch_size} must be at least 1")
    if not args.out.resolve().parent.is_dir():
        problems.append(f"--out {args.out}: the directory {args.out.parent} does not exist")
    try:
        cases = read_cases(args.cases)
        known = None if problems else read_config(args.checkpoint)
        for i, case in enumerate(cases if known else []):
            try:
                if isinstance(case, dict) and "estimator" in case:
                    configs.append(likelihood_target(case, known))
                    continue
                configs.append(case_config(case, known.family, early_exit=not args.no_early_exit))
                if drafts(configs[-1]) and args.verifier_ckpt is None:
                    raise ValueError(
                        f"{case['algorithm']} needs a verifier; give --verifier_ckpt, "
                        "such as Qwen/Qwen2.5-0.5B"
                    )
            except (ScheduleError, ValueError, TypeError) as error:
                name = case.get("id", i) if isinstance(case, dict) else i
                problems.append(f"case {name}: {error}")
    except OSError as error:
        problems.append(f"--cases {args.cases} cannot be read: {error.strerror or error}")
    except ValueError as error:
        problems.append(f"--cases: {error}")
    if args.verifier_ckpt is not None and not problems and not any(map(drafts, configs)):
        problems.append(f"--verifier_ckpt {args.verifier_ckpt}: no case drafts anything")
    if problems:
        more = [f"error: and {len(problems) - 20} more"] if len(problems) > 20 else []
        print("\n".join([f"error: {p}" for p in problems[:20]] + more), file=sys.stderr)
        return 2
    import torch

    from models import load_model

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"error: --device {args.device}: no CUDA device is visible; use --device cpu",
            file=sys.stderr,
        )
        return 3
    model, verifier = (
        None
        if path is None
        else load_model(path, device=args.device, dtype=getattr(torch, args.dtype))[0]
        for path in (args.checkpoint, args.verifier_ckpt)
    )
    rows = replay(model, cases, configs, args.batch_size, verifier)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    passes = sum(row.get("forward_passes", row.get("rows", 0)) for row in rows)
    print(f"{len(rows)} cases, {passes} forward passes -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
