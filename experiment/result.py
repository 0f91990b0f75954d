"""From samples to the result file: the record of a sample, the profile of a run, metrics, schema, final table.

No torch. A result has a part that the configuration decides alone (everything that `content_sha256` covers) and a
part that depends on the day: `profile` (times) and `meta` (host, versions, paths).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiment.code_scores import code_lines, strict_summary
from experiment.diagnostics import diagnostics
from experiment.statistics import Estimate, estimate, percentile
from utils import SCHEMA_VERSION, BadDataError, sha256

UNPUBLISHED = "no score is published for this protocol, model and task"
DEPARTS = "not set beside a published score: the run, its data or its size departs from the protocol that has one"
VOLATILE = ("content_sha256", "profile", "meta")  # not covered by content_sha256
PROPORTIONS = (
    "exact_match",
    "pass@1",
    "pass@1_strict",
    "acc",
)  # metrics that are 0 or 1 for a sample, and those ending in _acc


@dataclass(frozen=True)
class Record:
    """What is known of one sample once its row has left the engine, before it is scored.

    prompt:        as rendered, chat template, examples and prefill included.
    text:          what is scored: up to the first end token and the first stop string.
    raw_text:      the committed text up to and including the first end token, special tokens written out.
    cut:           why `text` ends: "end token <id>", "stop string '<s>'", or None: the canvas was full.
    token_ids:     the whole canvas; a position that was left open holds the mask id.
    committed_at:  which forward pass committed each position, -1 where left open.
    error:         traceback, where the sample failed; then the fields of the answer are empty. Never scored.
    seconds:       wall time in flight, shared with the rows of the same batch.
    cost_seconds:  wall time of decoding since the sample before it was done: over a run they add up to the whole.
    """

    doc_id: int
    repeat: int
    prompt: str
    text: str = ""
    raw_text: str = ""
    cut: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    tokens_committed: int = 0
    tokens_returned: int = 0
    nfe: int = 0
    forwards_saved: int = 0
    positions_computed: int = 0
    seconds: float = 0.0
    cost_seconds: float = 0.0
    seed: int = 0
    token_ids: tuple[int, ...] = ()
    committed_at: tuple[int, ...] = ()
    error: str | None = None
    nfe_partial: int = 0
    nfe_verifier: int = 0


def profile(records: Iterable[Record], *, peak_bytes: Mapping[str, int | None]) -> dict[str, Any]:
    """What a run cost. The one definition of these numbers; failed samples count nowhere.

    seconds:           wall time of decoding these samples, device synchronised, summed over sessions and workers;
                       loading and scoring are not in it.
    tokens_committed:  positions of the canvas that were filled.
    tokens_returned:   tokens before the first end token and before the first stop string: the text that is scored.
    forward_passes:    model calls times rows taking part; full: over the whole sequence, partial: the columns that the
                       KV cache does not have.
    verifier_passes:   those of a verifier, which count in none of the others.
    positions_computed: columns that went through the model.
    forwards_saved:    forward passes that the schedule still had when a row left early.
    tpf:               tokens_returned / forward passes.
    tokens_per_second: tokens_returned / seconds.
    latency_s:         time of a sample in flight, median and 95th percentile; a batch's rows share it.
    """
    done = [r for r in records if r.error is None]
    returned, forwards = sum(r.tokens_returned for r in done), sum(r.nfe for r in done)
    partial = sum(r.nfe_partial for r in done)
    latencies, seconds = [r.seconds for r in done], sum(r.cost_seconds for r in done)
    return {
        "samples": len(done),
        "seconds": seconds,
        "tokens_committed": sum(r.tokens_committed for r in done),
        "tokens_returned": returned,
        "forward_passes": {"full": forwards - partial, "partial": partial},
        "forward_passes_per_sample": forwards / len(done) if done else None,
        "verifier_passes": sum(r.nfe_verifier for r in done),
        "positions_computed": sum(r.positions_computed for r in done),
        "forwards_saved": sum(r.forwards_saved for r in done),
        "tpf": returned / forwards if forwards else None,
        "tokens_per_second": returned / seconds if seconds else None,
        "latency_s": {"p50": percentile(latencies, 0.5), "p95": percentile(latencies, 0.95)},
        "peak_memory_bytes": dict(peak_bytes),
    }


# ---------------------------------------------------------------- predictions made elsewhere


def read_predictions(path: Path, n_docs: int, limit: int | None) -> dict[int, str]:
    """doc_id -> text of a result file, or of a file of lines {"doc_id": n, "text": "..."}; every document below `limit` must be there.

    Raises BadDataError with every malformed line, duplicate, unknown and missing doc_id.
    """
    wanted = range(n_docs if limit is None else min(limit, n_docs))
    texts: dict[int, str] = {}
    problems: list[str] = []
    line_of: dict[int, int] = {}
    try:
        for number, line in enumerate(
            _prediction_lines(path.read_text(encoding="utf-8-sig")), start=1
        ):
            if line.strip():
                problem = _read_prediction(line, number, n_docs, texts, line_of)
                problems += [f"{path}, line {number}: {problem}"] if problem else []
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataError(f"--predictions {path} cannot be read: {error}") from error
    if len(problems) > 10:
        problems[10:] = [f"{path}: {len(problems) - 10} more lines are malformed"]
    missing = [i for i in wanted if i not in texts]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        problems.append(
            f"{path}: no text for {len(missing)} of {len(wanted)} documents, doc_id {shown}; "
            "--limit N needs 0 to N-1 only"
        )
    if problems:
        raise BadDataError(problems)
    return {i: texts[i] for i in wanted}


def _prediction_lines(text: str) -> list[str]:
    """The lines of a file of predictions; a result file (of a run with --no_exec, say) has one for each sample."""
    try:
        result = json.loads(text)
        rows = [row for row in result["samples"] if row["status"] == "ok"]
        return [json.dumps({"doc_id": row["doc_id"], "text": row["text"]}) for row in rows]
    except (ValueError, RecursionError, TypeError, KeyError):
        return text.split("\n")


def _read_prediction(
    line: str, number: int, n_docs: int, texts: dict[int, str], line_of: dict[int, int]
) -> str | None:
    """Add one line's text to `texts`; what is wrong with the line, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return 'not an object; expected {"doc_id": n, "text": "..."}'
    doc_id, text = row.get("doc_id"), row.get("text")
    if type(doc_id) is not int:
        return (
            f"field 'doc_id': expected a whole number, got {doc_id!r:.40}"
            if "doc_id" in row
            else "field 'doc_id' is missing"
        )
    if not isinstance(text, str):
        return (
            f"field 'text': expected text, got {text!r:.40}"
            if "text" in row
            else "field 'text' is missing"
        )
    if not 0 <= doc_id < n_docs:
        return f"doc_id {doc_id} is not one of 0 to {n_docs - 1}"
    if doc_id in line_of:
        return f"doc_id {doc_id} was already on line {line_of[doc_id]}"
    texts[doc_id], line_of[doc_id] = text, number
    return None


# ---------------------------------------------------------------- metrics and samples


def metrics_of(samples: Iterable[Mapping[str, Any]]) -> dict[str, Estimate]:
    """lm-eval's "metric,filter" -> mean, stderr and interval over its logged samples, one per document and filter."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            values.setdefault(f"{name},{sample['filter']}", []).append(float(sample[name]))
    return {key: estimate(v, proportion=is_proportion(key)) for key, v in values.items()}


def is_proportion(key: str) -> bool:
    """Whether a metric, "metric,filter", is 0 or 1 for every sample: its mean is an accuracy."""
    metric = key.partition(",")[0]
    return metric in PROPORTIONS or metric.endswith("_acc")


def sample_rows(
    records: Sequence[Record], logged: Sequence[Mapping[str, Any]]
) -> tuple[list[dict], list[dict]]:
    """One row per record for the result file, and beside it what of a sample varies from day to day.

    extracted: filter -> what the scorer read out of the text. verdict: for code, how the program fared.
    """
    scored: dict[int, list[Mapping[str, Any]]] = {}
    for sample in logged:
        scored.setdefault(sample["doc_id"], []).append(sample)
    rows, times = [], []
    for record in sorted(records, key=lambda r: (r.doc_id, r.repeat)):
        row = asdict(record)
        time = {
            "doc_id": record.doc_id,
            "repeat": record.repeat,
            "seconds": row.pop("seconds"),
            "cost_seconds": row.pop("cost_seconds"),
        }
        row["status"] = "ok" if record.error is None else "error"
        if record.error is None:
            for sample in scored.get(record.doc_id, []):
                answer = _unwrap(sample["filtered_resps"], record.repeat)
                if isinstance(answer, dict):  # code: candidate and verdict
                    answer = dict(answer)
                    for name, key in (
                        ("judged_s", "seconds"),
                        ("judged_cpu_s", "cpu_seconds"),
                        ("sandbox_tier", "tier"),
                    ):
                        time[name] = answer.pop(key, None)
                    row["verdict"] = {
                        k: v for k, v in answer.items() if k not in ("candidate", "program")
                    }
                    row.setdefault("program", answer.get("program"))
                    answer = answer.get("candidate")
                row.setdefault("extracted", {})[sample["filter"]] = answer
                row.setdefault("metrics", {}).update(
                    {f"{m},{sample['filter']}": float(sample[m]) for m in sample["metrics"]}
                )
        rows.append(row)
        times.append(time)
    return rows, times


def _unwrap(filtered: Any, repeat: int) -> Any:
    """The answer of one repeat out of lm-eval's filtered_resps: [answer], or [[answer per repeat]]."""
    first = filtered[0]
    return first[repeat] if isinstance(first, list) else first


# ---------------------------------------------------------------- the result


def build_result(
    *,
    config: Mapping[str, Any],
    config_id: str,
    protocol: Mapping[str, Any],
    overrides: Mapping[str, Any],
    notes: Sequence[str],
    data: Mapping[str, Any],
    limit: int | None,
    records: Sequence[Record],
    logged: Sequence[Mapping[str, Any]],
    headline: str,
    code: bool,
    profile: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The result, ready for JSON.

    complete: every sample was scored; `metrics` holds every metric and `headline` the one that stands for the task.
    unscored: every sample is there, but programs were not to be run; no metric.
    incomplete: some samples failed. Then there is no headline, and `score_on_completed` says what the others got
    and how many they are. `reference` is the published score of as many tokens per step, only where nothing else
    departs from its protocol.
    """
    failed = {r.doc_id for r in records if r.error is not None}
    estimates = {
        k: e.as_dict()
        for k, e in metrics_of(s for s in logged if s["doc_id"] not in failed).items()
    }
    rows, times = sample_rows(records, logged)
    complete = not failed and headline in estimates
    whole = (
        complete
        and data.get("name") in ("original", "hub")
        and limit is None
        and config.get("predictions") is None
    )
    reference = reference_of(protocol.get("references", ()), overrides) if whole else None
    result = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete" if complete else "incomplete" if failed else "unscored",
        "id": config_id,
        "config": dict(config),
        "protocol": {**protocol, "overrides": dict(overrides)},
        "notes": list(notes),
        "data": dict(data),
        "limit": limit,
        "n_samples": len(rows),
        "n_failed": len(rows) - sum(row["status"] == "ok" for row in rows),
        "headline": {"metric": headline, **estimates[headline]} if complete else None,
        "metrics": estimates if complete else {},
        "score_on_completed": estimates if failed else None,
        "reference": reference,
        "reference_note": None
        if reference
        else DEPARTS
        if protocol.get("references")
        else UNPUBLISHED,
        "diagnostics": diagnostics(rows, code=code),
        "strict": strict_summary(rows) if code else None,
        "samples": rows,
    }
    result["protocol"].pop("references", None)
    result["content_sha256"] = sha256(result)
    return result | {"profile": {**profile, "sample_seconds": times}, "meta": dict(meta)}


def reference_of(
    references: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The published score of a run's tokens per step; None where there is none, or anything else was overridden."""
    k = overrides.get("tokens_per_step", {}).get("run", 1)
    same = set(overrides) <= {"tokens_per_step"}
    return next((dict(r) for r in references if same and r["tokens_per_step"] == k), None)


def published(reference: Mapping[str, Any]) -> str:
    """A published score in a line."""
    k = reference["tokens_per_step"]
    return f"{reference['score']} % at {k} token{'s' * (k > 1)} per step ({reference['metric']}, {reference['source']})"


def load_result(path: Path) -> dict[str, Any] | None:
    """The result at `path`, None where there is none. Raises BadDataError where it is not a result of this schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BadDataError(
            f"{path} is there but is no result file ({error}); --overwrite replaces it, --tag writes beside it"
        ) from error
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version != SCHEMA_VERSION:
        raise BadDataError(
            f"{path} has schema_version {version}, this program writes {SCHEMA_VERSION}; "
            "--overwrite replaces it, --tag writes beside it"
        )
    return result


def table(result: Mapping[str, Any], path: Path) -> str:
    """The summary that a run ends with."""
    from prettytable import PrettyTable

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = PrettyTable(["metric", "value", "95 % interval", "stderr", "n"])
    rows.align = "r"
    rows.align["metric"] = "l"
    headline = result["headline"]["metric"] if result["headline"] else None
    for key, e in (result["metrics"] or result["score_on_completed"] or {}).items():
        name = f"{key} *" if key == headline else key
        low, high = e["ci95"]
        rows.add_row(
            [
                name,
                shown(e["value"], 4),
                f"{shown(low, 4)} to {shown(high, 4)}",
                shown(e["stderr"], 4),
                e["n"],
            ]
        )
    p, config = result["profile"], result["config"]
    lines = [
        f"{config['model_alias']} {config['task']} ({config['protocol']}): "
        f"{result['status']}, {result['n_samples']} samples",
        rows.get_string(),
    ]
    if result["n_failed"]:
        first = next(sample["error"] for sample in result["samples"] if sample["error"])
        lines.append(
            f"{result['n_failed']} samples failed and are not scored: the values above are of the others, "
            f"and no score of the benchmark. The first: {first.strip().splitlines()[-1]}"
        )
    if p.get("forward_passes_per_sample"):
        lines.append(
            f"{shown(p['tokens_per_second'], 1)} tokens/s, {shown(p['tpf'], 2)} tokens per forward pass, "
            f"{shown(p['forward_passes_per_sample'], 1)} forward passes per sample"
        )
    lines += code_lines(result)
    lines += [f"warning: {warning}" for warning in result["diagnostics"]["warnings"]]
    if result["reference"]:
        lines.append(f"published: {published(result['reference'])}")
    elif config["protocol"] == "official":
        lines.append(f"published: {result['reference_note']}")
    return "\n".join([*lines, f"result: {path}"])
