"""From samples to the result file: profile, metrics, rows, the form of the file, the final table.

No torch. A result has a part that the configuration alone decides, which `content_sha256` covers,
and a part that differs from day to day: `profile` (times) and `meta` (host, versions, paths).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from experiment.code_scores import code_lines, strict_summary
from experiment.diagnostics import choice_diagnostics, diagnostics
from experiment.sample import SCORED, Sample, answers_of, samples_of
from experiment.statistics import Estimate, as_read, estimate, percentile
from tasks.code import unjudged
from utils import (
    SCHEMA_VERSION,
    BadDataError,
    OutputError,
    file_bytes,
    numbered,
    parse_fault,
    sha256,
)

UNPUBLISHED = "no score is published for this protocol, model and task"
DEPARTS = "not compared with the published score: the run differs from the protocol in "
# names of the benchmarks' own data
ORIGINALS = ("original", "hub")
VOLATILE = ("content_sha256", "profile", "meta")  # not covered by content_sha256


def profile(samples: Collection[Sample], *, peak_bytes: Mapping[str, int | None]) -> dict[str, Any]:
    """What a run cost. The one definition of these numbers; failed samples count nowhere.

    seconds:           wall time of decoding these samples, device synchronised, summed over
                       sessions and workers; without loading and scoring.
    tokens_committed:  positions of the canvas that were filled.
    tokens_returned:   tokens before the first end token and before the first stop string: the text
                       that is scored.
    forward_passes:    model calls times rows taking part; full: over the whole sequence, partial:
                       over the columns that the KV cache does not have.
    verifier_passes:   those of a verifier, which count in none of the others.
    positions_computed: columns that went through the model.
    forwards_saved:    forward passes that the schedule still had when a row left early.
    tpf:               tokens_returned / forward passes.
    tokens_per_second: tokens_returned / seconds.
    latency_s:         time of a sample in flight, median and 95th percentile; the rows of a batch
                       share it.
    Of likelihoods a sample is one request; `rows` is the number of sequences that ran, equal ones
    once, `rows_needed` without sharing among requests, and nothing is returned.
    """
    if any(sample.request.continuation is not None for sample in samples):
        return _profile_of_likelihoods(samples, peak_bytes)
    done = [sample for sample in samples if sample.error is None]
    completions = [sample.completion for sample in done]
    returned, forwards = sum(s.tokens_returned for s in done), sum(c.nfe for c in completions)
    partial, seconds = sum(c.nfe_partial for c in completions), sum(s.cost_seconds for s in done)
    latencies = [c.seconds for c in completions]
    return {
        "samples": len(done),
        "seconds": seconds,
        "tokens_committed": sum(c.tokens_committed for c in completions),
        "tokens_returned": returned,
        "forward_passes": {"full": forwards - partial, "partial": partial},
        "forward_passes_per_sample": forwards / len(done) if done else None,
        "verifier_passes": sum(c.nfe_verifier for c in completions),
        "positions_computed": sum(c.positions_computed for c in completions),
        "forwards_saved": sum(c.forwards_saved for c in completions),
        "tpf": returned / forwards if forwards else None,
        "tokens_per_second": returned / seconds if seconds else None,
        "latency_s": {"p50": percentile(latencies, 0.5), "p95": percentile(latencies, 0.95)},
        "peak_memory_bytes": dict(peak_bytes),
    }


def _profile_of_likelihoods(
    samples: Collection[Sample], peak_bytes: Mapping[str, int | None]
) -> dict[str, Any]:
    done = [sample for sample in samples if sample.error is None]
    found = [sample.completion for sample in done]
    rows, seconds = sum(f.rows_run for f in found), sum(s.cost_seconds for s in done)
    latencies = [f.seconds for f in found]
    return {
        "samples": len(done),
        "seconds": seconds,
        "rows": rows,
        "rows_needed": sum(f.rows for f in found),
        "rows_per_second": rows / seconds if seconds else None,
        "forward_passes": {"full": rows, "partial": 0},
        "positions_computed": sum(
            f.positions_computed * f.rows_run // (f.rows or 1) for f in found
        ),
        "tpf": None,
        "tokens_per_second": None,
        "latency_s": {"p50": percentile(latencies, 0.5), "p95": percentile(latencies, 0.95)},
        "peak_memory_bytes": dict(peak_bytes),
    }


# ---------------------------------------------------------------- metrics and samples


def metrics_of(samples: Iterable[Mapping[str, Any]]) -> dict[str, Estimate]:
    """ "metric,filter" -> mean, stderr and interval over lm-eval's logged samples.

    lm-eval logs one sample per document and filter.
    """
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            values.setdefault(f"{name},{sample['filter']}", []).append(float(sample[name]))
    return {key: estimate(v) for key, v in values.items()}


def sample_rows(
    samples: Sequence[Sample],
    logged: Sequence[Mapping[str, Any]],
    target: Callable[[dict], Any] | None = None,
) -> tuple[list[dict], list[dict]]:
    """One row per sample for the result file, and one with its times, which differ from day to day.

    logged: lm-eval's samples. A row gets from them `extracted` (filter -> answer that the scorer
    found in the text), `metrics`, and for code `verdict` (how the program fared) and `program`.
    With --repeats a row is a document: its first answer, the metrics of the document, and all its
    answers with their own metrics as `repeats`.
    target: see TaskSpec.target. A row has the document's as `target`.
    """
    scored: dict[int, list[Mapping[str, Any]]] = {}
    for entry in logged:
        scored.setdefault(entry["doc_id"], []).append(entry)
    rows, times = [], []
    for sample in sorted(samples, key=lambda s: (s.request.doc_id, s.request.repeat)):
        doc_id, repeat = sample.request.doc_id, sample.request.repeat
        error = sample.error or _unscored(scored.get(doc_id, ()))
        row = sample.row() | {"status": "ok" if error is None else "error", "error": error}
        if target:
            row["target"] = target(sample.request.doc)
        else:
            theirs = next((e.get("target") for e in scored.get(doc_id, [])), None)
            row["target"] = json.loads(json.dumps(theirs, default=str))
        time = {
            "doc_id": doc_id,
            "repeat": repeat,
            "seconds": sample.completion.seconds,
            "cost_seconds": sample.cost_seconds,
        }
        if sample.error is None:
            for entry in scored.get(doc_id, []):
                answer = _unwrap(entry["filtered_resps"], repeat)
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
                row.setdefault("extracted", {})[entry["filter"]] = answer
                if error is None:
                    own = entry["repeats"][repeat] if "repeats" in entry else entry
                    row.setdefault("metrics", {}).update(_numbers(entry, own))
        rows.append(row)
        times.append(time)
    if any("repeats" in entry for entry in logged):
        rows = [_document(list(own), scored) for _, own in groupby(rows, lambda r: r["doc_id"])]
    return rows, times


def _numbers(entry: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, float]:
    """ "metric,filter" -> score, of what lm-eval has logged."""
    names = (m for m in entry["metrics"] if m in scores)
    return {f"{m},{entry['filter']}": float(scores[m]) for m in names}


def _document(
    answers: Sequence[Mapping[str, Any]], scored: Mapping[int, Iterable[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The row of a document, from those of its answers."""
    error = next((answer["error"] for answer in answers if answer["error"]), None)
    row = {**answers[0], "status": "ok" if error is None else "error", "error": error}
    row.pop("metrics", None)
    if error is None:
        entries = scored.get(row["doc_id"], ())
        row["metrics"] = {k: v for e in entries for k, v in _numbers(e, e).items()}
    return row | {"repeats": answers}


def choice_rows(
    samples: Sequence[Sample],
    logged: Sequence[Mapping[str, Any]],
    target: Callable[[dict], Any] | None = None,
) -> tuple[list[dict], list[dict]]:
    """As `sample_rows`, for documents that are scored by likelihood: one row per document.

    `options` of a row has the continuations with their log-likelihoods, `chosen` is the number of
    the likeliest one (the first of a tie), and `text` is that continuation. An option has its own
    `prompt` where the document's options have different ones.
    """
    scored = {entry["doc_id"]: entry for entry in logged}
    documents: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: (s.request.doc_id, s.request.repeat)):
        documents.setdefault(sample.request.doc_id, []).append(sample)
    rows, times = [], []
    for doc_id, asked in documents.items():
        entry, requests = scored.get(doc_id, {}), [sample.request for sample in asked]
        error = next((s.error for s in asked if s.error), entry.get("error"))
        same = len({request.prompt for request in requests}) == 1
        options = []
        for sample, request in zip(asked, requests):
            option = {} if same else {"prompt": request.prompt}
            option |= {
                "continuation": request.continuation,
                "key": request.key,
                "prompt_tokens": len(request.prompt_ids),
                "target_tokens": len(request.target_ids),
                "n_cut": request.n_cut,
                **{name: getattr(sample.completion, name, None) for name in SCORED},
            }
            options.append(option)
            times.append(
                {
                    "doc_id": doc_id,
                    "repeat": request.repeat,
                    "seconds": sample.completion.seconds,
                    "cost_seconds": sample.cost_seconds,
                    "rows_run": getattr(sample.completion, "rows_run", 0),
                }
            )
        values = [option["loglikelihood"] for option in options]
        chosen = None if error or None in values else values.index(max(values))
        row = {
            "doc_id": doc_id,
            "repeat": 0,
            "prompt": requests[0].prompt,
            "options": options,
            "chosen": chosen,
            "text": "" if chosen is None else options[chosen]["continuation"],
            "status": "ok" if error is None else "error",
            "error": error,
            # of a generated answer
            "raw_text": "",
            "cut": None,
            "finish_reason": None,
            "token_ids": [],
            "committed_at": [],
            "tokens_returned": 0,
            "nfe": sum(option["rows"] or 0 for option in options),
        }
        expected = target(requests[0].doc) if target else entry.get("target")
        row["target"] = json.loads(json.dumps(expected, default=str))
        if error is None and entry:
            row["metrics"] = _numbers(entry, entry)
        rows.append(row)
    return rows, times


def _unscored(logged: Iterable[Mapping[str, Any]]) -> str | None:
    """Why an answer is not scored or a program has no verdict; None where all are."""
    for entry in logged:
        if "error" in entry:
            return entry["error"]
        resps = (r if isinstance(r, list) else [r] for r in entry["filtered_resps"])
        for answer in chain.from_iterable(resps):
            if isinstance(answer, dict) and (why := unjudged(answer)):
                return why
    return None


def _unwrap(filtered: Any, repeat: int) -> Any:
    """The answer of one repeat; filtered_resps is [answer], or [[answer per repeat]]."""
    first = filtered[0]
    return first[repeat] if isinstance(first, list) else first


# ---------------------------------------------------------------- the result


def build_result(
    *,
    config: Mapping[str, Any],
    generation_id: str,
    result_id: str,
    protocol: Mapping[str, Any],
    overrides: Mapping[str, Any],
    notes: Sequence[str],
    data: Mapping[str, Any],
    limit: int | None,
    samples: Sequence[Sample],
    logged: Sequence[Mapping[str, Any]],
    headline: str,
    code: bool,
    target: Callable[[dict], Any] | None = None,
    token_texts: Mapping[str, str] | None = None,
    profile: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """The result, ready for JSON.

    generation_id: of all that can change a token; the samples are kept under it.
    result_id:     of that and of all that scoring reads; `id` in the result.
    logged:        lm-eval's samples.
    target:        doc -> what the answer should have been; None: as lm-eval logs it.
    token_texts:   token id, as a key of JSON -> its text, for those in the samples' `token_ids`.

    `status` in the result is one of
    complete:   every sample was scored; `metrics` has every metric, `headline` that of the task.
    unscored:   every sample is there, but no program was run (--no_exec); there is no metric.
    incomplete: some samples failed or could not be scored. There is no headline, and
                `score_on_completed` has the metrics of the others and how many they are.
    `reference` is the published score at the same tokens per step; None where the run departs from
    its protocol in anything else. `strict` is None unless passes were re-checked strictly.
    """
    failed = {sample.request.doc_id for sample in samples if sample.error is not None}
    failed |= {entry["doc_id"] for entry in logged if _unscored([entry])}
    estimates = {
        k: e.as_dict()
        for k, e in metrics_of(s for s in logged if s["doc_id"] not in failed).items()
    }
    by_likelihood = any(sample.request.continuation is not None for sample in samples)
    rows, times = (choice_rows if by_likelihood else sample_rows)(samples, logged, target)
    answers = answers_of(rows)
    complete = not failed and headline in estimates
    predicted = config.get("predictions") is not None
    reference, note = reference_of(
        protocol.get("references", ()),
        overrides,
        whole=complete and limit is None and not predicted,
        data=data.get("name"),
    )
    rechecked = any("pass@1_strict" in entry["metrics"] for entry in logged)
    result = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete" if complete else "incomplete" if failed else "unscored",
        "id": result_id,
        "generation_id": generation_id,
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
        "reference_note": note,
        "diagnostics": choice_diagnostics(rows)
        if by_likelihood
        else diagnostics(answers, code=code, headline=headline),
        "strict": strict_summary(answers) if rechecked else None,
        "token_texts": dict(token_texts or {}),
        "samples": rows,
    }
    result["protocol"].pop("references", None)
    result["content_sha256"] = sha256(result)
    return result | {"profile": {**profile, "sample_seconds": times}, "meta": dict(meta)}


def reference_of(
    references: Sequence[Mapping[str, Any]],
    overrides: Mapping[str, Any],
    *,
    whole: bool,
    data: str | None,
) -> tuple[dict[str, Any] | None, str | None]:
    """The published score at the run's tokens per step, or None and the reason.

    whole: every document is generated and scored. data: the name of the data, None: not known.
    There is no published score where the run departs from the protocol in anything else than
    tokens per step and the score's own method. Of several the first has the others as "also".
    """
    departs = {n: o.get("run") for n, o in overrides.items() if n != "tokens_per_step"}
    alike = [r for r in references if r.get("method", {}) == departs]
    differs = [] if alike else sorted(departs)
    differs += ["documents"] * (not whole) + ["data"] * (data not in ORIGINALS)
    if references and differs:
        return None, DEPARTS + ", ".join(differs)
    k = overrides.get("tokens_per_step", {}).get("run", 1)
    at_k = [dict(r) for r in alike if r["tokens_per_step"] in (k, None)]
    found = at_k[0] | ({"also": at_k[1:]} if at_k[1:] else {}) if at_k else None
    why = f"no score is published for {k} tokens per step" if references else UNPUBLISHED
    return found, None if found else why


def published(reference: Mapping[str, Any]) -> str:
    """A published score in a line."""
    k, of = reference["tokens_per_step"], f"({reference['metric']}, {reference['source']})"
    if "tokens_per_second" in reference:
        speed = f"{reference['tokens_per_second']} tok/s on one {reference['device']}"
        text = f"{reference['score']} %, {speed} {of}"
    else:
        at = "" if k is None else f" at {k} token{'s' * (k > 1)} per step"
        text = f"{reference['score']} %{at} {of}"
    return "; ".join([text, *map(published, reference.get("also", ()))])


def load_result(path: Path) -> dict[str, Any] | None:
    """The result at `path`, None without one.

    Raises OutputError without the right to read it, and BadDataError for a file that cannot be
    read, has another form, or does not match its checksum.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadDataError(f"{path} is not a regular file. {DELETE}")
        result = json.loads(file_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise OutputError(f"{path}: no permission to read it; give another --output_dir") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # nothing can be there
            return None
        raise BadDataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        fault = parse_fault(error)
        raise BadDataError(f"{path} is incomplete or damaged ({fault}). {DELETE}") from error
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version is None:
        raise BadDataError(f"{path} is not a result of this program. {DELETE}")
    if version != SCHEMA_VERSION:
        raise BadDataError(
            f"{path} has schema_version {version!r:.20}, this program writes {SCHEMA_VERSION}. "
            f"{DELETE}"
        )
    if not is_intact(result):
        raise BadDataError(
            f"{path} does not match its checksum: it was edited or damaged. {DELETE}"
        )
    lacking = [
        f"{name} is no {kind.__name__}" for name, kind in FORM if type(result.get(name)) is not kind
    ]
    try:
        if not lacking:
            table(result, path)
            samples_of(result)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        lacking = [f"{type(error).__name__}: {error}"]
    if lacking:
        raise BadDataError(f"{path} is incomplete or damaged ({', '.join(lacking)}). {DELETE}")
    return result


# what every reader relies on
FORM = (
    ("id", str),
    ("generation_id", str),
    ("status", str),
    ("config", dict),
    ("protocol", dict),
    ("metrics", dict),
    ("diagnostics", dict),
    ("n_samples", int),
    ("n_failed", int),
    ("samples", list),
    ("profile", dict),
    ("meta", dict),
)
# --overwrite would set the samples aside, too
DELETE = "Delete it and run the same command: the result is rebuilt from the kept samples"


def is_intact(result: Mapping[str, Any]) -> bool:
    """Whether a result's content matches its content_sha256."""
    try:
        content = {name: value for name, value in result.items() if name not in VOLATILE}
        return result.get("content_sha256") == sha256(content)
    except (ValueError, RecursionError):  # NaN is no JSON
        return False


def table(result: Mapping[str, Any], path: Path) -> str:
    """The summary that a run prints at its end."""
    from prettytable import PrettyTable

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = PrettyTable(["metric", "value %", "95 % interval", "stderr", "n"])
    rows.align = "r"
    rows.align["metric"] = "l"
    headline = result["headline"]["metric"] if result["headline"] else None
    for key, e in (result["metrics"] or result["score_on_completed"] or {}).items():
        name = f"{key} *" if key == headline else key
        value, low, high, stderr = as_read(e["value"], *e["ci95"], e["stderr"])
        rows.add_row([name, value, f"{low} to {high}", stderr, e["n"]])
    p, config = result["profile"], result["config"]
    counted = numbered(result["n_samples"], "sample")
    if n := config.get("repeats"):
        counted = f"{numbered(result['n_samples'], 'document')}, {n} samples each"
    lines = [
        f"{config['model_alias']} {config['task']} ({config['protocol']}): "
        f"{result['status']}, {counted}",
        rows.get_string(),
    ]
    if result["n_failed"]:
        first = next((s["error"] for s in result["samples"] if s["error"]), "its reason is lost")
        lines.append(
            f"{numbered(result['n_failed'], 'sample')} failed: the values above are of the others "
            "and not a score of the benchmark; the same command tries again. First error: "
            f"{first.strip().splitlines()[-1]}"
        )
    if p.get("forward_passes_per_sample"):
        lines.append(
            f"{shown(p['tokens_per_second'], 1)} tokens/s, "
            f"{shown(p['tpf'], 2)} tokens per forward pass, "
            f"{shown(p['forward_passes_per_sample'], 1)} forward passes per sample"
        )
    if "rows" in p:
        lines.append(
            f"{p['rows']} rows for {p['samples']} requests, {shown(p['rows_per_second'], 1)} rows/s"
        )
    lines += code_lines(result)
    lines += [f"warning: {warning}" for warning in result["diagnostics"]["warnings"]]
    if result["reference"]:
        lines.append(f"published: {published(result['reference'])}")
    elif config["protocol"] != "uniform":
        lines.append(f"published: {result['reference_note']}")
    return "\n".join([*lines, f"result: {path}"])
