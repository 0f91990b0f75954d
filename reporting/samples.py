"""The samples of a result: compressed for the HTML page, and as JSON lines.

The browser unpacks them on demand.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# fields of a sample that page.js shows as they are
FIELDS = (
    "doc_id",
    "repeat",
    "prompt",
    "raw_text",
    "text",
    "token_ids",
    "committed_at",
    "nfe",
    "tokens_returned",
)


def pack(result: Mapping[str, Any], metric: str) -> str:
    """Base64 of zlib-compressed JSON: a list with one object per sample.

    Besides FIELDS, an object has `score` (value of `metric`), `ended` (why the answer ended, None
    if it fills the canvas), `extracted`, `verdict` and `target` (None if the sample has none).
    """
    samples = [
        {
            **{name: sample[name] for name in FIELDS},
            "score": sample["metrics"][metric],
            "ended": sample["cut"] or sample["finish_reason"],
            "extracted": sample.get("extracted"),
            "verdict": sample.get("verdict"),
            "target": sample.get("target"),
        }
        for sample in result["samples"]
    ]
    text = json.dumps(samples, ensure_ascii=True, separators=(",", ":"))
    # level 4 takes a seventh of the time of level 6, for 5 % more bytes
    return base64.b64encode(zlib.compress(text.encode("ascii"), 4)).decode("ascii")


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
    for sample in result["samples"]:
        yield json.dumps(about | {name: sample.get(name) for name in SAMPLE}) + "\n"
