# Sourced by the other scripts: a virtual environment in .venv with what requirements.txt pins.
# DLLMEXP_PYTHON names another interpreter to make it with.
python="${DLLMEXP_PYTHON:-python3}"
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) is too old: Python 3.10 or newer is needed; name one in DLLMEXP_PYTHON" >&2
    exit 3
  }
  echo "creating .venv"
  "$python" -m venv .venv
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
  echo "installing what requirements.txt pins (once; some minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi
