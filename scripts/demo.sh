#!/usr/bin/env bash
# Install into .venv if that has not been done yet. Then evaluate the two tiny trained checkpoints of
# assets/ on five mini benchmarks at 1, 2, 3 and 8 tokens per step, print a table and draw figures, and
# compare the likelihoods of answers in two sets of multiple choice.
# Finished experiments are not run again.
#   ./scripts/demo.sh                   all problems
#   ./scripts/demo.sh --quick           the first 25 problems of each benchmark, under two minutes
#   ./scripts/demo.sh --tps 1 4         other options go to `scripts/sweep.py run`
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
.venv/bin/python scripts/sweep.py run --models tiny-llada tiny-dream --tasks humaneval mbpp gsm8k truthfulqa lines \
  --tps 1 2 3 8 --output_dir "$out" --extra "$extra" --workers 2 ${options[@]+"${options[@]}"}
# shellcheck disable=SC2086 # words of the suite's options
for model in tiny-llada tiny-dream; do
  .venv/bin/python eval.py --model_alias "$model" --task arc_easy,arc_challenge --output_dir "$out" $extra --batch_size 128
done
figure="$out/report/accuracy_k_uniform.png"
if [ -f "$figure" ]; then
  echo "$figure: accuracy falls as more tokens are committed per step, because tokens committed in one pass mix several right answers"
fi
