"""Runs the cases of stage.cases() and prints one JSON object.

    programme.py protected [OPTIONS]   in this machine's sandbox: verdicts, and effects that got out
    programme.py controls [OPTIONS]    where nothing stops an attack: what each does

    --strict         judge in strict mode
    --tier NAME      leave out attacks that this tier does not claim to stop
    --few            run two of the programs that only a time limit ends
    --alone          this runs in namespaces of its own: run the dangerous cases too
    --cases ID,ID    run these only
See tests/test_hostile.py. `controls` starts it again as `inner`: a control may kill its harness.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import controls
from stage import TESTS, TOKEN, Stage, cases, limits_of, loopback_up, reported

import sandbox
from sandbox.scratch import RUN, root, sweep

FEW = ("inf_loop", "sleep_forever")
# tier -> kinds of attack that it claims to stop
STOPS = {"A": ("files", "calls"), "A'": ("files", "calls"), "B": ("calls",), "C": ()}


def protected(stage: Stage, chosen: list[dict], strict: bool) -> dict:
    """Every case in this machine's sandbox, several at a time."""
    sandbox.accept("all")
    found = sandbox.tier()

    def run(case: dict) -> dict:
        program = sandbox.Program(stage.source(case), case.get("tests", TESTS))
        try:
            verdict = sandbox.judge_program(program, strict=strict, limits=limits_of(case))
            return {key: getattr(verdict, key) for key in ("passed", "reason", "detail", "cpu_s")}
        except Exception as error:  # no program may cause one
            detail = f"{type(error).__name__}: {error}"
            return {"passed": None, "reason": "error", "detail": detail}

    with ThreadPoolExecutor(3) as pool:  # on two cores: usually one of the three sleeps
        verdicts = dict(zip((c["id"] for c in chosen), pool.map(run, chosen), strict=True))
    effects = {name: sorted(reported(verdict["detail"])) for name, verdict in verdicts.items()}
    return {
        "tier": found.name,
        "line": found.line,
        "verdicts": verdicts,
        "effects": effects | {"": sorted(stage.effects(wait_s=0.3))},
        "memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10,
        "survivors": stage.survivors(),
        "scratch_left": [n for n in os.listdir(RUN.path()) if n not in ("lock", "lib")],
    }


def choose(args: argparse.Namespace) -> list[dict]:
    chosen = [c for c in cases() if args.alone or not c.get("danger")]
    if args.mode == "controls":
        chosen = [c for c in chosen if "control" in c]
    if args.few:
        chosen = [c for c in chosen if not c.get("slow") or c["id"] in FEW]
    if args.tier:
        chosen = [c for c in chosen if "stopped_by" not in c or c["stopped_by"] in STOPS[args.tier]]
    return [c for c in chosen if not args.cases or c["id"] in args.cases]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["protected", "controls", "inner"])
    parser.add_argument("--tier", choices=STOPS)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=[])
    for flag in ("--strict", "--few", "--alone"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    # /proc/<pid>/environ shows the environment with which a process was started
    if os.environ.get("HF_TOKEN") != TOKEN:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"HF_TOKEN": TOKEN})
    loopback_up()
    if args.mode == "inner":
        controls.inner(args.cases, args.alone)
        return
    chosen = choose(args)
    # on the file system of the scratch directory, for hard links
    with tempfile.TemporaryDirectory(prefix="hostile-", dir=root()) as folder:
        os.environ["HOSTILE_DIR"] = folder
        if args.mode == "controls":
            report = {"controls": controls.run_all(chosen, args.alone)}
        else:
            stage = Stage(args.alone)
            report = protected(stage, chosen, args.strict)
            stage.close()
            run = RUN.path()
            RUN.close()
            report["run_left"] = os.path.exists(run)
    sweep()  # directories of harnesses that a control has killed
    print(json.dumps(report))


if __name__ == "__main__":
    main()
