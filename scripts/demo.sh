#!/usr/bin/env bash
# Install into .venv if that has not been done yet. Then evaluate the two tiny trained checkpoints of
# assets/ on the four mini benchmarks at 1, 2 and 3 tokens per step, and print a table and plots.
# Finished experiments are not run again.
#   ./scripts/demo.sh                   all problems
#   ./scripts/demo.sh --quick           the first 25 problems of each benchmark, under two minutes
#   ./scripts/demo.sh --tps 1 2 3 8     other options go to `scripts/sweep.py run`
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/demo
extra="--data_dir assets/benchmarks --dtype float32 --batch_size 32"
options=()
for word in "$@"; do
  case "$word" in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' scripts/demo.sh && exit 0 ;;
    --quick) out=results/demo-quick extra="$extra --limit 25" ;;
    *) options+=("$word") ;;
  esac
done
source scripts/setup.sh
# Two experiments at once, one thread each: a second thread does not speed up models this small.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python scripts/sweep.py run --models tiny-llada tiny-dream --output_dir "$out" --extra "$extra" --workers 2 \
  ${options[@]+"${options[@]}"}
