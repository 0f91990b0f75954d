"""Change or break a copied checkpoint, and check that it is refused."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models import CheckpointError, check_checkpoint, load_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def edit(path: Path, **changes) -> None:
    """Set keys of a JSON object; ... deletes."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, *patterns: str) -> list[str]:
    """The problems of a checkpoint, which match `patterns`; load_model raises some of them."""
    problems = check_checkpoint(folder)
    for pattern in patterns:
        assert any(re.search(pattern, p) for p in problems), (pattern, problems)
    assert all("\n" not in p for p in problems)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu", dtype="float32")
    assert caught.value.problems and set(caught.value.problems) <= set(problems)
    return problems
