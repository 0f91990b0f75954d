"""Hostile programs against every tier of the sandbox: tests/hostile/expected.json says what is expected of each.

A verdict that is wrong, something that got out, a process or a directory that stays, a harness that
ends: each is a failure; and so is an attack that has no effect where nothing stops it. Kernels that
lack something are made with tests/hostile/hide.py. Programs that only a time limit ends run in tier
A's strict mode, two of them elsewhere; DLLMEXP_HOSTILE_FULL=1 runs all everywhere.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "hostile"
CASES = {
    case["id"]: case for case in json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
}
NAMESPACES = ["--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--ipc", "--mount", "--"]
HIDDEN = {"A": "", "A'": "landlock", "B": "landlock,namespaces", "C": "landlock,namespaces,seccomp"}
OF_THE_JUDGE = (
    "passed",
    "crashed",
    "endless",
    "output",
    "unsendable",
    "many_files",
    "big_file",
)  # not of the program
ABOVE = {"A": (), "A'": ("A",), "B": ("A", "A'"), "C": ("A", "A'", "B")}


@pytest.fixture(scope="module")
def isolation() -> list[str]:
    """The command that gives programs namespaces of their own; empty, with a reason printed, where there is none."""
    for user in (["--user", "--map-root-user"], []):
        command = ["unshare", *user, *NAMESPACES]
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return command
    print(
        "no namespaces of its own here (unshare): cases marked danger are left out",
        file=sys.__stderr__,
    )
    return []


def programme(isolation: list[str], *arguments: str, hidden: str = "") -> dict:
    """What tests/hostile/programme.py reports on a machine that lacks `hidden`."""
    command = [
        *isolation,
        sys.executable,
        str(HERE / "hide.py"),
        hidden,
        sys.executable,
        str(HERE / "programme.py"),
    ]
    command += [*arguments, *["--alone"] * bool(isolation)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, f"the harness died: {run.stderr[-2000:]}"
    return json.loads(run.stdout.splitlines()[-1])


def tier_here(hidden: str) -> str:
    code = "from sandbox import tiers; found = tiers.find(); print(found.name, found.line)"
    command = [sys.executable, str(HERE / "hide.py"), hidden, sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, cwd=HERE.parent.parent
    ).stdout


@pytest.mark.parametrize(
    ("tier", "mode"),
    [
        pytest.param(tier, mode, marks=[pytest.mark.slow] * ((tier, mode) != ("A", "default")))
        for mode in ("default", "strict")
        for tier in HIDDEN
    ],
)
def test_no_program_gets_past_the_sandbox(isolation, tier, mode):
    """Tier B claims nothing for files and tier C nothing but limits: the rest has to hold there too."""
    found, line = tier_here(HIDDEN[tier]).split(maxsplit=1)
    if found != tier:
        assert found not in ABOVE[tier], line  # it cannot be better than what was left to it
        pytest.skip(f"tier {tier} cannot be had here: {line}")
    strict = ["--strict"] if mode == "strict" else []
    few = (
        []
        if os.environ.get("DLLMEXP_HOSTILE_FULL") or (tier, mode) == ("A", "strict")
        else ["--few"]
    )
    report = programme(isolation, "protected", "--tier", tier, *strict, *few, hidden=HIDDEN[tier])
    assert report["tier"] == tier
    word = {True: "pass", False: "fail", None: "infrastructure error"}
    wrong = {
        name: verdict
        for name, verdict in report["verdicts"].items()
        if CASES[name][mode] not in ("any", word[verdict["passed"]])
    }
    assert wrong == {}
    got_out = {name: seen for name, seen in report["effects"].items() if seen}
    assert got_out == {}
    assert (report["survivors"], report["scratch_left"], report["run_left"]) == ([], [], False)
    assert report["memory_mb"] < 600  # of 512 for a program
    assert (
        report["verdicts"]["inf_loop"]["cpu_s"] > 0.7
    )  # of 1; also where another program starts it
    assert len(report["verdicts"]) >= 60


@pytest.mark.slow
def test_every_attack_bites_where_nothing_stops_it(isolation):
    """A program that is harmless anyway would prove nothing."""
    seen = programme(isolation, "controls")["controls"]
    toothless = {
        name: found for name, found in seen.items() if CASES[name]["control"]["shows"] not in found
    }
    assert toothless == {}
    assert len(seen) >= 60


def test_the_corpus_is_whole():
    """A program without a case would never run."""
    files = {path.stem for path in (HERE / "programs").iterdir()}
    assert files == {name for name, case in CASES.items() if not {"source", "repeat"} & set(case)}
    assert len(CASES) >= 60
    for case in CASES.values():
        assert case["default"] in ("pass", "fail", "any") and case["strict"] in (
            "pass",
            "fail",
            "any",
        ), case
        assert case.get("stopped_by", "files") in ("files", "calls")
        shown = case["control"]["shows"]
        assert shown in OF_THE_JUDGE or shown in case["must_not"], (
            case
        )  # what a control shows must not happen
