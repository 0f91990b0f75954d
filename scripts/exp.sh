#!/usr/bin/env bash
# Run the suite in a tmux session, or attach to the session that runs it:
#   ./scripts/exp.sh [--models ...] [--tasks ...] [--tps ...] [--algs ...] [--extra "..."]
#                    [--file YAML] [--output_dir DIR] [--workers N]
#   ./scripts/exp.sh --no_tmux ...                           in the foreground
#   ./scripts/exp.sh --engine slurm --partition NAME ...     as a job of a SLURM cluster
# All options go to `scripts/sweep.py run`; see its --help. CUDA_VISIBLE_DEVICES selects the GPUs.
# Relative paths are read from the checkout, wherever the script is called from.
# Each directory of results has a session of its own. Ctrl-C stops the suite; finished samples are
# kept, and the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

tmux_wanted=yes
options=()
for word in "$@"; do
  case "$word" in
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' scripts/exp.sh
      [ ! -x .venv/bin/python ] || .venv/bin/python scripts/sweep.py run --help
      exit 0
      ;;
    --no_tmux) tmux_wanted=no ;;
    --check) tmux_wanted=no options+=("$word") ;; # it runs nothing
    slurm | --engine=slurm) tmux_wanted=no options+=("$word") ;; # submitting needs no session
    *) options+=("$word") ;;
  esac
done
if [ "$tmux_wanted" = yes ] && ! command -v tmux >/dev/null; then
  echo "error: tmux is not installed; install it (apt-get install tmux)," \
    "or run in the foreground with --no_tmux" >&2
  exit 3
fi

source scripts/setup.sh
home=~ # also without HOME
export HF_HOME="${HF_HOME:-${XDG_CACHE_HOME:-$home/.cache}/huggingface}"
export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}"
command=(.venv/bin/python scripts/sweep.py run ${options[@]+"${options[@]}"})
if [ "$tmux_wanted" = no ]; then
  exec "${command[@]}"
fi

# report wrong options here, not in a session that closes at once
out="$(.venv/bin/python scripts/sweep.py run --check ${options[@]+"${options[@]}"})"
folder="$(cd "$out" && pwd -P)"
# a tmux server for each directory: a running one would not pass on the environment of this shell
label="$(basename "$folder" | tr -c 'A-Za-z0-9_\n' - | cut -c 1-30)-$(printf %s "$folder" | cksum | cut -d ' ' -f 1)"
name="${DLLMEXP_TMUX:-dllmexp}-$label"
attach="tmux -L $name attach -t $name"
terminal=no
[ -t 0 ] && [ -t 1 ] && terminal=yes
# tmux knows this terminal; only attaching needs the terminal of the user
server() { TERM=screen tmux -L "$name" "$@"; }
running() { server has-session -t "=$name" 2>/dev/null; }

log="$folder/logs/sweep.log" code="$folder/logs/sweep.rc"
seen=$(wc -c 2>/dev/null <"$log" || echo 0)
if running; then
  if [ $# -gt 0 ] && [ "$(server show-environment -g DLLMEXP_OPTIONS 2>/dev/null)" != "DLLMEXP_OPTIONS=$*" ]; then
    echo "error: a suite with other options is running in $out; attach: $attach;" \
      "another --output_dir runs beside it" >&2
    exit 75
  fi
  echo "a suite is running in $out already"
else
  mkdir -p "$folder/logs"
  rm -f "$code"
  # the traps let the exit code be written after Ctrl-C, too
  server new-session -d -s "$name" bash -c 'trap : INT HUP TERM; "${@:2}"; echo $? >"$1"' bash "$code" "${command[@]}"
  server set-environment -g DLLMEXP_OPTIONS "$*" 2>/dev/null || true # it may have ended
fi
if [ "$terminal" = yes ]; then
  TMUX= $attach && attached=yes || attached=no
  if ! running; then # the session took its terminal along
    # its ending: what follows the last empty line
    tail -c "+$((seen + 1))" "$log" 2>/dev/null | awk '/^$/ { text = "" } { text = text $0 "\n" } END { printf "%s", text }' || true # it may have no log yet
    exit "$(cat "$code" 2>/dev/null || echo 1)" # absent: the session was killed
  fi
  [ $attached = yes ] || echo "tmux cannot show the session in this terminal (TERM=${TERM:-})"
fi
where=""
[ "$out" = results ] || where=" --output_dir $(printf %q "$out")"
echo "the suite runs; attach: $attach"
echo "progress: ./scripts/progress.sh --watch$where; log: $log"
