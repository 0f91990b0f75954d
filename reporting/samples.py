"""The samples of a result: compressed for the HTML page, and as JSON lines.

The browser unpacks them on demand.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiment.sample import answers_of

# fields of a sample that page.js shows by name, if a sample has them
FIELDS = ("doc_id", "repeat", "prompt", "nfe", "tokens_returned", "extracted", "verdict", "target")
# fields that are packed in another form, or that say nothing to a reader
OTHER = set("raw_text text token_ids committed_at metrics cut finish_reason seed key error".split())
OTHER |= set("forwards_saved positions_computed nfe_partial nfe_verifier prompt_tokens".split())
OTHER |= set("tokens_committed status program order rows".split())
CHUNK = 32  # positions whose forward passes are stored relative to their first one


def pack(result: Mapping[str, Any], metric: str) -> str:
    """Two lines of base64 of zlib-compressed JSON: `about` and `_samples` of the result."""
    return "\n".join(_compressed(part) for part in (about(result), _samples(result, metric)))


def _compressed(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")


def about(result: Mapping[str, Any]) -> dict[str, Any]:
    """Title -> {name: value}: where a result is from, and its configuration without empty settings.

    Empty are None, and lists, texts and objects without content.
    """
    meta = result.get("meta") or {}
    made, environment = meta.get("samples_made") or [], meta.get("environment") or {}
    commit = environment.get("git_commit")
    places = ((m.get("device_name") or m.get("cpu"), m.get("hostname")) for m in made)
    machines = {", ".join(filter(None, place)) for place in places}
    origin = {
        "started": meta.get("started"),
        "commit": commit and commit + " (with changes)" * bool(environment.get("git_dirty")),
        "machine": "; ".join(sorted(machines)),
        "command": " ".join(environment.get("command") or ()),
        "packages": environment.get("packages"),
        "generation id": result.get("generation_id"),
        "result id": result.get("id"),
    }
    overrides = result["protocol"]["overrides"]
    departs = {
        name: f"{v.get('run')} (protocol: {v.get('protocol')})" if isinstance(v, dict) else v
        for name, v in overrides.items()
    }
    parts = {
        "Origin": origin,
        "Departs from the protocol in": departs,
        "Configuration": result["config"],
        "Data": {k: v for k, v in result["data"].items() if k != "files"},
        "Metrics": {k: v.get("value") for k, v in result["metrics"].items()},
        "Profile": {k: v for k, v in result["profile"].items() if k != "sample_seconds"},
        "Notes": dict(enumerate(result.get("notes") or ())),
    }
    shown = {t: {k: v for k, v in p.items() if not _empty(v)} for t, p in parts.items()}
    return {title: part for title, part in shown.items() if part}


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _told(value: Any) -> Any:
    """A list of objects without what says nothing to a reader."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in one.items() if k not in OTHER} if isinstance(one, dict) else one
        for one in value
    ]


def _samples(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """`tokens`: [id, text or None] of each token, the most frequent one first, and `samples`.

    A sample has those of FIELDS that it has, and
    score:  value of `metric`.
    ended:  why the answer ended, absent if it fills the canvas.
    ids:    its token ids, as indices of `tokens`; without a tail that was never committed.
    length: of the canvas.
    starts, passes: the forward pass that committed each position, see `relative`.
    raw:    the text with its special tokens, or of how many tokens it is the text.
    text:   the text that is scored, or how many UTF-16 units of `raw` it has.
    more:   what a sample of generated text does not have, such as options and likelihoods.
    """
    texts = result.get("token_texts") or {}
    samples = answers_of(result["samples"])
    counts = Counter(token for s in samples for token in s.get("token_ids") or ())
    rank = {token: i for i, (token, _) in enumerate(counts.most_common())}
    packed = []
    for sample in samples:
        one = {name: sample[name] for name in FIELDS if not _empty(sample.get(name))}
        one["score"] = sample["metrics"][metric]
        if ended := sample.get("cut") or sample.get("finish_reason"):
            one["ended"] = ended
        if more := {k: _told(v) for k, v in sample.items() if k not in OTHER and k not in FIELDS}:
            one["more"] = more
        ids, passes = sample.get("token_ids") or (), sample.get("committed_at") or ()
        kept = max((i + 1 for i, at in enumerate(passes) if at >= 0), default=0)
        if ids:
            starts, relative_passes = relative(passes[:kept])
            one |= {"ids": [rank[token] for token in ids[:kept]], "length": len(ids)}
            one |= {"starts": starts, "passes": relative_passes}
        text, raw = sample.get("text") or "", sample.get("raw_text") or ""
        written = [texts.get(str(token), "") for token in ids[:kept]]
        ends = list(accumulate(map(len, written), initial=0))
        n = ends.index(len(raw)) if len(raw) in ends else 0
        one["raw"] = n if "".join(written[:n]) == raw else raw
        one["text"] = text
        if raw.startswith(text):
            one["text"] = len(text.encode("utf-16-le", "surrogatepass")) // 2
        packed.append(one)
    return {"tokens": [[token, texts.get(str(token))] for token in rank], "samples": packed}


def relative(passes: Sequence[int]) -> tuple[list[int], str]:
    """The first forward pass of each CHUNK of positions, and a character for each position.

    The character's code is 48 plus the pass, counted from its chunk's first one; "/" (47) where
    nothing was committed. These compress to half of what plain numbers do.
    """
    starts, characters = [], []
    for at in range(0, len(passes), CHUNK):
        chunk = passes[at : at + CHUNK]
        starts.append(min((p for p in chunk if p >= 0), default=0))
        characters += [chr(47 if p < 0 else 48 + p - starts[-1]) for p in chunk]
    return starts, "".join(characters)


# of the config and of a sample, for JSON lines
CONFIG = ("model_alias", "task", "protocol", "algorithm", "tokens_per_step", "seed")
SAMPLE = ("doc_id", "repeat", "prompt", "text", "extracted", "target", "metrics", "verdict")
SAMPLE += ("finish_reason", "tokens_returned", "nfe")


def json_lines(path: Path) -> Iterator[str]:
    """One line of JSON for each sample of a result file; `result` is the file's name without .json.

    Fields that the result does not have are null: every line has the same fields.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    about = {"result": path.stem} | {name: result["config"].get(name) for name in CONFIG}
    for sample in answers_of(result["samples"]):
        yield json.dumps(about | {name: sample.get(name) for name in SAMPLE}) + "\n"
