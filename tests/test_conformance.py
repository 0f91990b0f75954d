"""Decoding reproduces the recorded tokens of the official implementations.

The recorded set is tests/conformance, or the directory that DLLMEXP_CONFORMANCE_DIR names.
"""

import json

import pytest
import torch

from decoding.engine import decode
from decoding.schedule import make_schedule
from models import load_model
from scripts.trace import case_config, commits, main, replay

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def models(conformance_dir):
    names = ("llada-tiny", "dream-tiny")
    return {n: load_model(conformance_dir / n, device="cpu", dtype=torch.float32)[0] for n in names}


@pytest.fixture(scope="module")
def cases(conformance_dir):
    """Cases of each model."""
    rows = [
        json.loads(line)
        for line in (conformance_dir / "golden" / "decoding.jsonl").open(encoding="utf-8")
    ]
    return {name: [r for r in rows if r["model"] == name] for name in ("llada-tiny", "dream-tiny")}


def until_end(ids: list[int], end_ids) -> list[int]:
    """Ids up to and including the first end token."""
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[: i + 1]
    return ids


def recorded(case: dict) -> list[dict[int, int]]:
    """{position: id} of each recorded forward pass that committed something."""
    return [dict(zip(positions, ids)) for positions, ids in case["commits"] if positions]


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
@pytest.mark.parametrize(
    ("batch_size", "early_exit"),
    [(8, False), pytest.param(1, False, marks=SLOW), pytest.param(3, True, marks=SLOW)],
)
def test_official_tokens(models, cases, name, early_exit, batch_size):
    """Every recorded case, alone and among prompts of other lengths, with early exit on and off.

    Without it a sample costs exactly the steps that are not idle.
    """
    model, rows = models[name], cases[name]
    configs = [case_config(r, model.config.family, early_exit) for r in rows]
    assert (
        len(rows) >= 60
        and sum("threshold" in r["params"] or "cache" in r["params"] for r in rows) >= 20
    )
    for case, config, trace in zip(rows, configs, replay(model, rows, configs, batch_size)):
        ours, theirs = trace["ids"], case["expected_ids"]
        if early_exit or case["algorithm"] == "leftright":
            ours, theirs = (
                until_end(ours, model.config.end_ids),
                until_end(theirs, model.config.end_ids),
            )
        assert ours == theirs, case["id"]
        assert trace["forward_passes"] <= case["forward_passes"], case["id"]
        if "commits" in case:
            committed = [dict(zip(*entry)) for entry in trace["commits"]]
            assert committed == recorded(case)[: len(committed)], (
                f"{case['id']}: the order of commits"
            )
        if "commits" in case and not early_exit:
            assert trace["forward_passes"] == len(recorded(case)), case["id"]
            if case["algorithm"] != "leftright":
                assert trace["forward_passes"] == config.schedule.forward_passes, case["id"]


def test_trace_script_writes_what_was_committed_when(conformance_dir, cases, tmp_path, capsys):
    rows = [
        r for r in cases["llada-tiny"] if r["algorithm"] == "low_confidence" and "commits" in r
    ][:4]
    keep = ("id", "prompt_ids", "algorithm", "params")
    (tmp_path / "cases.jsonl").write_text(
        "".join(json.dumps({k: r[k] for k in keep}) + "\n" for r in rows)
    )
    arguments = [
        "--checkpoint",
        str(conformance_dir / "llada-tiny"),
        "--cases",
        str(tmp_path / "cases.jsonl"),
    ]
    assert (
        main(
            [
                *arguments,
                "--out",
                str(tmp_path / "out.jsonl"),
                "--no_early_exit",
                "--batch_size",
                "3",
            ]
        )
        == 0
    )
    traces = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [t["id"] for t in traces] == [r["id"] for r in rows]
    assert [t["ids"] for t in traces] == [r["expected_ids"] for r in rows]
    assert [[dict(zip(*c)) for c in t["commits"]] for t in traces] == [recorded(r) for r in rows]
    assert "4 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "leftrigth"}, "unknown algorithm 'leftrigth'"),
        (
            {"params": {"gen_length": 30, "block_length": 64}},
            "block_length 64 is more than the gen_length of 30",
        ),
        ({"params": {"gen_length": 32, "cach": "dual"}}, "unknown params cach;"),
        (
            {"params": {"gen_length": 32, "cache": "deal"}},
            "kv_cache 'deal' must be one of none, prefix, dual",
        ),
        (
            {"params": {"gen_length": 32, "cache": "dual", "kv_cache": "dual"}},
            "two names for one thing",
        ),
        (
            {"params": {"gen_length": 32, "threshold": 1.5}},
            "threshold 1.5 must be at least 0 and at most 1",
        ),
        ({"algorithm": "entropy", "params": {"gen_length": 32}}, "not defined for llada"),
        ({"prompt_ids": []}, "prompt_ids"),
    ],
)
def test_trace_script_names_what_is_wrong_with_a_case(
    conformance_dir, tmp_path, capsys, change, message
):
    case = {
        "id": "mine",
        "algorithm": "low_confidence",
        "prompt_ids": [5],
        "params": {"gen_length": 32},
    } | change
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    code = main(
        [
            "--checkpoint",
            str(conformance_dir / "llada-tiny"),
            "--cases",
            str(tmp_path / "cases.jsonl"),
            "--out",
            str(tmp_path / "out.jsonl"),
        ]
    )
    error = capsys.readouterr().err
    assert code == 2 and message in error and "case mine" in error and "Traceback" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_commits_lists_every_forward_pass(models):
    schedule = make_schedule("leftright", 5, tokens_per_step=2)
    from decoding.config import DecodeConfig

    [done] = decode(
        models["dream-tiny"], [[5, 6, 7]], DecodeConfig(schedule, early_exit=False), [0]
    )
    steps = commits(done)
    assert [positions for positions, _ in steps] == [[0, 1], [2, 3], [4]][: done.nfe]
