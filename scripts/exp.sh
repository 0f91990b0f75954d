#!/usr/bin/env bash
# Run the suite in a tmux session, or re-attach to the one that runs it:
#   ./scripts/exp.sh [--models ...] [--tasks ...] [--tps ...] [--algs ...] [--extra "..."] [--file YAML] [--workers N]
#   ./scripts/exp.sh --no_tmux ...     in the foreground instead
#   ./scripts/exp.sh --engine slurm --partition NAME ...     as a job of a SLURM cluster
# Options go to `scripts/sweep.py run`, whose --help lists them. GPUs: CUDA_VISIBLE_DEVICES. Ctrl-C stops in good order.
set -euo pipefail
cd "$(dirname "$0")/.."

tmux_wanted=yes
options=()
for word in "$@"; do
  case "$word" in
    --no_tmux) tmux_wanted=no ;;
    slurm | --engine=slurm) tmux_wanted=no options+=("$word") ;; # a job that is submitted needs no session
    *) options+=("$word") ;;
  esac
done
# a server of its own: a session in one that already runs would not see this shell's environment
name="${DLLMEXP_TMUX:-dllmexp}"
attach="tmux -L $name attach -t $name"
running() { tmux -L "$name" has-session -t "=$name" 2>/dev/null; }

if [ "$tmux_wanted" = yes ]; then
  if ! command -v tmux >/dev/null; then
    echo "error: tmux is not installed; install it (apt-get install tmux), or run in the foreground with --no_tmux" >&2
    exit 3
  fi
  if running; then
    echo "a suite is running already; options given now are not used"
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

# what is wrong with the options is said here, not in a session that is gone at once
.venv/bin/python scripts/sweep.py run --check ${options[@]+"${options[@]}"}
tmux -L "$name" new-session -d -s "$name" "$(printf '%q ' "${command[@]}")"
if [ -t 0 ] && [ -t 1 ]; then
  TMUX= $attach || true
  running && echo "the suite goes on; attach: $attach" || echo "the suite has ended"
else
  echo "the suite runs; attach: $attach"
fi
echo "where it stands: ./scripts/progress.sh [--watch]; what it said: logs/sweep.log in the results' directory"
