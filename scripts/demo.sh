#!/usr/bin/env bash
# Install into .venv where that is not done yet, then show the real thing on tiny checkpoints with random weights:
# official decodings replayed token for token, and one experiment of each family where the benchmark files are at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
set_dir=tests/conformance
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for model in llada-tiny dream-tiny; do
  .venv/bin/python - "$set_dir" "$model" "$work" <<'PY'
import json, sys
from pathlib import Path
conformance, model, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
rows = [json.loads(line) for line in (conformance / "golden/decoding.jsonl").open(encoding="utf-8")]
rows = [r for r in rows if r["model"] == model and not {"cache", "threshold"} & r["params"].keys()]
(work / f"{model}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
PY
  echo "== $model: recorded decodings of the official code, replayed"
  .venv/bin/python scripts/trace.py --checkpoint "$set_dir/$model" --cases "$work/$model.jsonl" \
    --out "$work/$model.out.jsonl" --batch_size 4 --no_early_exit
  .venv/bin/python - "$work/$model.jsonl" "$work/$model.out.jsonl" <<'PY'
import json, sys
recorded, ours = ([json.loads(line) for line in open(path, encoding="utf-8")] for path in sys.argv[1:])
for case, trace in zip(recorded, ours, strict=True):
    n = sum(len(positions) for positions, _ in trace["commits"])
    if trace["ids"][:n] != case["expected_ids"][:n]:
        sys.exit(f"{case['id']}: tokens differ")
print(f"{len(ours)} of {len(recorded)} equal, {sum(t['forward_passes'] for t in ours)} forward passes "
      f"against {sum(c['forward_passes'] for c in recorded)} recorded")
PY
done

if [ -n "${DLLMEXP_DATA_DIR:-}" ]; then
  for alias in llada dream; do
    echo "== $alias on gsm8k, tiny random weights: the score is 0, the path is real"
    .venv/bin/python eval.py --model_alias "$alias" --llada_ckpt "$set_dir/llada-tiny" --dream_ckpt "$set_dir/dream-tiny" \
      --task gsm8k --tokens_per_step 2 --limit 8 --batch_size 4 --dtype float32 --device cpu --tag demo --overwrite
  done
else
  echo "== no benchmark files: set DLLMEXP_DATA_DIR to their directory to run an experiment here too. What would run:"
  .venv/bin/python eval.py --model_alias llada --task gsm8k --tokens_per_step 2 --dry_run
fi
