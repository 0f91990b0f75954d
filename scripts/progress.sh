#!/usr/bin/env bash
# Where the suite stands: ./scripts/progress.sh [--watch [S]] [--output_dir DIR] [filters as for exp.sh]. Reads files only.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python="${DLLMEXP_PYTHON:-python3}"
exec "$python" scripts/sweep.py progress "$@"
