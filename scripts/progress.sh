#!/usr/bin/env bash
# Progress of the suites: ./scripts/progress.sh [--watch [S]] [--output_dir DIR] [filters of exp.sh]
# Reads files only, needs no GPU, and can run on another node that sees them. Relative paths are read
# from the checkout, wherever the script is called from.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python="${DLLMEXP_PYTHON:-python3}"
exec "$python" scripts/sweep.py progress "$@"
