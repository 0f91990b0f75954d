#!/usr/bin/env bash
# Run the suite in a tmux session, or attach to the session that runs it:
#   ./scripts/exp.sh [--models ...] [--tasks ...] [--tps ...] [--algs ...] [--extra "..."]
#                    [--file YAML] [--workers N]
#   ./scripts/exp.sh --no_tmux ...                           in the foreground
#   ./scripts/exp.sh --engine slurm --partition NAME ...     as a job of a SLURM cluster
# All options go to `scripts/sweep.py run`; see its --help. CUDA_VISIBLE_DEVICES selects the GPUs.
# Ctrl-C stops the suite; finished samples are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

tmux_wanted=yes
options=()
for word in "$@"; do
  case "$word" in
    --no_tmux) tmux_wanted=no ;;
    slurm | --engine=slurm) tmux_wanted=no options+=("$word") ;; # submitting needs no session
    *) options+=("$word") ;;
  esac
done
# a tmux server of its own: a running server would not pass on the environment of this shell
name="${DLLMEXP_TMUX:-dllmexp}"
attach="tmux -L $name attach -t $name"
running() { tmux -L "$name" has-session -t "=$name" 2>/dev/null; }

if [ "$tmux_wanted" = yes ]; then
  if ! command -v tmux >/dev/null; then
    echo "error: tmux is not installed; install it (apt-get install tmux)," \
      "or run in the foreground with --no_tmux" >&2
    exit 3
  fi
  if running; then
    echo "a suite is running already; the options of this call are not used"
    [ -t 0 ] && [ -t 1 ] && TMUX= exec $attach
    echo "attach: $attach"
    exit 0
  fi
fi

source scripts/setup.sh
export HF_HOME="${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}"
export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}"
command=(.venv/bin/python scripts/sweep.py run ${options[@]+"${options[@]}"})
if [ "$tmux_wanted" = no ]; then
  exec "${command[@]}"
fi

# report wrong options here, not in a session that closes at once
.venv/bin/python scripts/sweep.py run --check ${options[@]+"${options[@]}"}
tmux -L "$name" new-session -d -s "$name" "$(printf '%q ' "${command[@]}")"
if [ -t 0 ] && [ -t 1 ]; then
  TMUX= $attach || true
  running && echo "the suite goes on; attach: $attach" || echo "the suite has ended"
else
  echo "the suite runs; attach: $attach"
fi
echo "progress: ./scripts/progress.sh [--watch]; log: logs/sweep.log in the directory of the results"
