#!/usr/bin/env bash
# Install what this program needs into .venv, once:
#   ./scripts/setup.sh
# The other scripts source it: it creates the virtual environment $venv (default .venv) and installs
# what $requirements (default requirements.txt) lists. DLLMEXP_PYTHON names another Python to create
# it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${BASH_SOURCE[0]}" = "$0" ] && [ $# -gt 0 ]; then
  case "$1" in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' scripts/setup.sh && exit 0 ;;
    *) echo "error: unknown argument '$1'; setup.sh takes none but --help" >&2 && exit 2 ;;
  esac
fi
python="${DLLMEXP_PYTHON:-python3}"
venv="${venv:-.venv}" requirements="${requirements:-requirements.txt}"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) is too old: Python 3.10 or newer is needed; name one in DLLMEXP_PYTHON" >&2
    exit 3
  }
  echo "creating $venv"
  "$python" -m venv "$venv" || {
    # Without python3-venv, Debian's Python leaves an environment without pip.
    rm -rf "$venv"
    echo "error: $venv cannot be made, see above; install python3-venv or name another Python in DLLMEXP_PYTHON" >&2
    exit 3
  }
fi
if ! cmp -s "$requirements" "$venv/installed.txt"; then
  echo "installing the packages of $requirements (once; takes some minutes)"
  # Install the pinned torch first, also for a list that leaves it open. An installed build is kept, such as a CPU build.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  cp "$requirements" "$venv/installed.txt"
fi
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "installed in $venv; source $venv/bin/activate"
fi
