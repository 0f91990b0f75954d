# Sourced by the other scripts: a virtual environment $venv (.venv) with what $requirements (requirements.txt) lists.
# DLLMEXP_PYTHON names another interpreter to make it with.
python="${DLLMEXP_PYTHON:-python3}"
venv="${venv:-.venv}" requirements="${requirements:-requirements.txt}"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) is too old: Python 3.10 or newer is needed; name one in DLLMEXP_PYTHON" >&2
    exit 3
  }
  echo "creating $venv"
  "$python" -m venv "$venv" || { # without pip, as Debian's python3 leaves it where python3-venv is missing, it is none
    rm -rf "$venv"
    echo "error: $venv cannot be made, see above; DLLMEXP_PYTHON names another Python" >&2
    exit 3
  }
fi
if ! cmp -s "$requirements" "$venv/installed.txt"; then
  echo "installing what $requirements lists (once; some minutes)"
  # torch first and as pinned, also where the list leaves it open: a build that is there is never replaced
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  cp "$requirements" "$venv/installed.txt"
fi
