"""The samples of a result, packed for the HTML page: little JSON, compressed, opened by the browser on demand."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any


def pack(result: Mapping[str, Any], metric: str) -> str:
    """Base64 of zlib-compressed JSON: one object per sample.

    d doc_id, r repeat, p prompt, a raw answer, s scored text, x extracted answer per filter, v verdict of a program,
    m value of `metric`, t token ids, c committing forward pass per position (from 0, -1 open), n forward passes,
    k tokens returned, f why it ended.
    """
    rows = [
        {
            "d": row["doc_id"],
            "r": row["repeat"],
            "p": row["prompt"],
            "a": row["raw_text"],
            "s": row["text"],
            "x": row.get("extracted"),
            "v": row.get("verdict"),
            "m": row["metrics"][metric],
            "t": row["token_ids"],
            "c": row["committed_at"],
            "n": row["nfe"],
            "k": row["tokens_returned"],
            "f": row["cut"] or row["finish_reason"],
        }
        for row in result["samples"]
    ]
    text = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")
