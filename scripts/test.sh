#!/usr/bin/env bash
# The whole check: lint, types, tests, in a virtual environment of its own (.venv-test).
#   bash scripts/test.sh                  everything that this machine can run
#   bash scripts/test.sh -m "not slow"    the fast suite; any pytest arguments
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # the tests start processes, each of which would compile all anew
source scripts/environment.sh
make_environment .venv-test "[dev]"

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 # two threads under contention are slower than one
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MPLBACKEND=Agg
bin=$PWD/.venv-test/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" >"$types" 2>&1 & # a minute and more of one core, while the first tests wait for others
mypy=$! failed=0
"$bin/python" -m pytest -n "${QTORCH_TEST_PROCESSES:-3}" --dist loadgroup --durations=15 "$@" || failed=$?
wait "$mypy" || failed=$?
cat "$types"
exit "$failed"
