#!/bin/sh
# make_venv.sh FOLDER [PYTHON]: a virtual environment of PYTHON, or of the first Python 3.11 to 3.13 that is found.
# It says which one it took. uv makes it where UV names it, and then brings a Python if there is none.
set -eu
folder=$1
wanted=${2:-}
fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

chosen=
for python in ${wanted:-python3.11 python3.12 python3.13 python3 python}; do
    # A name alone proves nothing: version managers put shims on the path, distributions leave venv out.
    if command -v "$python" >/dev/null 2>&1 && "$python" -c "$fits" 2>/dev/null; then
        chosen=$(command -v "$python")
        break
    fi
done

if [ -n "$chosen" ]; then
    maker=${UV:+uv}
    echo "$folder: $("$chosen" --version) ($chosen), made with ${maker:-venv}"
elif [ -n "${UV:-}" ] && [ -z "$wanted" ]; then
    echo "$folder: no Python 3.11 to 3.13 with venv was found; uv finds or fetches one"
    chosen='>=3.11,<3.14'
else
    echo "no Python 3.11 to 3.13 with venv and pip was found (tried: ${wanted:-python3.11 python3.12 python3.13 python3 python})." >&2
    echo "Install one, or uv, which brings its own, or name one: make serve PYTHON=/path/to/python3.12" >&2
    exit 1
fi

if [ -n "${UV:-}" ]; then
    "$UV" venv --quiet --seed --python "$chosen" "$folder"
else
    "$chosen" -m venv "$folder"
fi
