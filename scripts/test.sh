#!/usr/bin/env bash
# Install into .venv if that has not been done yet, then run the tests, three at a time.
#   ./scripts/test.sh                            the full suite: under ten minutes on two idle cores
#   ./scripts/test.sh --quick                    without the tests marked slow: under two
#   ./scripts/test.sh tests/test_store.py        one file, or several
#   ./scripts/test.sh --latest                   with the newest packages (requirements-latest.txt), in .venv-latest
# --quick, --latest and files can be combined. All other arguments go to pytest: ./scripts/test.sh --quick -k store.
# Some of them want one process: ./scripts/test.sh -n 0 -s -k store.
# Delete .venv-latest to get newer packages.
set -euo pipefail
cd "$(dirname "$0")/.."
options=()
for word in "$@"; do
  case "$word" in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' scripts/test.sh && exit 0 ;;
    --quick) options+=(-m "not slow") ;;
    --latest) venv=.venv-latest requirements=requirements-latest.txt ;;
    *) options+=("$word") ;;
  esac
done
source scripts/setup.sh
# A second thread speeds up nothing in models this small, and slows down tests that start two processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # set in some containers: each of 200 processes would compile the project anew
exec "$venv/bin/python" -m pytest -q -rs -n 3 --dist worksteal ${options[@]+"${options[@]}"}
