#!/usr/bin/env bash
# Check qtorch on a real GPU: correctness and speed, in under eight minutes.
#   bash scripts/gpu_check.sh                         on the first CUDA device
#   bash scripts/gpu_check.sh --dry-run               small, on the CPU
#   bash scripts/gpu_check.sh --wheels FOLDER         on a machine without network, see below
# It prints tables and writes gpu_check.json and gpu_check.md (--out FOLDER). Sections run in the
# order of their worth; --only networks,twice selects some. A machine without network needs a Python
# with torch and pytorch-lightning, and wheels of the other requirements: fetch them beforehand on a
# machine with network, by `bash scripts/gpu_check.sh --fetch FOLDER [3.12]` (the version of Python
# there). QTORCH_PYTHON is the path of the Python to use (default: python3).
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
python=${QTORCH_PYTHON:-python3}
if [ "${1:-}" = --fetch ]; then
    exec "$python" scripts/gpu/fetch_wheels.py "$(realpath -m "$here/$2")" "${3:-3.12}"
fi
if [ "${1:-}" = --wheels ]; then
    target=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$target" "$(realpath "$here/$2")"/*.whl
    export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$target
    shift 2
fi
cd "$here"
exec "$python" "$OLDPWD/scripts/gpu/check.py" "$@"
