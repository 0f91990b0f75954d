"""Draw the README's two figures from the results of the demo.

    ./scripts/demo.sh
    python dev/readme_figures.py results/demo

Writes accuracy.svg (accuracy against tokens per forward pass, as the report draws it) and
commits.svg (which forward pass committed which token of one answer) to docs/images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.tokenizer import load_tokenizer  # noqa: E402
from reporting.data import read_all  # noqa: E402
from reporting.plots import draw  # noqa: E402

EARLY, LATE = (8, 69, 148), (214, 230, 244)  # colours of the first and of the last pass, RGB
CHARACTER, PAD, CELL, ROW, GAP, LEFT = 7.3, 5, 24, 44, 8, 62  # pixels; monospace at 12 px


def answers(folder: Path, alias: str, task: str) -> list[dict[str, Any]]:
    """The results of one model and task, by tokens per step. SystemExit if there are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found = [r for r in found if (r["config"]["model_alias"], r["config"]["task"]) == (alias, task)]
    if not found:
        raise SystemExit(f"no result of {alias} on {task} in {folder}; run ./scripts/demo.sh first")
    return sorted(found, key=lambda r: r["config"]["tokens_per_step"])


def longest_right(results: Sequence[Mapping[str, Any]]) -> int:
    """doc_id of the longest answer of the first result that is right in every result."""
    right = [
        {s["doc_id"] for s in r["samples"] if s["metrics"][r["headline"]["metric"]] == 1}
        for r in results
    ]
    common = set.intersection(*right)
    if not common:
        raise SystemExit("no document is right in every result: there is no answer to draw")
    samples = [s for s in results[0]["samples"] if s["doc_id"] in common]
    return max(samples, key=lambda s: (s["tokens_returned"], -s["doc_id"]))["doc_id"]


def shown(text: str) -> str:
    """A token as a cell shows it."""
    if text.startswith("<|"):
        return "end"
    return text.replace("\n", "\\n").replace(" ", "\u00b7")


def colour(step: int, n_steps: int) -> str:
    share = step / max(1, n_steps - 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(EARLY, LATE))


def strips(rows: Sequence[tuple[str, Sequence[str], Sequence[int]]], block: int) -> str:
    """An SVG picture with one strip per row.

    rows: (label, texts of the canvas' tokens, forward pass that committed each, from 0; -1: none).
    block: positions of a block; a gap separates blocks.
    """
    columns = range(len(rows[0][1]))
    widths = [
        max(len(texts[i]) if steps[i] >= 0 else 1 for _, texts, steps in rows) * CHARACTER + 2 * PAD
        for i in columns
    ]
    at = [LEFT + sum(widths[:i]) + GAP * (i // block) for i in columns]
    width, height = at[-1] + widths[-1] + PAD, ROW * len(rows) + PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="monospace" font-size="12">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
    ]
    for row, (label, texts, steps) in enumerate(rows):
        y, n_steps = row * ROW + PAD, max(steps) + 1
        out.append(f'<text x="{PAD}" y="{y + 16}">{escape(label)}</text>')
        for x, w, text, step in zip(at, widths, texts, steps):
            fill = colour(step, n_steps) if step >= 0 else "white"
            ink = "white" if step >= 0 and step < 0.5 * n_steps else "black"
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w - 1:.1f}" height="{CELL}" fill="{fill}" '
                'stroke="#999999" stroke-width="0.5"/>'
            )
            if step >= 0:
                middle = f'x="{x + w / 2:.1f}" text-anchor="middle"'
                out.append(f'<text {middle} y="{y + 16}" fill="{ink}">{escape(text)}</text>')
                out.append(f'<text {middle} y="{y + 35}" font-size="9">{step + 1}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="directory of the demo's results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--model_alias", default="tiny-llada")
    parser.add_argument("--task", default="gsm8k")
    args = parser.parse_args(argv)
    results = answers(args.results, args.model_alias, args.task)
    doc_id = longest_right(results)
    tokenizer = load_tokenizer(results[0]["config"]["checkpoint"])
    rows = []
    for result in results:
        sample = next(s for s in result["samples"] if s["doc_id"] == doc_id)
        texts = [shown(tokenizer.decode([token])) for token in sample["token_ids"]]
        rows.append((f"K = {result['config']['tokens_per_step']}", texts, sample["committed_at"]))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = strips(rows, results[0]["config"]["block_length"])
    (args.out / "commits.svg").write_text(picture, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        draw(read_all([args.results])[0], Path(folder))
        shutil.copyfile(Path(folder, "accuracy_tpf_uniform.svg"), args.out / "accuracy.svg")
    print(f"{args.out / 'accuracy.svg'}, {args.out / 'commits.svg'} (document {doc_id})")


if __name__ == "__main__":
    main()
