#!/usr/bin/env bash
# Install into .venv where that is not done yet, then run the tests. Arguments go to pytest: ./scripts/test.sh -k store, or
# files: ./scripts/test.sh tests/test_store.py
# --latest, as the first: with the newest of everything (requirements-latest.txt), in .venv-latest; delete it for newer.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --latest ]; then
  venv=.venv-latest requirements=requirements-latest.txt
  shift
fi
source scripts/setup.sh
# models this small gain nothing from a second thread, and lose much where two processes share the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
what=(tests)
for word in "$@"; do
  case "$word" in tests/*) what=() ;; esac
done
exec "$venv/bin/python" -m pytest -q -rs "$@" ${what[@]+"${what[@]}"}
