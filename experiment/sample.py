"""The shapes of a sample: Request (what is asked) and Sample (what is kept, scored and reported).

Between them is `decoding.row_state.Completion`, what the engine returns, or where a likelihood is
asked for `decoding.likelihood.Likelihood`; a Sample carries it. The store keeps `Sample.kept()`,
from which the text is cut anew in every run; the result file has `Sample.row()`. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from decoding.likelihood import Likelihood
from decoding.row_state import Completion
from utils import sha256

# of a sample that failed, and of a text that was made elsewhere
NO_COMPLETION = Completion(
    (), (), nfe=0, forwards_saved=0, positions_computed=0, seconds=0.0, finish_reason=""
)
# what a store keeps of a completion; `seconds` is kept with the other times
DECODED = tuple(f.name for f in fields(Completion) if f.name != "seconds")
# and of a likelihood, whose cost in rows depends on what it ran with
SCORED = tuple(f.name for f in fields(Likelihood) if f.name not in ("seconds", "rows_run"))
# not in a row of the result file: the shapes themselves, what the benchmark has, times
NOT_IN_ROW = {"request", "completion", "doc", "stops", "prompt_ids", "seconds", "cost_seconds"}
NOT_IN_ROW |= {"continuation", "target_ids", "n_cut"}


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of the model: one document, once per repeat.

    doc:        the document, as the benchmark has it.
    repeat:     0 for the first answer to the document, 1 for the second, and so on; of a
                likelihood the number of the document's option.
    prompt:     rendered text: chat template, few-shot examples and prefill included.
    stops:      stop strings; the text of the answer ends before the first of them.
    seed:       of the sample's random numbers.
    key:        under which the sample is kept, see `store.sample_key`; "" where nothing is kept.
    prompt_ids: token ids of the prompt; () where nothing is decoded.
    continuation: the text whose likelihood after the prompt is asked for; None: an answer is.
    target_ids: token ids of the continuation.
    n_cut:      tokens of the prompt that are left out on the left, as it is too long.
    """

    doc: Mapping[str, Any]
    doc_id: int
    repeat: int = 0
    prompt: str = ""
    stops: tuple[str, ...] = ()
    seed: int = 0
    key: str = ""
    prompt_ids: tuple[int, ...] = ()
    continuation: str | None = None
    target_ids: tuple[int, ...] = ()
    n_cut: int = 0

    @property
    def share(self) -> str:
        """Requests with the same one are decoded by the same process."""
        return self.key if self.continuation is None else sha256(self.prompt)


@dataclass(frozen=True, eq=False)
class Sample:
    """A request with its answer, before it is scored.

    text:          what is scored: the answer up to its first end token and its first stop string.
    raw_text:      the committed text up to and including the first end token, special tokens
                   written out.
    cut:           why `text` ends: "end token <id>", "stop string '<s>'", or None where the canvas
                   was full.
    finish_reason: "end_token", "stop_string" or "length"; None where nothing was decoded.
    tokens_returned: tokens of `text`.
    cost_seconds:  wall time of decoding since the sample before was finished; over a run these add
                   up to the whole.
    error:         traceback of a sample that failed; its text is empty and it is never scored.
    """

    request: Request
    completion: Completion | Likelihood = NO_COMPLETION
    text: str = ""
    raw_text: str = ""
    cut: str | None = None
    finish_reason: str | None = None
    tokens_returned: int = 0
    cost_seconds: float = 0.0
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The sample in the result file: everything that the configuration decides, so no times."""
        row = {**vars(self.request), **vars(self), **vars(self.completion)}
        row["finish_reason"] = self.finish_reason  # of the text, as `cut` is
        row["prompt_tokens"] = len(self.request.prompt_ids)
        row["tokens_committed"] = self.completion.tokens_committed
        return {name: value for name, value in row.items() if name not in NOT_IN_ROW}

    def kept(self, peak_bytes: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """(result, meta) for the store: what repeats in every run, and what does not."""
        scored = isinstance(self.completion, Likelihood)
        result = {name: getattr(self.completion, name) for name in (SCORED if scored else DECODED)}
        meta = {
            "doc_id": self.request.doc_id,
            "repeat": self.request.repeat,
            "seconds": self.completion.seconds,
            "cost_seconds": self.cost_seconds,
            "tokens_returned": self.tokens_returned,
            "peak_bytes": peak_bytes,
        } | ({"rows_run": self.completion.rows_run} if scored else {})
        return result | {"prompt_tokens": len(self.request.prompt_ids)}, meta


def is_usable(record: Mapping[str, Any]) -> bool:
    """Whether a record of a store holds what `Sample.kept` writes, or a failure.

    A checksum covers damage on the disk, not a program that wrote something else, or a harness
    that gives something else.
    """
    result, meta = record["result"], record["meta"]
    if record["status"] == "error":
        return isinstance(meta.get("error"), str)
    times = [meta.get(name) for name in ("seconds", "cost_seconds")]
    if "loglikelihood" in result:
        counts = [result.get("rows"), result.get("positions_computed"), meta.get("rows_run")]
        return (
            all(type(n) is int and n >= 0 for n in counts)
            and all(
                type(x) in (int, float) and math.isfinite(x)
                for x in (result["loglikelihood"], *times)
            )
            and result.get("is_greedy") in (None, False, True)
            and isinstance(result.get("order"), list | tuple)
            and isinstance(meta.get("provenance"), dict)
        )
    ids, steps = result.get("token_ids"), result.get("committed_at")
    counts = [result.get(f.name, f.default) for f in fields(Completion) if f.type == "int"]
    counts += [meta.get("tokens_returned"), meta.get("peak_bytes") or 0]
    return (
        isinstance(ids, list | tuple)
        and isinstance(steps, list | tuple)
        and len(ids) == len(steps)
        and all(type(n) is int and 0 <= n < 2**31 for n in ids)
        and all(type(n) is int and n >= 0 for n in counts)
        and all(type(n) is int and -1 <= n < 2**31 for n in steps)
        and all(type(s) in (int, float) and math.isfinite(s) for s in times)
        and isinstance(result.get("finish_reason"), str)
        and isinstance(meta.get("provenance"), dict)
        and _is_score(meta.get("score"))
    )


def _is_score(score: object) -> bool:
    if not isinstance(score, dict):
        return score is None
    return type(score.get("value")) in (int, float) and type(score.get("version")) is int


def completion_of(kept: Mapping[str, Any]) -> Completion | Likelihood:
    """The completion of a kept sample, {"result": ..., "meta": ...} as `Sample.kept` gives them."""
    if "loglikelihood" in kept["result"]:
        found = {name: kept["result"][name] for name in SCORED}
        found |= {name: kept["meta"][name] for name in ("rows_run", "seconds")}
        return Likelihood(**found | {"order": tuple(found["order"])})
    found = {name: kept["result"][name] for name in DECODED if name in kept["result"]}
    found |= {name: tuple(found[name]) for name in ("token_ids", "committed_at")}
    return Completion(**found, seconds=kept["meta"]["seconds"])


def answers_of(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A row for each answer, from the rows of a result.

    With --repeats a row is a document and has them as `repeats`; without it is one already.
    """
    return [answer for row in rows for answer in row.get("repeats", [row])]


def samples_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Key -> {"result": ..., "meta": ...}, as a store keeps it, of each sample of a result.

    For a store that was deleted while the result file stayed: `store.put(key, {"status": "ok",
    **kept})` restores a sample. Where the samples were made in several places, the result does not
    have the place of each: `provenance` is then empty.
    """
    made = result["meta"]["samples_made"]
    provenance = {k: v for k, v in made[0].items() if k != "samples"} if len(made) == 1 else {}
    times = {(t["doc_id"], t["repeat"]): t for t in result["profile"]["sample_seconds"]}
    found = {}
    for row in answers_of(result["samples"]):
        # a row of likelihoods has its options
        for repeat, part in enumerate(row.get("options", [row]), row["repeat"]):
            scored = "loglikelihood" in part
            # one that could not be scored is kept
            if not part.get("key") or part["loglikelihood" if scored else "token_ids"] in (
                None,
                [],
            ):
                continue
            time = times[row["doc_id"], repeat]
            names = ("doc_id", "repeat", "seconds", "cost_seconds", *["rows_run"] * scored)
            decided = (*(SCORED if scored else DECODED), "prompt_tokens")
            found[part["key"]] = {
                "result": {name: part[name] for name in decided},
                "meta": {
                    **{name: time[name] for name in names},
                    "tokens_returned": part.get("tokens_returned", 0),
                    "peak_bytes": result["profile"]["peak_memory_bytes"]["device"],
                    "provenance": provenance,
                },
            }
    return found
